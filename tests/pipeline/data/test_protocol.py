"""What is held out, in which order, and under which keys: the same for every data set on disk."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from artifacts.errors import ConfigError, DataError
from pipeline.config import Files
from pipeline.config.data import Folder, ImageNet
from pipeline.data import Source, open_source, split_names
from pipeline.data.protocol import in_order, select_rows
from pipeline.data.reading.keys import rank
from pipeline.data.reading.listing import Entry

CLASSES = ("n1", "n2", "n3")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images a class to train on, two to test."""
    root = tmp_path_factory.mktemp("imagenet")
    for name in CLASSES:
        for split, count in (("train", 10), ("val", 2)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (8, 8)).save(root / split / name / f"{number}.jpg")
    return root


def imagenet(root: Path, **settings: object) -> ImageNet:
    return ImageNet.model_validate({"source": "imagenet", "root": root, **settings})


def keys(data: Files, split: str) -> list[str]:
    source = open_source(data, split)
    return [source.key(row) for row in range(len(source))]


def labels(source: Source) -> Counter[object]:
    return Counter(source.raw(row).label for row in range(len(source)))


def test_the_order_is_that_of_the_hash_of_seed_and_id() -> None:
    """Computed here by hand, so that packed sets stay what they are."""
    entries = [Entry(f"a/{number}.jpg", 1) for number in range(20)]
    by_hash = sorted(
        (hashlib.blake2b(f"7:a/{number}.jpg".encode(), digest_size=8).hexdigest(), f"a/{number}.jpg")
        for number in range(20)
    )
    assert [entry.id for entry in in_order(entries[::-1], 7)] == [name for _, name in by_hash]
    assert [entry.id for entry in in_order(entries, 8)] != [name for _, name in by_hash]


def test_composed_and_decomposed_accents_have_one_rank() -> None:
    assert rank("caf\u00e9.jpg", 0) == rank("cafe\u0301.jpg", 0)


def test_published_splits_are_whole_without_a_protocol(root: Path) -> None:
    data = imagenet(root)
    assert split_names(data) == ["train", "test"]
    assert len(keys(data, "train")) == 30
    with pytest.raises(ConfigError, match="imagenet has no split 'val'; it has train, test"):
        open_source(data, "val")


def test_val_is_held_out_of_train_per_class(root: Path) -> None:
    data = imagenet(root, val_per_class=3)
    assert split_names(data) == ["train", "val", "test"]
    assert labels(open_source(data, "val")) == {0: 3, 1: 3, 2: 3}
    assert labels(open_source(data, "train")) == {0: 7, 1: 7, 2: 7}
    assert not set(keys(data, "train")) & set(keys(data, "val"))
    assert set(keys(data, "train")) | set(keys(data, "val")) == set(keys(imagenet(root), "train"))
    assert keys(data, "test") == keys(imagenet(root), "test")


def test_few_shots_follow_the_held_out_images(root: Path) -> None:
    """Image number 0, 1 of a class in the order are val, 2, 3, 4 are the shots, with any number of shots."""
    order: dict[str, list[str]] = {name: [] for name in CLASSES}
    for key in keys(imagenet(root), "train"):
        order[key.split("--")[1]].append(key)
    data = imagenet(root, val_per_class=2, train_per_class=3)
    assert set(keys(data, "val")) == {key for of_class in order.values() for key in of_class[:2]}
    assert set(keys(data, "train")) == {key for of_class in order.values() for key in of_class[2:5]}
    more = imagenet(root, val_per_class=2, train_per_class=5)
    assert set(keys(data, "train")) < set(keys(more, "train"))
    assert keys(data, "val") == keys(more, "val")


