"""`on_bad_image: skip`: unreadable images are found once, named, counted, and left out before anything is cut."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from artifacts.errors import DataError
from artifacts.places import place
from pipeline.config import Experiment, parse
from pipeline.data.pack import pack_split
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.reading.unreadable import UnreadableImages
from pipeline.progress import Advance, Progress, Quiet
from pipeline.workspace import Layout, Workspace

STUDENT = {"model": "toy/resnet", "width": 4}


class Told:
    """A Progress that keeps what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: dict[str, int] = {}

    def say(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        self.counts[label] = 0

        def advance(done: int) -> None:
            self.counts[label] += done

        yield advance


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Six images a class; n1/2 is cut off, n2/4 is a text."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for name in ("n1", "n2"):
        for split, count in (("train", 6), ("val", 2)):
            (tmp_path / f"set/{split}/{name}").mkdir(parents=True)
            for number in range(count):
                Image.fromarray(noise).save(tmp_path / f"set/{split}/{name}/{number}.jpg")
    cut = tmp_path / "set/train/n1/2.jpg"
    cut.write_bytes(cut.read_bytes()[:500])
    (tmp_path / "set/train/n2/4.jpg").write_text("<html>not found</html>")
    return tmp_path / "set"


def experiment(root: Path, source: str = "imagenet", **data: Any) -> Experiment:
    return parse(
        {
            "data": {"source": source, "root": root, "on_bad_image": "skip", **data},
            "view": {"size": 16},
            "teacher": {**STUDENT, "train": {}},
            "students": {"kd": STUDENT},
        }
    )


def pack(root: Path, split: str, progress: Progress, **settings: Any) -> list[str]:
    """The keys that are packed beside `root`."""
    layout = Layout(root.parent / "out")
    images = pack_split(Workspace(experiment(root, **settings), layout, progress=progress), split)
    return [images[row].key for row in range(len(images))]


def test_they_are_left_out_named_and_counted(root: Path) -> None:
    told = Told()
    keys = pack(root, "train", told)
    expected = {f"train--{name}--{i}" for name in ("n1", "n2") for i in range(6)}
    assert set(keys) == expected - {"train--n1--2", "train--n2--4"}
    assert told.counts["check train"] == 12
    named = [line for line in told.lines if line.startswith("left out: ")]
    assert len(named) == 2
    assert any("train/n1/2.jpg" in line for line in named)
    assert any("train/n2/4.jpg is not a JPEG" in line for line in named)
    assert told.lines[-1].startswith("2 of 12 images of train cannot be read")


def test_stop_is_the_default_and_names_the_file(root: Path) -> None:
    with pytest.raises(DataError, match=r"train/n[12]/[24]\.jpg.*remove or replace it"):
        pack(root, "train", Quiet(), on_bad_image="stop")


def test_the_finding_is_kept_for_the_other_split_and_for_a_resumed_pack(root: Path) -> None:
    """val and train are cut from the published train: it is decoded and reported once, and cut after the bad ones."""
    first, second, resumed = Told(), Told(), Told()
    val = pack(root, "val", first, val_per_class=2)
    train = pack(root, "train", second, val_per_class=2)
    assert "check train" in first.counts
    assert "check train" not in second.counts
    assert (len(first.lines), second.lines) == (3, [])
    (root.parent / "out/images/train/index.json").unlink()
    assert pack(root, "train", resumed, val_per_class=2) == train
    assert "check train" not in resumed.counts
    assert resumed.lines == first.lines
    assert (len(val), len(train)) == (4, 6)
    kept = json.loads((root.parent / "out/images/unreadable-train.json").read_text())
    assert set(kept["unreadable"]) == {"train/n1/2.jpg", "train/n2/4.jpg"}


def test_a_split_without_bad_images_says_nothing(root: Path) -> None:
    told = Told()
    assert len(pack(root, "test", told)) == 4
    assert told.lines == []
    assert json.loads((root.parent / "out/images/unreadable-test.json").read_text())["unreadable"] == {}


def test_a_finished_set_is_checked_quietly(root: Path) -> None:
    pack(root, "train", Quiet())
    told = Told()
    pack(root, "train", told)
    assert told.lines == []


@pytest.mark.parametrize("damage", ["other images", "no JSON", "no digest"])
def test_a_finding_about_other_images_does_not_count(root: Path, damage: str) -> None:
    pack(root, "val", Quiet(), val_per_class=2)
    file = root.parent / "out/images/unreadable-train.json"
    if damage == "other images":
        os.truncate(root / "train/n1/0.jpg", 400)
    else:
        file.write_text("[]" if damage == "no digest" else "{")
    told = Told()
    pack(root, "train", told, val_per_class=1)
    assert told.counts["check train"] == 12
    assert len(json.loads(file.read_text())["unreadable"]) == (3 if damage == "other images" else 2)


def repair(root: Path) -> None:
    """n1/2 is sound again, and has as many bytes as before."""
    cut, size = root / "train/n1/2.jpg", (root / "train/n1/2.jpg").stat().st_size
    Image.new("L", (1, 1)).save(cut)
    cut.write_bytes(cut.read_bytes().ljust(size, b"\0"))
    assert cut.stat().st_size == size


def test_a_repaired_image_of_the_same_size_is_packed_anew(root: Path) -> None:
    pack(root, "train", Quiet())
    repair(root)
    (root.parent / "out/images/train/index.json").unlink()
    assert "train--n1--2" not in pack(root, "train", Quiet())  # the same packing goes on
    shutil.rmtree(root.parent / "out/images/train")
    told = Told()
    assert "train--n1--2" in pack(root, "train", told)
    assert told.lines[-1].startswith("1 of 12 images of train cannot be read")
    kept = json.loads((root.parent / "out/images/unreadable-train.json").read_text())
    assert set(kept["unreadable"]) == {"train/n2/4.jpg"}


def test_a_repaired_image_that_a_packed_split_left_out(root: Path) -> None:
    """val would be cut elsewhere with it, and share images with train."""
    pack(root, "val", Quiet(), val_per_class=2)
    repair(root)
    with pytest.raises(
        DataError, match=r"n1/2\.jpg can be read now, but val left it out; .*rm -r .*images/val"
    ):
        pack(root, "train", Quiet(), val_per_class=2)
    shutil.rmtree(root.parent / "out/images/val")
    assert len(pack(root, "train", Quiet(), val_per_class=2)) == 7


def test_a_class_without_a_readable_image_is_named(root: Path) -> None:
    for file in (root / "train/n2").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"no image of class n2 in train of .*set can be read; replace them"):
        pack(root, "train", Quiet())


