"""Folders of photographs: layouts, splits, keys, every kind of file, and every way to be wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from artifacts.errors import DataError
from pipeline.config.data import Folder
from pipeline.data import open_source, split_names
from pipeline.data.reading.keys import safe_keys
from pipeline.data.reading.photo import read_photo

RED = (200, 30, 20)


def photo(path: Path, size: tuple[int, int] = (12, 8), colour: tuple[int, int, int] = RED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def folder(root: Path, **settings: object) -> Folder:
    return Folder.model_validate({"source": "folder", "root": root, **settings})


def paths_of(data: Folder, split: str) -> set[str | None]:
    source = open_source(data, split)
    return {source.raw(row).source for row in range(len(source))}


# --- layouts and splits


def test_split_folders_are_used_as_they_are(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/deep/2.jpg", "val/dog/3.webp"):
        photo(tmp_path / name)
    data = folder(tmp_path)
    train, val = open_source(data, "train"), open_source(data, "val")
    assert split_names(data) == ["train", "val"]
    assert train.classes == val.classes == ["cat", "dog"]
    assert {(train.key(row), train.raw(row).label) for row in range(2)} == {
        ("cat--1", 0),
        ("dog--deep--2", 1),
    }
    assert [(val.key(row), val.raw(row).label) for row in range(1)] == [("dog--3", 1)]


def test_a_test_folder_is_a_split_and_val_is_picked_from_train(tmp_path: Path) -> None:
    for i in range(20):
        photo(tmp_path / f"train/a/{i}.png")
    photo(tmp_path / "test/a/0.png")
    data = folder(tmp_path, val_fraction=0.5)
    assert split_names(data) == ["train", "val", "test"]
    assert paths_of(data, "test") == {"a/0.png"}
    assert paths_of(data, "train") | paths_of(data, "val") == {f"a/{i}.png" for i in range(20)}


def test_class_folders_are_split_by_a_stable_hash(tmp_path: Path) -> None:
    for i in range(60):
        photo(tmp_path / f"{'cat' if i % 2 else 'dog'}/{i}.png")
    data = folder(tmp_path, val_fraction=0.25)
    train, val = paths_of(data, "train"), paths_of(data, "val")
    assert len(train | val) == 60
    assert not train & val
    assert 5 <= len(val) <= 25
    for i in range(60, 80):
        photo(tmp_path / f"cat/{i}.png")
    assert val <= paths_of(data, "val")
    assert train <= paths_of(data, "train")


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    for i in range(9):
        photo(tmp_path / f"{i}.jpg")
    source = open_source(folder(tmp_path), "train")
    assert source.classes == []
    assert source.raw(0).label is None


def test_labels_false_takes_images_of_any_depth(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/c/2.png", "3.png", "4.png"):
        photo(tmp_path / name)
    data = folder(tmp_path, labels=False)
    sources = [open_source(data, split) for split in ("train", "val")]
    assert sum(map(len, sources)) == 4
    assert all(source.classes == [] and source.raw(0).label is None for source in sources)


@pytest.mark.parametrize("layout", ["train/a", "a", ""])
def test_few_shots_and_the_seed_in_every_layout(tmp_path: Path, layout: str) -> None:
    """val is the first share of the order, which split_seed decides; the rows are in that order."""
    for i in range(40):
        photo(tmp_path / layout / f"{i}.png")
    splits = [
        [open_source(folder(tmp_path, val_fraction=0.5, split_seed=seed), name) for name in ("val", "train")]
        for seed in (0, 0, 1)
    ]
    orders = [[source.key(row) for source in pair for row in range(len(source))] for pair in splits]
    assert len(set(orders[0])) == 40
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    if layout:
        assert len(open_source(folder(tmp_path, val_fraction=0.5, train_per_class=3), "train")) == 3


def test_a_small_folder_still_has_a_val_image(tmp_path: Path) -> None:
    photo(tmp_path / "1.png")
    photo(tmp_path / "2.png")
    assert len(open_source(folder(tmp_path, val_fraction=0.01), "val")) == 1


def test_hidden_and_other_files_are_left_out(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.PNG", ".cache/3.png", "cat/._1.png"):
        photo(tmp_path / name)
    (tmp_path / "cat/readme.txt").write_text("no image")
    data = folder(tmp_path)
    assert paths_of(data, "train") | paths_of(data, "val") == {"cat/1.png", "cat/2.PNG"}


def test_limit_and_describe(tmp_path: Path) -> None:
    for i in range(30):
        photo(tmp_path / f"{i}.png")
    data = folder(tmp_path)
    before = open_source(data, "train").describe()
    assert open_source(data, "train").describe() == before
    assert len(open_source(folder(tmp_path, limit=4), "train")) == 4
    photo(tmp_path / "5.png", size=(40, 40))
    photo(tmp_path / "6.png", size=(40, 40))
    photo(tmp_path / "7.png", size=(40, 40))
    assert open_source(data, "train").describe() != before


# --- keys


@given(st.lists(st.text(min_size=1).filter(lambda text: "\0" not in text and text.strip("/.")), unique=True))
def test_keys_are_safe_and_unique_for_any_names(names: list[str]) -> None:
    keys = safe_keys([f"{name}.jpg" for name in names])
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", key) for key in keys)


def test_keys_keep_plain_names_and_tell_the_others_apart() -> None:
    keys = safe_keys(
        ["cat/one.jpg", "cat/two.jpg", "cat/two.png", "cat/my dog.jpg", "cat/my_dog.jpg", "a.b.jpg"]
    )
    assert keys[0] == "cat--one"
    assert keys[1].startswith("cat--two-")
    assert keys[3].startswith("cat--my_dog-")
    assert len(set(keys)) == 6
    assert keys[::-1] == safe_keys(
        ["a.b.jpg", "cat/my_dog.jpg", "cat/my dog.jpg", "cat/two.png", "cat/two.jpg", "cat/one.jpg"]
    )


# --- files


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    image = read_photo(photo(tmp_path / f"a.{suffix}"))
    assert (image.mode, image.size) == ("RGB", (12, 8))
    assert np.abs(np.asarray(image).astype(int) - RED).max() < 12


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, suffix: str) -> None:
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: show it rotated by 90 degrees clockwise
    image.save(tmp_path / f"a.{suffix}", exif=exif)
    upright = np.asarray(read_photo(tmp_path / f"a.{suffix}"))
    assert upright.shape == (40, 20, 3)
    assert upright[:18].mean() > 245
    assert upright[22:].mean() < 10


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 128, (128, 128, 128)),
        ("1", 1, (255, 255, 255)),
        ("LA", (0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("I;16", 128 * 257, (128, 128, 128)),
        ("I;16", 65535, (255, 255, 255)),
    ],
)
def test_png_modes(tmp_path: Path, mode: str, colour: int, expected: tuple[int, int, int]) -> None:
    Image.new(mode, (5, 4), colour).save(tmp_path / "a.png")
    assert np.abs(np.asarray(read_photo(tmp_path / "a.png")).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("transparent", [False, True])
def test_palettes(tmp_path: Path, transparent: bool) -> None:
    image = Image.new("RGB", (5, 4), RED).quantize(4)
    image.save(tmp_path / "a.png", **({"transparency": 0} if transparent else {}))
    expected = (255, 255, 255) if transparent else RED
    assert np.abs(np.asarray(read_photo(tmp_path / "a.png")).astype(int) - expected).max() <= 4


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(np.asarray(read_photo(tmp_path / "a.jpg")).astype(int) - (255, 0, 0)).max() < 12


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (12, 8), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert read_photo(tmp_path / "a.jpg").size == (12, 8)


def test_large_jpegs_are_decoded_at_a_reduced_scale(tmp_path: Path) -> None:
    path = photo(tmp_path / "a.jpg", size=(1600, 1200))
    assert read_photo(path, shorter_side=64).size == (200, 150)
    assert read_photo(path, shorter_side=400).size == (1600, 1200)
    assert read_photo(path).size == (1600, 1200)


# --- bad input


def test_a_truncated_file_is_named_with_the_mend(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"a\.{suffix}.*remove or replace it"):
            read_photo(path)


@pytest.mark.parametrize("content", [b"", b"GIF89a not really", b"<html>404</html>"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.jpg is not a JPEG, PNG or WebP image; remove or replace it"):
        open_source(folder(tmp_path), "val").raw(0)


def test_a_link_to_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match=r"a\.jpg.*remove or replace it"):
        open_source(folder(tmp_path), "train")


@pytest.mark.parametrize(
    ("link", "target"),
    [("train/a/loop", "train/a"), ("train/a/loop", "train"), ("train/a/loop", "."), ("train/loop", "train")],
)
def test_a_link_to_a_folder_around_it_is_an_error(tmp_path: Path, link: str, target: str) -> None:
    photo(tmp_path / "train/a/1.png")
    (tmp_path / link).symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"loop links to a folder that it lies in, .*; remove it"):
        open_source(folder(tmp_path), "train")


def test_two_folders_that_link_to_each_other(tmp_path: Path) -> None:
    photo(tmp_path / "train/a/1.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "train/a/there").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "train/a")
    with pytest.raises(DataError, match=r"there/back links to a folder that it lies in"):
        open_source(folder(tmp_path), "train")


def test_links_to_other_folders_are_followed(tmp_path: Path) -> None:
    photo(tmp_path / "elsewhere/deep/1.png")
    photo(tmp_path / "set/train/a/2.png")
    (tmp_path / "set/train/a/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/train/b").symlink_to(tmp_path / "elsewhere")
    found = paths_of(folder(tmp_path / "set", val_fraction=0), "train")
    assert found == {"a/2.png", "a/more/deep/1.png", "b/deep/1.png"}


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    photo(tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    raw = open_source(folder(tmp_path), "val").raw(0)
    assert re.fullmatch(r"caf_-[0-9a-f]{10}", raw.key)
    assert raw.source == "caf\N{REPLACEMENT CHARACTER}.png"


def test_a_missing_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; .*data\.root"):
        open_source(folder(tmp_path / "nowhere"), "train")


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.png is a file, not a folder"):
        open_source(folder(photo(tmp_path / "a.png")), "train")


def test_an_empty_root(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no images here")
    with pytest.raises(DataError, match="has no JPEG, PNG or WebP images"):
        open_source(folder(tmp_path), "train")


def test_an_empty_class_folder(tmp_path: Path) -> None:
    photo(tmp_path / "cat/1.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"class folder .*dog has no .* images"):
        open_source(folder(tmp_path), "val")


@pytest.mark.parametrize(("stray", "split"), [("loose.png", "train"), ("val/bird/1.png", "val")])
def test_an_image_outside_the_class_folders(tmp_path: Path, stray: str, split: str) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "val/cat/1.png") if "/" in stray else ("cat/1.png",):
        photo(tmp_path / name)
    photo(tmp_path / stray)
    with pytest.raises(DataError, match=rf"{stray} is in none of the class folders"):
        open_source(folder(tmp_path), split)


@pytest.mark.parametrize(
    ("fraction", "split", "mend"), [(0.0, "val", "raise it"), (1.0, "train", "lower it")]
)
def test_a_split_left_empty(tmp_path: Path, fraction: float, split: str, mend: str) -> None:
    photo(tmp_path / "1.png")
    with pytest.raises(DataError, match=rf"left for {split}.*{mend}"):
        open_source(folder(tmp_path, val_fraction=fraction), split)
