"""`--jobs`: real processes, their cores, GPUs, lines, exit codes and end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.errors import JobsFailed
from cli.main import app, run_guarded
from pipeline.config import Experiment, dump
from pipeline.order.jobs import check, devices, environment, run_jobs
from pipeline.progress import Quiet
from pipeline.training.run import Run
from pipeline.workspace import Layout

Tiny = Callable[..., Experiment]


class Lines(Quiet):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_failed_job_is_told_with_its_code_and_the_others_finish() -> None:
    code = "import sys; print('I am', *sys.argv[1:]); sys.exit(7 if sys.argv[2] == 'b' else 0)"
    lines = Lines()
    jobs = [("a", 0), ("b", 0), ("c", 1)]
    assert run_jobs(jobs, _python(code), 2, lines) == [(("b", 0), 7)]
    assert sorted(lines.said) == [
        "[a seed 0] I am --student a --seed 0 --no-report",
        "[b seed 0] I am --student b --seed 0 --no-report",
        "[c seed 1] I am --student c --seed 1 --no-report",
    ]


def test_a_killed_job_has_its_signals_code() -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run_jobs([("a", 0)], _python(code), 1, Quiet()) == [(("a", 0), -9)]


ENDS = {
    "done": "pass",
    "mistake": "import sys; sys.exit(2)",
    "interrupted": "import sys; sys.exit(130)",
    "bug": "1 / 0",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["done"], 0),
        (["done", "mistake"], 2),
        (["mistake", "mistake"], 2),
        (["mistake", "interrupted"], 130),
        (["mistake", "bug"], 1),
        (["interrupted", "bug", "done"], 1),
        (["killed", "mistake"], 1),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else str(value),
)
def test_the_parent_ends_as_its_worst_job(
    ends: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job's bug (exit 1) is no user's mistake (exit 2) of the parent."""
    jobs = [(name, seed) for seed, name in enumerate(ends)]
    script = f"import sys; exec({ENDS!r}[sys.argv[2]])"
    assert run_guarded(lambda: check(run_jobs(jobs, _python(script), 2, Quiet()))) == code
    said = capsys.readouterr().err
    assert all((f"{name} seed {seed} (exit code" in said) == (name != "done") for name, seed in jobs)
    assert said.startswith("e2kd: failed: ") == (code != 0)


def test_failed_jobs_say_their_codes() -> None:
    check([])
    with pytest.raises(JobsFailed) as caught:
        check([(("kd", 0), 2), (("kd", 1), -9)])
    assert caught.value.codes == {("kd", 0): 2, ("kd", 1): -9}
    assert str(caught.value) == (
        "failed: kd seed 0 (exit code 2), kd seed 1 (exit code -9); what they said is above, the other runs are kept"
    )


def test_never_more_than_asked_at_a_time(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time; me = pathlib.Path(sys.argv[1]) / sys.argv[3]; me.touch(); time.sleep(0.3); "
        "print(len(list(me.parent.iterdir()))); me.unlink()"
    )
    lines = Lines()
    assert run_jobs([(name, 0) for name in "abcd"], [*_python(code), str(tmp_path)], 2, lines) == []
    assert len(lines.said) == 4
    assert {line.split("] ")[1] for line in lines.said} <= {"1", "2"}


def test_strange_bytes_are_shown_not_raised() -> None:
    lines = Lines()
    code = "import sys; sys.stdout.buffer.write(bytes([255, 10]))"
    assert run_jobs([("a", 0)], _python(code), 1, lines) == []
    assert lines.said == ["[a seed 0] \N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_cores_are_shared(count: int) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = environment({"OMP_NUM_THREADS": "77", "HOME": "/x"}, count, None)
    assert found["OMP_NUM_THREADS"] == str(max(cores // count, 1))
    assert found["HOME"] == "/x"
    assert "CUDA_VISIBLE_DEVICES" not in found


@pytest.mark.parametrize(("own", "wanted"), [("1", 1), ("3", 3), ("77", 8), ("", 8), ("0", 8), ("2,1", 8)])
def test_a_users_own_smaller_number_of_threads_stays(
    own: str, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.order.jobs._cores", lambda: 16)
    assert environment({"OMP_NUM_THREADS": own}, 2, None)["OMP_NUM_THREADS"] == str(wanted)


def test_gpus_are_taken_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert devices(3) == ["2", "5", "2"]
    assert environment({}, 3, "5")["CUDA_VISIBLE_DEVICES"] == "5"


INTERRUPTED = """
import sys
from pipeline.order.jobs import run_jobs
from pipeline.progress import Quiet
code = "import os, sys, time; open(sys.argv[1] + '/' + str(os.getpid()), 'w').close(); time.sleep(60)"
try:
    run_jobs([(name, 0) for name in "abcd"], [sys.executable, "-c", code, sys.argv[1]], 2, Quiet())
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_and_what_ends_a_process_stop_all_and_begin_no_more(
    tmp_path: Path, number: signal.Signals
) -> None:
    parent = subprocess.Popen([*_python(INTERRUPTED), str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(timeout=30) == 130
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in pids)


def test_a_sweep_with_two_jobs(
    prepared: Layout,
    experiment_of: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # the jobs are no array's tasks
    for name, value in (("ID", "1"), ("COUNT", "2"), ("MIN", "0"), ("STEP", "1")):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    experiment = experiment_of(
        train__epochs=1,
        train__rows=32,
        students={"kd": {}},
        sweep={"kd": {"temperature": [1, 5]}},
        seeds=[0, 1],
    )
    config = prepared.root.parent / "tiny.yaml"
    config.write_text(dump(experiment))
    line = ["distill", str(config), "--out", str(prepared.root), "--jobs", "2", "--rank", "0", "--world", "1"]
    code, said = run_guarded(lambda: app(line)), capsys.readouterr()
    assert code == 0, said
    runs = {str(file.parent.relative_to(prepared.runs)) for file in prepared.runs.rglob("done")}
    scores = {
        name: Run(prepared.run(name, 0)).result()["splits"]["val"]["accuracy"]
        for name in experiment.candidates
    }
    best = max(scores, key=scores.__getitem__)
    assert runs == {"kd,temperature=1/seed-0", "kd,temperature=5/seed-0", f"{best}/seed-1"}
    assert f"[{best} seed 1] 1 runs are done" in said.out
    assert "\n3 runs are done" in said.out
    report = (prepared.report / "report.md").read_text()
    assert "Candidates of the sweeps, val" in report
