"""SUN397 as published: class folders by first letter, ClassName.txt and the lists of ten partitions."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import Sun397
from pipeline.data import open_source, split_names

CLASSES = ["/a/abbey", "/a/apartment_building/outdoor", "/b/bar"]
TRAIN = [f"{name}/sun_{number}.jpg" for name in CLASSES for number in range(3)]
TEST = [f"{name}/sun_{number}.jpg" for name in CLASSES for number in range(3, 5)]


def lists(folder: Path, number: int, train: list[str], test: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"Training_{number:02d}.txt").write_text("\r\n".join(train) + "\r\n")
    (folder / f"Testing_{number:02d}.txt").write_text("\n".join(test) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for path in [*TRAIN, *TEST]:
        file = tmp_path / path[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), "teal").save(file)
    (tmp_path / "ClassName.txt").write_text("\n".join(CLASSES) + "\n\n")
    lists(tmp_path, 1, TRAIN, TEST)
    return tmp_path


def data(root: Path, **settings: object) -> Sun397:
    return Sun397.model_validate({"source": "sun397", "root": root, **settings})


def found(config: Sun397, split: str) -> dict[str | None, object]:
    source = open_source(config, split)
    raws = (source.raw(row) for row in range(len(source)))
    return {raw.source: raw.label for raw in raws}


def test_splits_and_classes(root: Path) -> None:
    assert split_names(data(root)) == ["train", "test"]
    assert open_source(data(root), "train").classes == ["abbey", "apartment_building/outdoor", "bar"]
    assert found(data(root), "train") == {path[1:]: k // 3 for k, path in enumerate(TRAIN)}
    assert found(data(root), "test") == {path[1:]: k // 2 for k, path in enumerate(TEST)}


@pytest.mark.parametrize("place", ["Partitions", "../Partitions"])
def test_another_partition_in_a_folder_of_its_own(root: Path, place: str) -> None:
    inner = root / "SUN397"
    for name in ("a", "b", "ClassName.txt"):
        inner.mkdir(exist_ok=True)
        (root / name).rename(inner / name)
    lists(inner / place, 2, TEST, TRAIN)
    assert set(found(data(inner, partition=2), "train")) == {path[1:] for path in TEST}


def test_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nowhere/ClassName\.txt .*set data\.root to SUN397/"):
        open_source(data(tmp_path / "nowhere"), "train")


def test_a_missing_list_is_named(root: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*Training_03\.txt .*set data\.root to SUN397/"):
        open_source(data(root, partition=3), "train")


def test_an_empty_class_list(root: Path) -> None:
    (root / "ClassName.txt").write_text("\n")
    with pytest.raises(DataError, match=r"ClassName\.txt is empty"):
        open_source(data(root), "train")


def test_a_missing_image_is_named_with_its_list(root: Path) -> None:
    (root / TEST[1][1:]).unlink()
    with pytest.raises(
        DataError, match=r"Testing_01\.txt names .*a/abbey/sun_4\.jpg, which cannot be read \(No such"
    ):
        open_source(data(root), "test")


@pytest.mark.parametrize("line", ["/z/zoo/sun_0.jpg", "/../outside.jpg"])
def test_an_image_of_no_class(root: Path, line: str) -> None:
    lists(root, 1, [*TRAIN, line], TEST)
    with pytest.raises(DataError, match=r"Training_01\.txt: .* is of the class .*not in ClassName\.txt"):
        open_source(data(root), "train")


@pytest.mark.parametrize("file", ["Training_01.txt", "ClassName.txt"])
def test_a_line_that_is_there_twice(root: Path, file: str) -> None:
    first = (root / file).read_text().splitlines()[0]
    (root / file).write_text((root / file).read_text() + first + "\n")
    with pytest.raises(DataError, match=rf"{file} names {first} twice; remove one line"):
        open_source(data(root), "train")


def test_an_image_listed_twice_in_two_ways(root: Path) -> None:
    lists(root, 1, [*TRAIN, TRAIN[0][1:]], TEST)
    with pytest.raises(
        DataError, match=r"split train of .* lists a/abbey/sun_0\.jpg twice; remove one of the"
    ):
        open_source(data(root), "train")


def test_an_unreadable_image_is_named(root: Path) -> None:
    file = root / TEST[0][1:]
    file.write_bytes(file.read_bytes()[:60])
    source = open_source(data(root), "test")
    row = next(row for row in range(len(source)) if source.key(row) == "a--abbey--sun_3")
    with pytest.raises(DataError, match=r"a/abbey/sun_3\.jpg.*remove or replace it"):
        source.raw(row)
