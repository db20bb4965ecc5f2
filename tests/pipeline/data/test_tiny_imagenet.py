"""Tiny-ImageNet as published: a box for every image, the published val as split test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from artifacts.errors import DataError
from pipeline.config import ViewConfig
from pipeline.config.data import TinyImageNet
from pipeline.data import Source, open_source, split_names
from pipeline.data.view import CanonicalView

WNIDS = ["n03000000", "n01000000", "n02000000"]  # the published list is not sorted
BOX = (3, 5, 20, 41)


def picture(path: Path, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (64, 64), 90 if mode == "L" else (10, 200, 60)).save(path, "JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    box = "\t".join(map(str, BOX))
    (tmp_path / "wnids.txt").write_text("\n".join(WNIDS) + "\n")
    (tmp_path / "words.txt").write_text("n01000000\tgoldfish, Carassius auratus\nn03000000\tlemon\n")
    for wnid in WNIDS:
        for number in range(3):
            picture(tmp_path / f"train/{wnid}/images/{wnid}_{number}.JPEG", "L" if number == 1 else "RGB")
        rows = "".join(f"{wnid}_{number}.JPEG\t{box}\n" for number in range(3))
        (tmp_path / f"train/{wnid}/{wnid}_boxes.txt").write_text(rows)
    for number in range(6):
        picture(tmp_path / f"val/images/val_{number}.JPEG")
    rows = "".join(f"val_{number}.JPEG\t{WNIDS[number % 3]}\t0\t0\t63\t63\n" for number in range(6))
    (tmp_path / "val/val_annotations.txt").write_text(rows)
    return tmp_path


def data(root: Path, **settings: object) -> TinyImageNet:
    return TinyImageNet.model_validate({"source": "tiny-imagenet", "root": root, **settings})


def labels(source: Source) -> dict[str | None, object]:
    raws = (source.raw(row) for row in range(len(source)))
    return {raw.source: raw.label for raw in raws}


def test_splits_classes_and_labels(root: Path) -> None:
    assert split_names(data(root)) == ["train", "test"]
    train, test = open_source(data(root), "train"), open_source(data(root), "test")
    assert train.classes == test.classes == ["lemon", "goldfish", "n02000000"]
    assert labels(train) == {
        f"train/{wnid}/images/{wnid}_{i}.JPEG": k for k, wnid in enumerate(WNIDS) for i in range(3)
    }
    assert labels(test) == {f"val/images/val_{i}.JPEG": i % 3 for i in range(6)}
    assert {train.raw(row).image.mode for row in range(9)} == {"RGB"}


def test_boxes_include_their_last_pixel(root: Path) -> None:
    raw = open_source(data(root), "train").raw(0)
    assert raw.boxes is not None
    assert raw.boxes.tolist() == [[raw.label, 3, 5, 21, 42]]
    view = CanonicalView.of(ViewConfig(size=32))
    whole = view.apply(open_source(data(root), "test", 32).raw(0)).boxes
    assert whole is not None
    np.testing.assert_array_equal(whole[:, 1:], [[0, 0, 32, 32]])


def test_a_box_of_one_column(root: Path) -> None:
    file = root / "val/val_annotations.txt"
    file.write_text(f"val_0.JPEG\t{WNIDS[0]}\t63\t20\t63\t30\n")
    boxes = open_source(data(root), "test").raw(0).boxes
    assert boxes is not None
    assert boxes.tolist() == [[0, 63, 20, 64, 31]]


def test_the_first_classes_only(root: Path) -> None:
    config = data(root, classes=2)
    train, test = open_source(config, "train"), open_source(config, "test")
    assert train.classes == ["lemon", "goldfish"]
    assert (len(train), len(test)) == (6, 4)
    assert set(labels(test).values()) == {0, 1}


def test_class_names_without_words(root: Path) -> None:
    (root / "words.txt").unlink()
    assert open_source(data(root), "train").classes == WNIDS


def test_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"cannot read .*nowhere/wnids\.txt .*set data\.root to tiny-imagenet"
    ):
        open_source(data(tmp_path / "nowhere"), "train")


def test_more_classes_than_there_are(root: Path) -> None:
    with pytest.raises(DataError, match=r"wnids\.txt has 3 classes, data\.classes asks for 4"):
        open_source(data(root, classes=4), "train")


def test_missing_files_are_named(root: Path) -> None:
    (root / f"train/{WNIDS[1]}/images/{WNIDS[1]}_2.JPEG").unlink()
    with pytest.raises(
        DataError, match=r"n01000000_boxes\.txt names .*n01000000_2\.JPEG, which cannot be read"
    ):
        open_source(data(root), "train")
    (root / f"train/{WNIDS[0]}/{WNIDS[0]}_boxes.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*n03000000_boxes\.txt"):
        open_source(data(root), "train")
    (root / "val/val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*val_annotations\.txt"):
        open_source(data(root), "test")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("val_0.JPEG\tn09999999\t0\t0\t63\t63", r"val_0\.JPEG has the class n09999999, .*not in wnids\.txt"),
        ("val_0.JPEG\tn03000000\t0\t0\t63", "line 1: 5 fields instead of 6"),
        ("val_0.JPEG\tn03000000\t0\tx\t63\t63", r"the box of val_0\.JPEG is not four numbers: 0 x 63 63"),
        ("val_0.JPEG\tn03000000\t40\t0\t30\t63", r"the box of val_0\.JPEG is empty: 40 0 30 63"),
        ("val_0.JPEG\tn03000000\t0\t0\tnan\t63", r"the box of val_0\.JPEG is empty: 0 0 nan 63"),
        ("val_9.JPEG\tn03000000\t0\t0\t63\t63", r"names .*val_9\.JPEG, which cannot be read \(No such"),
    ],
)
def test_wrong_annotations(root: Path, row: str, said: str) -> None:
    (root / "val/val_annotations.txt").write_text(row + "\n")
    with pytest.raises(DataError, match=rf"val_annotations\.txt.*{said}"):
        open_source(data(root), "test")


@pytest.mark.parametrize("box", ["0 0 64 63", "0 5 63 100", "200 200 300 300", "0 0 inf 63"])
def test_a_box_outside_its_image(root: Path, box: str) -> None:
    row = "\t".join(["val_0.JPEG", WNIDS[0], *box.split()])
    (root / "val/val_annotations.txt").write_text(row + "\n")
    with pytest.raises(
        DataError, match=rf"val_0\.JPEG has 64 x 64 px, but its box {box} leaves them; correct"
    ):
        open_source(data(root), "test").raw(0)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("wnids.txt", "n02000000 twice"),
        ("val/val_annotations.txt", r"val_5\.JPEG twice"),
        (f"train/{WNIDS[0]}/{WNIDS[0]}_boxes.txt", r"n03000000_2\.JPEG twice"),
    ],
)
def test_a_line_that_is_there_twice(root: Path, file: str, said: str) -> None:
    lines = (root / file).read_text().splitlines()
    (root / file).write_text("\n".join([*lines, lines[-1]]) + "\n")
    with pytest.raises(DataError, match=rf"{Path(file).name} names {said}; remove one line"):
        open_source(data(root), "test" if "val" in file else "train")


def test_blank_lines(root: Path) -> None:
    for file in (root / "val/val_annotations.txt", root / f"train/{WNIDS[0]}/{WNIDS[0]}_boxes.txt"):
        file.write_text("\n" + file.read_text() + "\n  \n")
    assert (len(open_source(data(root), "train")), len(open_source(data(root), "test"))) == (9, 6)


def test_an_unreadable_image_is_named(root: Path) -> None:
    (root / "val/images/val_3.JPEG").write_bytes(b"")
    source = open_source(data(root), "test")
    row = next(row for row in range(len(source)) if source.key(row) == "val--images--val_3")
    with pytest.raises(DataError, match=r"val_3\.JPEG is not a JPEG, PNG or WebP image; remove or replace"):
        source.raw(row)