@pytest.mark.parametrize("source", ["imagenet", "folder"])
def test_a_link_to_nowhere_is_left_out_too(root: Path, source: str) -> None:
    (root / "train/n1/9.jpg").symlink_to(root / "gone.jpg")
    told = Told()
    assert len(pack(root, "train", told, source=source)) == 10
    assert any("train/n1/9.jpg (" in line and "No such file" in line for line in told.lines)
    assert told.lines[-1].startswith("3 of 13 images of train cannot be read")


def test_folders_too(root: Path) -> None:
    told = Told()
    assert len(pack(root / "train", "train", told, source="folder", val_per_class=1)) == 8
    assert len(told.lines) == 3


def test_a_split_of_unreadable_images_only(root: Path) -> None:
    for file in (root / "val").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"split test of .* has no readable images"):
        pack(root, "test", Quiet())


def test_masks_are_read_too_and_the_warning_filters_are_left_alone(tmp_path: Path) -> None:
    """Threads that each silence Pillow must not leave the process silent."""

    def read(entry: Entry, shorter_side: int | None) -> Image.Image:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.new("RGB", (4, 4))

    def mask(entry: Entry) -> Image.Image | None:
        if entry.id == "7":
            raise DataError("cannot read the mask 7")
        return None

    before = list(warnings.filters)
    listing = Listing(["a"], [Entry(str(number), 1, 0) for number in range(3000)], read, mask)
    told = Told()
    found = UnreadableImages(place(tmp_path), [tmp_path], 16, told, "train/extra")("train/extra", listing)
    assert found == ["7"]
    assert told.counts == {"check train/extra": 3000}
    assert (tmp_path / "unreadable-train--extra.json").exists()
    assert list(warnings.filters) == before
