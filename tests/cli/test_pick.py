"""Which students and seeds `--student` and `--seed` mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.errors import ConfigError
from cli.main import _pick, _pick_students
from pipeline.config import load

T1, T5 = "kd,temperature=1", "kd,temperature=5"
EXPERIMENT = load(Path("configs/toybirds.yaml"), ["sweep={kd: {temperature: [1, 5]}}"])


@pytest.mark.parametrize(
    ("wanted", "students"),
    [
        (["kd"], [T1, T5]),
        ([T5], [T5]),
        ([T5, "kd", "e2kd"], [T5, T1, "e2kd"]),
        (None, list(EXPERIMENT.candidates)),
        ([], list(EXPERIMENT.candidates)),
    ],
    ids=["method", "candidate", "both", "none", "empty"],
)
def test_a_methods_name_means_all_its_candidates(wanted: list[str] | None, students: list[str]) -> None:
    assert _pick_students(EXPERIMENT, wanted) == students


@pytest.mark.parametrize("wanted", ["kdd", "kd,temperature=2"])
def test_an_unknown_student_is_answered_with_those_there_are(wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"no student {wanted} in the config; it has .*{T5}"):
        _pick_students(EXPERIMENT, [wanted])


def test_an_unknown_seed() -> None:
    assert _pick("seed", [1], [0, 1]) == [1]
    with pytest.raises(ConfigError, match="no seed 7 in the config; it has 0, 1"):
        _pick("seed", [7], [0, 1])
