"""Sweeps: which candidate counts, in which order runs are trained, and many processes at the same runs."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from lightning_fabric import Fabric

from artifacts.errors import ConfigError
from cli.main import app, run_guarded
from pipeline.config import Experiment, dump
from pipeline.order import prepare, runs
from pipeline.progress import Quiet
from pipeline.report.results import Results
from pipeline.report.tables import candidate_table
from pipeline.sharing import Part, locked
from pipeline.training.choice import Choice, by_method, choices
from pipeline.training.run import Run
from pipeline.workspace import Layout, Workspace

Tiny = Callable[..., Experiment]
STUDENTS = {"ce": {"loss": "ce"}, "kd": {}, "e2kd": {"explanation_weight": 5}}
T1, T5, T9 = "kd,temperature=1", "kd,temperature=5", "kd,temperature=9"


class Lines(Quiet):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture
def swept(experiment_of: Tiny) -> Experiment:
    return experiment_of(
        students=copy.deepcopy(STUDENTS), sweep={"kd": {"temperature": [1, 5, 9]}}, seeds=[3, 4]
    )


def _finish(layout: Layout, student: str, seed: int, **val: float | None) -> None:
    run = Run(layout.run(student, seed))
    run.finish({"student": student, "seed": seed, "splits": {"val": val, "test-ood": {"accuracy": 1.0}}})


def test_methods_group_a_sweeps_candidates(swept: Experiment) -> None:
    assert _names(swept) == {"ce": ["ce"], "kd": [T1, T5, T9], "e2kd": ["e2kd"]}
    kd = by_method(swept)["kd"]
    assert [candidate.settings.temperature for candidate in kd] == [1, 5, 9]
    assert [candidate.overrides for candidate in kd] == [{"temperature": value} for value in (1, 5, 9)]


def _names(experiment: Experiment) -> dict[str, list[str]]:
    return {name: [one.name for one in candidates] for name, candidates in by_method(experiment).items()}


def test_without_its_sweep_every_student_is_a_method(swept: Experiment) -> None:
    plain = Experiment.model_validate({**dict(swept), "sweep": {}})
    assert _names(plain) == {name: [name] for name in ("ce", "kd", "e2kd")}


def test_the_best_of_the_first_seed_on_the_selection_split(swept: Experiment, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for student, accuracy in ((T1, 0.5), (T5, 0.8), (T9, 0.7)):
        assert choices(Workspace(swept, layout))["kd"].chosen is None
        _finish(layout, student, 3, accuracy=accuracy, agreement=1 - accuracy)
    _finish(layout, T9, 4, accuracy=1.0)  # another seed, which has no say
    assert choices(Workspace(swept, layout)) == {
        "ce": Choice("ce", {"ce": None}, "ce"),
        "kd": Choice("kd", {T1: 0.5, T5: 0.8, T9: 0.7}, T5),
        "e2kd": Choice("e2kd", {"e2kd": None}, "e2kd"),
    }


@pytest.mark.parametrize(
    ("select_by", "scores", "best"),
    [
        (None, [{"f1": 0.1, "accuracy": 0.9}, {"f1": 0.2, "accuracy": 0.8}, {"f1": 0.1}], T5),
        (None, [{"agreement": 0.1}, {"agreement": 0.2}, {"agreement": 0.3}], T9),
        ("epg", [{"f1": 1, "epg": 0.2}, {"f1": 0, "epg": 0.3}, {"f1": 1, "epg": 0.1}], T5),
        (None, [{"accuracy": 0.5}, {"accuracy": 0.5}, {"accuracy": 0.4}], T1),
        (None, [{"accuracy": None}, {"accuracy": 0.0}, {"accuracy": None}], T5),
        ("epg", [{"epg": -0.5}, {"epg": -0.1}, {"epg": None}], T5),
    ],
    ids=["f1-first", "agreement-last", "select_by", "tie", "null", "negative"],
)
def test_what_chooses(
    swept: Experiment,
    tmp_path: Path,
    select_by: str | None,
    scores: list[dict[str, float | None]],
    best: str,
) -> None:
    evaluate = swept.evaluate.model_copy(update={"select_by": select_by})
    for student, values in zip((T1, T5, T9), scores, strict=True):
        _finish(Layout(tmp_path), student, 3, **values)
    experiment = swept.model_copy(update={"evaluate": evaluate})
    assert choices(Workspace(experiment, Layout(tmp_path)))["kd"].chosen == best


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Stage 2 without stage 1 and training: a run's accuracy is its temperature's place; returns the runs in order."""
    order: list[tuple[str, int]] = []

    def distill(workspace: Workspace, name: str, seed: int) -> None:
        order.append((name, seed))
        if name != "e2kd":
            _finish(workspace.layout, name, seed, accuracy={T5: 0.9}.get(name, 0.1))

    monkeypatch.setattr(runs, "prepare_stores", lambda *_, **__: True)
    monkeypatch.setattr(runs, "distill", distill)
    return order


