"""Every stage's command, with and without what it needs: what it prints, what it leaves, its exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cli import doctor

STUDENTS = ("kd", "e2kd")


def results(root: Path) -> dict[str, Any]:
    return {name: json.loads((root / f"runs/{name}/seed-0/result.json").read_text()) for name in STUDENTS}


# ---- teach


def test_teach_packs_and_trains_the_teacher(e2kd: Any, tiny: Path, tmp_path: Path) -> None:
    ended = e2kd("teach", tiny, "--out", tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("pack train: 32/32 images in ")
    assert "\nteach: 1/1 steps in " in ended.out
    assert ended.out.endswith(f"\ntaught: {tmp_path / 'out/teacher'}\n")
    assert (tmp_path / "out/teacher/done").exists()
    assert not (tmp_path / "out/stores").exists()


def test_teach_does_nothing_twice(e2kd: Any, tiny: Path, stored: Path) -> None:
    ended = e2kd("teach", tiny, "--out", stored)
    assert (ended.code, ended.out) == (0, f"taught: {stored / 'teacher'}\n")


def test_teach_with_other_settings_is_refused(e2kd: Any, tiny: Path, stored: Path) -> None:
    ended = e2kd("teach", tiny, "--out", stored, "--set", "teacher.train.lr=0.5")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith(f"e2kd: {stored / 'teacher'} was made with other settings:\n")
    assert "\n  teacher.train.lr: run 0.003, config 0.5\n" in ended.err


# ---- distill


def test_distill_with_what_stage_1_made_trains_and_reports(e2kd: Any, tiny: Path, stored: Path) -> None:
    ended = e2kd("distill", tiny, "--out", stored, "--student", "kd")
    assert (ended.code, ended.err) == (0, "")
    assert "precompute" not in ended.out
    assert "kd seed 0: 2/2 steps in " in ended.out
    assert f"\n1 runs are done in {stored / 'runs'}\n" in ended.out
    assert ended.out.endswith(f"\nreport: {stored}/report/report.md\npage: {stored}/report/report.html\n")


# ---- evaluate


def test_evaluate_without_a_run_says_what_to_do(e2kd: Any, tiny: Path, stored: Path) -> None:
    said = e2kd.refused("evaluate", tiny, "--out", stored)
    assert said == f"no finished run in {stored}/runs; run: e2kd distill CONFIG"


def test_evaluate_scores_every_run_again(e2kd: Any, tiny: Path, finished: Path) -> None:
    before = results(finished)
    ended = e2kd("evaluate", tiny, "--out", finished, "--set", "evaluate.splits=[test-ood,val]")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("evaluated kd seed 0\nevaluated e2kd seed 0\n")
    assert "**test-ood**" in ended.out
    assert "**val**" in ended.out
    after = results(finished)
    for name in STUDENTS:
        assert after[name]["splits"]["test-ood"] == before[name]["splits"]["test-ood"]
        assert after[name]["seconds"] == before[name]["seconds"]


def test_evaluate_with_other_settings_of_a_run_is_refused(e2kd: Any, tiny: Path, finished: Path) -> None:
    ended = e2kd("evaluate", tiny, "--out", finished, "--set", "train.lr=0.5")
    assert ended.code == 2
    assert (
        f"{finished}/runs/kd/seed-0 was made with other settings:\n  settings.lr: run 0.003, config 0.5\n"
        in (ended.err)
    )


def test_evaluate_without_a_runs_weights_says_which(e2kd: Any, tiny: Path, finished: Path) -> None:
    for name in ("last", "best"):
        (finished / f"runs/kd/seed-0/{name}.safetensors").unlink(missing_ok=True)
    said = e2kd.refused("evaluate", tiny, "--out", finished)
    assert f"{finished}/runs/kd/seed-0" in said
    assert "delete the run and train it again" in said


# ---- report


def test_report_without_a_run_says_what_to_do(e2kd: Any, tiny: Path, stored: Path) -> None:
    said = e2kd.refused("report", tiny, "--out", stored)
    assert said == f"no finished run in {stored}/runs; run: e2kd distill CONFIG"


def test_report_is_a_table_and_two_files(e2kd: Any, tiny: Path, finished: Path) -> None:
    ended = e2kd("report", tiny, "--out", finished)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0] == "**test-ood**"
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == [
        "method",
        "teacher",
        *STUDENTS,
    ]
    assert lines[-2:] == [f"report: {finished}/report/report.md", f"page: {finished}/report/report.html"]
    assert "test-ood" in (finished / "report/report.md").read_text()
    assert (finished / "report/report.html").read_text().startswith("<!doctype html>")


def test_report_takes_an_experiments_folder_and_draws_nothing_twice(e2kd: Any, finished: Path) -> None:
    assert e2kd("report", finished).code == 0
    drawn = (finished / "report/report.html").stat().st_mtime_ns
    ended = e2kd("report", finished)
    assert (ended.code, ended.out.splitlines()[0]) == (0, "**test-ood**")
    assert (finished / "report/report.html").stat().st_mtime_ns == drawn
    (finished / "report/report.md").write_bytes(b"\xff damaged")
    assert e2kd("report", finished).code == 0
    assert (finished / "report/report.html").stat().st_mtime_ns > drawn


def test_report_of_a_folder_that_is_no_experiment(e2kd: Any, tmp_path: Path) -> None:
    assert e2kd.refused("report", tmp_path).startswith(f"no config file {tmp_path}/config.yaml")


@pytest.mark.parametrize("command", ["pack", "teach", "precompute", "distill", "evaluate", "report"])
def test_every_stage_shows_the_resolved_config_and_stops(
    e2kd: Any, tiny: Path, tmp_path: Path, command: str
) -> None:
    ended = e2kd(command, tiny, "--out", tmp_path / "out", "--dry-run", "--set", "train.lr=0.25")
    assert (ended.code, ended.err) == (0, "")
    assert "lr: 0.25" in ended.out
    assert not (tmp_path / "out").exists()


# ---- doctor


def test_doctor_says_what_is_here(e2kd: Any) -> None:
    ended = e2kd("doctor")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"python      {sys.version.split()[0]} on ")
    assert [line.split()[0] for line in lines[1 : 1 + len(doctor.PACKAGES)]] == list(doctor.PACKAGES)
    assert any(line.startswith("free disk   ") and line.endswith(" GiB here") for line in lines)
    for name in doctor.CHECKS:
        assert f"runs        {name} on cpu" in lines
    assert lines[-1] == "all kernels run"


def test_doctor_says_what_does_not_run(e2kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(device: str) -> None:
        raise RuntimeError(f"no such operator on {device}")

    monkeypatch.setitem(doctor.CHECKS, "paired augmentation", lacks)
    monkeypatch.setattr(doctor, "PACKAGES", ("e2kd", "no-such-package"))
    ended = e2kd("doctor")
    assert (ended.code, ended.err) == (2, "")
    assert "no-such-package not installed" in ended.out
    assert "\nFAILS       paired augmentation on cpu: no such operator on cpu\n" in ended.out
    assert ended.out.endswith("\n1 kernels fail: reinstall with make clean setup\n")


def test_a_bug_in_a_check_of_doctor_is_no_finding(e2kd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.CHECKS, "paired augmentation", lambda device: device.no_such_attribute)
    with pytest.raises(AttributeError):
        e2kd("doctor")