class TwelveOfFive(TensorDataset):
    """(index, label) of 60 images in ImageFolder's order: what a real DataLoader shuffles in the test below."""

    def __init__(self) -> None:
        super().__init__(torch.arange(60), torch.arange(60) // 12)


def last_seen(samples: Subset[tuple[Tensor, ...]] | TwelveOfFive, count: int, seed: int) -> set[int]:
    """e2KD's rule by torch's own loader: the last `count` of each class until each of the five has as many."""
    torch.manual_seed(seed)
    latest: dict[int, list[int]] = {label: [] for label in range(5)}
    for images, labels in DataLoader(samples, batch_size=7, shuffle=True):
        for image, label in zip(images.tolist(), labels.tolist(), strict=True):
            latest[label] = [*latest[label], image][-count:]
            if all(len(kept) == count for kept in latest.values()):
                return {image for kept in latest.values() for image in kept}
    raise AssertionError("too few images")


@pytest.mark.parametrize("seed", [42, 7])
def test_the_authors_rule_takes_the_images_that_torchs_loader_shows_last(tmp_path: Path, seed: int) -> None:
    names = [f"n{number // 12}/{number % 12:02d}.jpg" for number in range(60)]
    for name in names:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name)
    samples = TwelveOfFive()
    held_out = last_seen(samples, 3, seed)
    rest = Subset(samples, sorted(set(range(60)) - held_out))
    data = imagenet(
        tmp_path,
        split_rule="authors",
        split_seed=seed,
        val_per_class=3,
        train_per_class=2,
        on_bad_image="stop",
    )
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "n0").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val" / "n0" / "a.jpg")
    for split, chosen in (("val", held_out), ("train", last_seen(rest, 2, seed))):
        source = open_source(data, split)
        found = {source.raw(row).source for row in range(len(source))}
        assert found == {f"train/{names[image]}" for image in chosen}, split
    shots = {key for key in keys(data, "train")}
    whole = set(keys(data.model_copy(update={"train_per_class": None}), "train"))
    assert shots < whole
    assert len(whole) == 60 - 15


def test_another_seed_chooses_other_images(root: Path) -> None:
    chosen = [set(keys(imagenet(root, train_per_class=4, split_seed=seed), "train")) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_limit_cuts_last(root: Path) -> None:
    whole = imagenet(root, val_per_class=3)
    assert keys(imagenet(root, val_per_class=3, limit=4), "train") == keys(whole, "train")[:4]


@pytest.mark.parametrize(
    "settings", [{"val_per_class": 10}, {"val_per_class": 6, "train_per_class": 5}, {"train_per_class": 11}]
)
def test_too_few_images_of_a_class(root: Path, settings: dict[str, int]) -> None:
    with pytest.raises(
        DataError, match=r"class n1 of .* has 10 images, 11 are asked for; lower data\.val_per"
    ):
        open_source(imagenet(root, **settings), "train")


def test_describe_changes_with_the_images_and_the_protocol(root: Path, tmp_path: Path) -> None:
    about = {
        open_source(imagenet(root, **settings), "train").describe()
        for settings in ({}, {"val_per_class": 3}, {"train_per_class": 3}, {"split_seed": 1})
    }
    assert len(about) == 4
    assert "imagenet train, 30 images" in open_source(imagenet(root), "train").describe()


# --- folders follow the same protocol


def folder(root: Path, **settings: object) -> Folder:
    return Folder.model_validate({"source": "folder", "root": root, **settings})


def test_a_folder_holds_val_out_per_class(root: Path) -> None:
    data = folder(root / "train", val_per_class=2, train_per_class=4)
    assert split_names(data) == ["train", "val"]
    assert labels(open_source(data, "val")) == {0: 2, 1: 2, 2: 2}
    assert labels(open_source(data, "train")) == {0: 4, 1: 4, 2: 4}
    assert not set(keys(data, "train")) & set(keys(data, "val"))


def test_a_folder_with_few_shots_beside_its_share_of_val(root: Path) -> None:
    plain, few = (folder(root / "train", val_fraction=0.3, train_per_class=n) for n in (None, 2))
    assert labels(open_source(few, "train")) == {0: 2, 1: 2, 2: 2}
    assert keys(few, "val") == keys(plain, "val")
    assert set(keys(few, "train")) < set(keys(plain, "train"))


def test_the_seed_decides_a_folders_val(root: Path) -> None:
    chosen = [keys(folder(root / "train", val_fraction=0.3, split_seed=seed), "val") for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_val_folder_excludes_val_per_class(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"folder has its own val .*; remove val_per_class"):
        split_names(folder(root, val_per_class=1))


def test_images_without_labels_have_none_per_class(root: Path) -> None:
    data = folder(root / "train", val_per_class=1, labels=False)
    with pytest.raises(
        ConfigError, match=r"data\.val_per_class needs one label an image, but .* has no label"
    ):
        open_source(data, "val")


def test_a_students_rows_are_the_first_ones_and_of_these_the_first_of_each_class() -> None:
    labels = [0, 1, 0, None, 1, 0, 1]
    assert select_rows(labels, None, None).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert select_rows(labels, 9, None).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert select_rows(labels, 5, None).tolist() == [0, 1, 2, 3, 4]
    assert select_rows(labels, None, 2).tolist() == [0, 1, 2, 3, 4]
    assert select_rows(labels, 4, 1).tolist() == [0, 1, 3]
    assert select_rows(labels, 3, 1).tolist() == [0, 1]
    assert select_rows([], None, 1).dtype == np.int64