def _distill(
    experiment: Experiment, root: Path, fabric: Fabric, students: list[str], seeds: list[int], part: Part
) -> list[str]:
    lines = Lines()
    runs.distill_all(Workspace(experiment, Layout(root), fabric, lines), students, seeds, part)
    return lines.said


def test_only_the_chosen_candidate_gets_the_other_seeds(
    swept: Experiment, tmp_path: Path, fabric: Fabric, trained: list[tuple[str, int]]
) -> None:
    said = _distill(swept, tmp_path, fabric, list(swept.candidates), [3, 4], Part())
    first = [(name, 3) for name in ("ce", T1, T5, T9, "e2kd")]
    assert trained == [*first, ("ce", 4), ("e2kd", 4), (T5, 4)]
    assert said[-1].startswith("8 runs are done")


def test_an_undecided_sweep_asks_for_another_start(
    swept: Experiment, tmp_path: Path, fabric: Fabric, trained: list[tuple[str, int]]
) -> None:
    said = _distill(swept, tmp_path, fabric, [T1, T5], [3, 4], Part())
    assert trained == [(T1, 3), (T5, 3)]
    assert said == [
        "the sweep of kd is not decided yet: run the same command again when all its runs with seed 3 are done"
    ]


def test_parts_share_the_runs_and_the_second_start_completes_them(
    swept: Experiment, tmp_path: Path, fabric: Fabric, trained: list[tuple[str, int]]
) -> None:
    for _ in range(2):
        for rank in range(3):
            _distill(swept, tmp_path, fabric, list(swept.candidates), [3, 4], Part(rank, 3))
    everything = {(name, 3) for name in swept.candidates} | {(name, 4) for name in ("ce", T5, "e2kd")}
    assert set(trained) == everything


