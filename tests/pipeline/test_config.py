"""Configs: every problem in one message, overrides, layering of student settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

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


def test_every_seed_once() -> None:
    with pytest.raises(ConfigError, match="seeds: every seed once"):
        parse({**MINIMAL, "seeds": [0, 1, 0]})


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


def test_a_key_that_is_there_twice_is_named_with_its_line(tmp_path: Path) -> None:
    text = Path("configs/toybirds.yaml").read_text()
    twice = tmp_path / "twice.yaml"
    twice.write_text(text + "\nseeds: [3]\n")
    line = text.count("\n") + 2
    with pytest.raises(
        ConfigError, match=rf"twice\.yaml is not valid YAML: seeds is there twice.* line {line},"
    ):
        load(twice)
    twice.write_text(text + "\nsweep: {kd: &x {lr: [1, 2]}, e2kd: {<<: *x, lr: [3, 4]}}\n")
    assert load(twice).sweep["e2kd"] == {"lr": (3, 4)}


@pytest.mark.parametrize("seed", [-1, 2**31])
def test_seeds_that_no_generator_takes(seed: int) -> None:
    with pytest.raises(ConfigError, match="seeds"):
        load(Path("configs/toybirds.yaml"), [f"seeds=[{seed}]"])


def test_resolved_config_round_trips() -> None:
    experiment = parse(MINIMAL)
    again = parse({**yaml.safe_load(dump(experiment)), "train": MINIMAL["train"]})
    assert again == experiment


SWEPT = {
    **MINIMAL,
    "students": {"ce": {"loss": "ce"}, "kd": {}, "e2kd": {"explanation_weight": 10}},
    "sweep": {"kd": {"temperature": [1, 5.0]}, "e2kd": {"augment.hflip": [0.25, 1e-6], "keep": ["last"]}},
}


def test_a_sweep_makes_a_student_of_every_combination_in_its_place() -> None:
    students = {name: one.settings for name, one in parse(SWEPT).candidates.items()}
    assert list(students) == [
        "ce",
        "kd,temperature=1",
        "kd,temperature=5",
        "e2kd,augment.hflip=0.25,keep=last",
        "e2kd,augment.hflip=1e-06,keep=last",
    ]
    assert [student.temperature for student in students.values()] == [5, 1, 5, 5, 5]
    last = students["e2kd,augment.hflip=1e-06,keep=last"]
    assert (last.augment.hflip, last.augment.crop_scale, last.explanation_weight) == (1e-6, (0.5, 1), 10)


def test_the_last_key_changes_fastest_and_values_are_short_but_different() -> None:
    grid = {"temperature": [0.12345671, 0.12345672], "compile": [True, False]}
    students = parse({**SWEPT, "sweep": {"kd": grid}}).candidates
    assert [name for name in students if name.startswith("kd")] == [
        "kd,temperature=0.12345671,compile=True",
        "kd,temperature=0.12345671,compile=False",
        "kd,temperature=0.12345672,compile=True",
        "kd,temperature=0.12345672,compile=False",
    ]


def test_a_dumped_sweep_loads_as_it_was(tmp_path: Path) -> None:
    experiment = parse(SWEPT)
    file = tmp_path / "config.yaml"
    file.write_text(dump(experiment))
    assert load(file) == experiment
    assert list(load(file).candidates) == list(experiment.candidates)
    other = load(file, ["sweep.kd.temperature=[1,9]"])
    assert [name for name in other.candidates if "kd," in name][:2] == [
        "kd,temperature=1",
        "kd,temperature=9",
    ]


def test_a_sweep_is_turned_off(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump(SWEPT))
    off = load(file, ["sweep={}", "evaluate.select=null"])
    assert sorted(off.students) == ["ce", "e2kd", "kd"]
    assert off.sweep == {}
    with pytest.raises(ConfigError, match=r"set evaluate\.select, or remove sweep"):
        load(file, ["evaluate.select=null"])


def test_all_problems_of_sweeps_in_one_message() -> None:
    sweep = {
        "e3kd": {"temperature": [1]},
        "kd": {"temprature": [1, 5], "augment.hflp": [0.5], "augment": [1], "lr.x": [1], "temperature": []},
        "e2kd": {"keep": ["a/b"], "augment.crop_scale": [[0.5, 1.0]], "lr": [0.5, 0.5], "loss": "ce"},
        "ce": {"model": ["a,b"], "lr": [0.5, 0.5]},
    }
    with pytest.raises(ConfigError) as caught:
        parse({**SWEPT, "sweep": sweep, "veiw": {}})
    assert str(caught.value).splitlines()[1:10] == [
        "  sweep.e3kd: no such student; did you mean e2kd?",
        "  sweep.kd.temprature: unknown key; did you mean temperature?",
        "  sweep.kd.augment.hflp: unknown key; did you mean hflip?",
        "  sweep.kd.augment: is a section; sweep one of its keys, augment.enabled",
        "  sweep.kd.lr.x: unknown key",
        "  sweep.kd.temperature: has no values",
        "  sweep.e2kd: write it as key: [value, value], e.g. temperature: [1, 5]",
        "  sweep.ce.model: 'a,b' cannot be swept, values stand in folder names: no / , = and not empty",
        "  sweep.ce.lr: 0.5 stands there twice",
    ]
    assert "veiw: unknown key; did you mean view?" in str(caught.value)


def test_a_students_name_is_a_plain_word() -> None:
    """So that no candidate of a sweep has the name of another student."""
    students = {**SWEPT["students"], "kd,temperature=5": {}}  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"students\.kd,temperature=5"):
        parse({**SWEPT, "students": students})


def test_a_candidates_folder_has_a_name_that_file_systems_take() -> None:
    grid = {"augment.hflip": [0.1], "augment.vflip": [0.1]}
    grid |= {
        f"augment.{key}": [0.123456789012345] for key in ("brightness", "contrast", "saturation", "translate")
    }
    with pytest.raises(ConfigError, match=r"sweep\.kd: the folder kd,.*name of over 200 letters"):
        parse(
            {**SWEPT, "sweep": {"kd": grid | {"lr": [0.001234567890123456], "gamma": [0.1234567890123456]}}}
        )


def test_what_only_the_sweep_says_of_a_student_may_be_missing_in_it() -> None:
    swept = {"kd": {"mode": ["online"], "rand_augment": [5, 9]}}
    candidates = parse({**SWEPT, "students": {"kd": {"mixup": 0.2}}, "sweep": swept}).candidates
    assert [(one.settings.mode, one.settings.rand_augment) for one in candidates.values()] == [
        ("online", 5),
        ("online", 9),
    ]


def test_a_bad_value_is_told_once_where_the_file_has_it() -> None:
    sweep = {"e2kd": {"temperature": [-1, 5], "explanation_weight": [1, 2, "x"]}}
    students = {"e2kd": {"epochs": 0}}
    with pytest.raises(ConfigError) as caught:
        parse({**SWEPT, "students": students, "sweep": sweep})
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()[1:]] == [
        "  students.e2kd.epochs",
        "  sweep.e2kd.temperature",
        "  sweep.e2kd.explanation_weight",
    ]


@pytest.mark.parametrize("seed", [2**31, 99999999999999999999999, -1])
def test_a_seed_is_one_that_torch_takes(seed: int) -> None:
    teacher = {"model": "toy/resnet", "train": {"epochs": 1, "seed": seed}}
    data = {"source": "toybirds", "seed": seed}
    with pytest.raises(ConfigError) as caught:
        parse({**MINIMAL, "seeds": [seed], "teacher": teacher, "data": data})
    for key in ("seeds.0", "teacher.train.seed", "data.seed"):
        assert f"  {key}: input should be " in str(caught.value)
    with pytest.raises(ConfigError, match=r"data\.split_seed: input should be "):
        parse({**MINIMAL, "data": {"source": "folder", "root": "photos", "split_seed": seed}})
    assert parse({**MINIMAL, "seeds": [2**31 - 1]}).seeds == (2**31 - 1,)


@pytest.mark.parametrize("root", ["", " "])
def test_a_data_set_on_disk_has_a_folder(root: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.root: is empty; name the data set's folder"):
        parse({**MINIMAL, "data": {"source": "folder", "root": root}})
    data = {"source": "waterbirds", "root": ".", "cub": root}
    with pytest.raises(ConfigError, match=r"data\.cub: is empty"):
        parse({**MINIMAL, "data": data})


def with_prior(**prior: object) -> dict[str, object]:
    return {**MINIMAL, "students": {"s": {"loss": "ce", "mode": "online", "prior": prior}}}


@pytest.mark.parametrize(
    ("key", "of", "other"),
    [("pool", "catkd", "at"), ("negatives", "crd", "reviewkd"), ("ramp", "reviewkd", "crd")],
)
def test_a_setting_of_another_prior_method_is_refused(key: str, of: str, other: str) -> None:
    assert getattr(parse(with_prior(method=of, **{key: 7})).students["s"].prior, key) == 7
    with pytest.raises(
        ConfigError, match=rf"students\.s\.prior: {key} is a setting of {of} and does nothing with {other}"
    ):
        parse(with_prior(method=other, **{key: 7}))


@pytest.mark.parametrize("method", ["at", "reviewkd", "catkd", "crd"])
def test_a_dumped_prior_method_loads_again_and_can_be_swept(method: str) -> None:
    """A dumped config names the defaults of every method."""
    experiment = parse(
        {**with_prior(method=method), "evaluate": {"select": "val"}, "sweep": {"s": {"prior.weight": [1, 5]}}}
    )
    settings = [candidate.settings for candidate in experiment.candidates.values()]
    assert [student.prior.weight for student in settings if student.prior] == [1, 5]
    again = parse(yaml.safe_load(dump(experiment)))
    assert again.students == experiment.students
