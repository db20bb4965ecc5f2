"""Configs: every problem in one message, overrides, layering of student settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from artifacts.errors import ConfigError
from pipeline.config import dump, load, parse

CONFIGS = sorted(Path("configs").glob("**/*.yaml"))

MINIMAL = {
    "data": {"source": "toybirds"},
    "view": {"size": 48},
    "teacher": {"model": "toy/resnet", "train": {"epochs": 1}},
    "train": {"model": "toy/resnet", "width": 8, "temperature": 5, "augment": {"hflip": 0.25}},
    "students": {"kd": {}, "e2kd": {"explanation_weight": 10, "augment": {"crop_scale": None}}},
    "augment": {"crop_scale": [0.5, 1.0]},
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    assert load(path).students


def test_students_inherit_train_and_augment() -> None:
    students = parse(MINIMAL).students
    assert students["kd"].temperature == students["e2kd"].temperature == 5
    assert students["kd"].augment.crop_scale == (0.5, 1.0)
    assert students["kd"].augment.hflip == students["e2kd"].augment.hflip == 0.25
    assert students["e2kd"].augment.crop_scale is None
    assert parse(MINIMAL).teacher.train.augment.crop_scale == (0.5, 1.0)


def test_all_problems_in_one_message_with_suggestions() -> None:
    bad = {
        **MINIMAL,
        "veiw": {},
        "view": {"size": 4},
        "store": {"maps": "fp61"},
        "train": {**MINIMAL["train"], "temprature": 3},
        "students": {"kd": {"mode": "onlin"}, "e2kd": {"epochs": 0}},
    }
    with pytest.raises(ConfigError) as caught:
        parse(bad)
    text = str(caught.value)
    for part in (
        "6 problems",
        "veiw: unknown key; did you mean view?",
        "view.size",
        "store.maps: 'fp61' is unknown; did you mean fp16?",
        "train.temprature: unknown key; did you mean temperature?",
        "students.kd.mode: 'onlin' is unknown; did you mean online?",
        "students.e2kd.epochs",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "write it as key.sub=value"),
        ("data.source=toybird", "did you mean toybirds?"),
        ("teacher.weights=x.pt", "not both"),
        ("train.lr=fast", "train.lr|students.kd.lr"),
        ("view.size.deep=1", "is a value, not a section"),
        ("students={}", "students"),
        ("seeds=[]", "seeds"),
        ("augment.crop_scale=[0.9,0.2]", "crop_scale"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(Path("configs/toybirds.yaml").read_text())
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        load(file, [override])


def test_overrides_reach_every_student() -> None:
    experiment = load(Path("configs/toybirds.yaml"), ["train.epochs=3", "students.kd.epochs=2", "seeds=[7]"])
    assert experiment.students["kd"].epochs == 2
    assert {s.epochs for name, s in experiment.students.items() if name != "kd"} == {3}
    assert experiment.seeds == (7,)


def test_home_folders_are_found() -> None:
    experiment = load(Path("configs/photos.yaml"), ["data.root=~/photos"])
    assert experiment.data.root == Path.home() / "photos"  # type: ignore[union-attr]


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        load(Path("configs/toybird.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(broken)
    broken.write_text("- 1")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load(broken)


def test_resolved_config_round_trips() -> None:
    import yaml

    experiment = parse(MINIMAL)
    again = parse({**yaml.safe_load(dump(experiment)), "train": MINIMAL["train"]})
    assert again == experiment