@pytest.mark.usefixtures("trained")
def test_a_sweep_that_no_score_decides_is_a_sentence(
    swept: Experiment, tmp_path: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    for student in (T1, T5, T9):
        _finish(Layout(tmp_path), student, 3, epg=0.5)
    monkeypatch.setattr(runs, "distill", lambda *_: None)
    with pytest.raises(ConfigError, match=r"sweep\.kd: no run has f1 or accuracy or agreement on val"):
        _distill(swept, tmp_path, fabric, [T1, T5, T9], [3, 4], Part())


def test_a_later_seed_alone_says_which_seed_decides(
    swept: Experiment, tmp_path: Path, fabric: Fabric, trained: list[tuple[str, int]]
) -> None:
    said = _distill(swept, tmp_path, fabric, [T1, T5, T9], [4], Part())
    assert trained == []
    assert "when all its runs with seed 3 are done" in said[-1]


@pytest.mark.parametrize("first", [T1, T5])
def test_no_candidate_stands_for_a_sweep_that_is_not_decided(
    swept: Experiment, tmp_path: Path, first: str
) -> None:
    """Neither in the report nor, where nothing else is finished, as a failure of the task that wrote none."""
    layout = Layout(tmp_path)
    _finish(layout, first, 3, accuracy=0.5)
    results = Results(Workspace(swept, layout))
    assert results.methods == []
    assert [each.student for each in results.all_methods] == ["ce", "", "e2kd"]
    others = [name for name in (T1, T5, T9) if name != first]
    assert [line for line in results.missing() if "kd," in line] == [f"{name} seed 3" for name in others]
    table = candidate_table(results)
    assert table is not None
    assert {row[1].text: (row[2].text, row[3].text) for row in table.rows} == {
        **{name.partition(",")[2]: ("not finished", "") for name in others},
        first.partition(",")[2]: ("50.0", ""),
    }


def test_scores_are_of_the_first_seed(swept: Experiment, tmp_path: Path) -> None:
    _finish(Layout(tmp_path), T5, 3, accuracy=0.5)
    _finish(Layout(tmp_path), T1, 4, accuracy=0.9)
    of_method = choices(Workspace(swept, Layout(tmp_path)))
    assert {name: choice.scores for name, choice in of_method.items()} == {
        "ce": {"ce": None},
        "kd": {T1: None, T5: 0.5, T9: None},
        "e2kd": {"e2kd": None},
    }


def test_a_locked_run_is_left_to_its_owner(
    swept: Experiment, tmp_path: Path, fabric: Fabric, trained: list[tuple[str, int]]
) -> None:
    with Run(Layout(tmp_path).run("ce", 3)).lock(fabric) as mine:
        assert mine
        said = _distill(swept, tmp_path, fabric, ["ce", "e2kd"], [3], Part())
    assert trained == [("e2kd", 3)]
    assert said == [
        "ce seed 3 is being trained by another process; left to it",
        "others are working on: ce seed 3",
    ]
    _distill(swept, tmp_path, fabric, ["ce"], [3], Part())
    assert trained[-1] == ("ce", 3)


def test_a_lock_ends_with_its_block(tmp_path: Path, fabric: Fabric) -> None:
    for _ in range(2):
        with (
            locked(tmp_path / "new" / "lock", fabric) as mine,
            locked(tmp_path / "new" / "lock", fabric) as second,
        ):
            assert (mine, second) == (True, False)


HOLDER = """
import multiprocessing, sys, time
from pathlib import Path
from lightning_fabric import Fabric
from pipeline.sharing import locked
with locked(Path(sys.argv[1]), Fabric(accelerator="cpu", devices=1)) as mine:
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_processs_lock_vanishes_though_its_workers_live(tmp_path: Path, fabric: Fabric) -> None:
    file = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    worker = int(holder.stdout.readline())
    try:
        with locked(file, fabric) as mine:
            assert not mine
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # is there
        with locked(file, fabric) as mine:
            assert mine
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


@pytest.mark.parametrize("begun", ["state.pt", "done"])
def test_settings_stick_from_the_first_checkpoint_on(tmp_path: Path, begun: str) -> None:
    run = Run(tmp_path / "run")
    run.open({"lr": 1})
    run.open({"lr": 2})  # a mistyped setting that was refused before the first step
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"lr": 2}
    run.write(begun, b"")
    run.open({"lr": 2})
    with pytest.raises(ConfigError, match="lr: run 2, config 3"):
        run.open({"lr": 3})


def _config(experiment: Experiment, folder: Path) -> Path:
    file = folder / "tiny.yaml"
    file.write_text(dump(experiment))
    return file


def test_two_processes_at_the_same_run_end_with_one_result(prepared: Layout, experiment_of: Tiny) -> None:
    experiment = experiment_of(train__epochs=2, train__rows=32, students={"kd": {}})
    config = _config(experiment, prepared.root.parent)
    line = [
        sys.executable,
        "-P",
        "-m",
        "cli",
        "distill",
        str(config),
        "--out",
        str(prepared.root),
        "--no-report",
    ]
    pair = [
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    run = Run(prepared.run("kd", 0))
    assert run.done
    assert [line["epoch"] for line in run.history()] == [0, 1]
    assert set(run.result()["splits"]) == {"val", "test-ood"}
    assert all("1 runs are done" in text or "others are working on: kd seed 0" in text for text in said)
    assert not list(prepared.root.rglob("*.partial"))


def test_a_task_that_finds_nothing_to_do_ends_well(
    prepared: Layout, experiment_of: Tiny, fabric: Fabric, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = experiment_of(students={"kd": {}}, sweep={"kd": {"temperature": [1, 5]}}, seeds=[0, 1])
    line = ["distill", str(_config(experiment, prepared.root.parent)), "--out", str(prepared.root)]
    _finish(prepared, T5, 1, accuracy=0.5)  # finished, but no row of a report yet
    with Run(prepared.run(T5, 0)).lock(fabric):
        assert run_guarded(lambda: app([*line, "--rank", "1", "--world", "2"])) == 0
    said = capsys.readouterr()
    assert f"others are working on: {T5} seed 0\nthe sweep of kd is not decided yet" in said.out
    assert said.err == ""


def test_stage_1_is_one_processs_at_a_time(
    swept: Experiment, tmp_path: Path, fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_POLL_SECONDS", 0.01)
    lines, holder = Lines(), locked(tmp_path / "stage-1.lock", fabric)
    holder.__enter__()
    monkeypatch.setattr(prepare.time, "sleep", lambda seconds: holder.__exit__(None, None, None))
    workspace = Workspace(swept, Layout(tmp_path), fabric, lines)
    with prepare._alone(workspace), locked(tmp_path / "stage-1.lock", fabric) as second:
        assert not second
    assert [line.split(" in ")[0] for line in lines.said] == ["another process packs, teaches or precomputes"]
