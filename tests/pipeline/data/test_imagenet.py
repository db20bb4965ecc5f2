"""ImageNet as published: train by wnid, val by wnid or flat with the labels of Kaggle or of the devkit."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from artifacts.errors import ConfigError, DataError
from pipeline.config.data import ImageNet
from pipeline.data import Source, open_source, split_names

WNIDS = ["n01440764", "n01443537", "n02000001"]  # in alphabetical order, not that of the devkit's numbers
NUMBERS = {"n01440764": 3, "n01443537": 1, "n02000001": 2}
VAL = ["n02000001", "n01440764", "n01443537", "n01440764"]


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = (10, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 120 if mode == "L" else (0, 255, 255, 0)[: len(mode)]).save(
        path, "JPEG", quality=95
    )
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for wnid in WNIDS:
        for number in range(4):
            picture(tmp_path / f"train/{wnid}/{wnid}_{number}.JPEG")
    return tmp_path


def data(root: Path, **settings: object) -> ImageNet:
    return ImageNet.model_validate({"source": "imagenet", "root": root, **settings})


def flat_val(root: Path, folder: str = "val") -> None:
    for number in range(1, 5):
        picture(root / folder / f"ILSVRC2012_val_{number:08d}.JPEG")


def kaggle_labels(root: Path) -> Path:
    rows = [f"ILSVRC2012_val_{i:08d},{wnid} 1 2 3 4 " for i, wnid in enumerate(VAL, 1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    return root / "LOC_val_solution.csv"


def devkit_labels(root: Path) -> Path:
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    kinds = [("ILSVRC2012_ID", np.float64), ("WNID", object), ("words", object)]
    rows = [(number, wnid, f"thing {wnid}") for wnid, number in NUMBERS.items()]
    savemat(folder / "meta.mat", {"synsets": np.array([*rows, (1001, "n09999999", "inner node")], kinds)})
    truth = folder / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("".join(f"{NUMBERS[wnid]}\n" for wnid in VAL))
    return truth


def labels(source: Source) -> dict[str | None, object]:
    raws = (source.raw(row) for row in range(len(source)))
    return {raw.source: raw.label for raw in raws}


EXPECTED = {f"val/ILSVRC2012_val_{i:08d}.JPEG": WNIDS.index(wnid) for i, wnid in enumerate(VAL, 1)}


@pytest.mark.parametrize("kaggle", [True, False])
def test_a_stray_image_beside_the_class_folders_of_val(root: Path, kaggle: bool) -> None:
    picture(root / "val/n02000001/ILSVRC2012_val_00000001.JPEG")
    picture(root / "val/stray.JPEG")
    if kaggle:
        kaggle_labels(root)
    with pytest.raises(
        DataError, match=r"val/stray\.JPEG lies beside class folders such as n02.*; remove it"
    ):
        open_source(data(root), "test")


def test_train_is_labelled_by_sorted_wnids(root: Path) -> None:
    assert split_names(data(root)) == ["train", "test"]
    train = open_source(data(root), "train")
    assert train.classes == WNIDS
    assert labels(train) == {
        f"train/{wnid}/{wnid}_{i}.JPEG": k for k, wnid in enumerate(WNIDS) for i in range(4)
    }
    assert train.raw(0).key.startswith("train--n0")


def test_val_in_folders_is_the_split_test(root: Path) -> None:
    picture(root / "val/n02000001/ILSVRC2012_val_00000001.JPEG")
    test = open_source(data(root), "test")
    assert test.classes == WNIDS
    assert labels(test) == {"val/n02000001/ILSVRC2012_val_00000001.JPEG": 2}


def test_flat_val_with_kaggles_labels(root: Path) -> None:
    flat_val(root)
    kaggle_labels(root)
    assert labels(open_source(data(root), "test")) == EXPECTED


def test_flat_val_with_the_devkits_labels(root: Path) -> None:
    flat_val(root)
    devkit_labels(root)
    assert labels(open_source(data(root), "test")) == EXPECTED


def test_kaggles_archive_as_unpacked(tmp_path: Path) -> None:
    inner = tmp_path / "ILSVRC/Data/CLS-LOC"
    for wnid in WNIDS:
        picture(inner / f"train/{wnid}/{wnid}_0.JPEG")
    flat_val(inner)
    kaggle_labels(tmp_path)
    assert labels(open_source(data(tmp_path), "test")) == EXPECTED
    assert open_source(data(tmp_path), "train").raw(0).image.size == (10, 8)


def test_val_per_class_is_held_out_of_train(root: Path) -> None:
    config = data(root, val_per_class=1, train_per_class=2)
    assert split_names(config) == ["train", "val", "test"]
    train, val = (labels(open_source(config, split)) for split in ("train", "val"))
    assert sorted(val.values(), key=str) == [0, 1, 2]
    assert sorted(train.values(), key=str) == [0, 0, 1, 1, 2, 2]
    assert not set(train) & set(val)


@pytest.mark.parametrize(("mode", "colour"), [("L", (120, 120, 120)), ("CMYK", (255, 0, 0))])
def test_grey_and_cmyk_become_rgb(root: Path, mode: str, colour: tuple[int, int, int]) -> None:
    picture(root / "val/n01440764/a.JPEG", mode)
    image = open_source(data(root), "test").raw(0).image
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - colour).max() < 12


def test_large_photographs_are_decoded_at_a_reduced_scale(root: Path) -> None:
    picture(root / "val/n01440764/a.JPEG", size=(640, 480))
    assert open_source(data(root), "test", shorter_side=32).raw(0).image.size == (160, 120)


def test_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere is not a folder; set data\.root"):
        open_source(data(tmp_path / "nowhere"), "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_missing_split(root: Path, split: str) -> None:
    wrong = root / "train/n01440764" if split == "train" else root
    with pytest.raises(DataError, match=r"cannot list .*(train|val) \(No such file.*set data\.root"):
        open_source(data(wrong), split)


def test_flat_val_without_labels(root: Path) -> None:
    flat_val(root)
    with pytest.raises(DataError, match=r"there are no labels for them: add LOC_val_solution\.csv or"):
        open_source(data(root), "test")


def test_flat_val_with_an_image_that_the_labels_do_not_name(root: Path) -> None:
    flat_val(root)
    kaggle_labels(root)
    picture(root / "val/ILSVRC2012_val_00000009.JPEG")
    with pytest.raises(DataError, match=r"val_00000009\.JPEG has no label in .*LOC_val_solution\.csv"):
        open_source(data(root), "test")


def test_a_label_that_is_no_class_of_train(root: Path) -> None:
    flat_val(root)
    file = kaggle_labels(root)
    file.write_text(file.read_text().replace("00000003,n01443537", "00000003,n05555555"))
    with pytest.raises(DataError, match=r"val_00000003\.JPEG has the label n05555555 .* no class of .*train"):
        open_source(data(root), "test")


@pytest.mark.parametrize("number", ["1002", "0", "-1", "x"])
def test_a_number_out_of_range_in_the_ground_truth(root: Path, number: str) -> None:
    flat_val(root)
    truth = devkit_labels(root)
    truth.write_text(f"2\n{number}\n1\n3\n")
    with pytest.raises(DataError, match=rf"ground_truth\.txt, line 2: the label {number} is no class"):
        open_source(data(root), "test")


@pytest.mark.parametrize("content", [b"", b"not a matrix", b"\0" * 200])
def test_a_damaged_meta_mat(root: Path, content: bytes) -> None:
    flat_val(root)
    devkit_labels(root)
    (root / "ILSVRC2012_devkit_t12/data/meta.mat").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*meta\.mat .*unpack the devkit again"):
        open_source(data(root), "test")


def test_the_devkit_without_scipy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat_val(root)
    devkit_labels(root)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ConfigError, match=r"meta\.mat needs scipy: pip install 'e2kd\[imagenet\]'"):
        open_source(data(root), "test")


def test_a_class_folder_without_images(root: Path) -> None:
    (root / "train/n03000000").mkdir()
    with pytest.raises(DataError, match=r"train/n03000000 has no images; unpack it again, or remove it"):
        open_source(data(root), "train")


def test_a_missing_ground_truth(root: Path) -> None:
    flat_val(root)
    devkit_labels(root).unlink()
    with pytest.raises(DataError, match=r"cannot read .*ground_truth\.txt \(No such file"):
        open_source(data(root), "test")


def test_a_class_of_val_that_train_does_not_have(root: Path) -> None:
    picture(root / "val/n05555555/a.JPEG")
    with pytest.raises(DataError, match=r"val/n05555555 is a class that .*train does not have"):
        open_source(data(root), "test")


def test_an_unreadable_image_and_a_link_to_nowhere_are_named(root: Path) -> None:
    (root / "val/n01440764").mkdir(parents=True)
    (root / "val/n01440764/bad.JPEG").write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=r"bad\.JPEG is not a JPEG, PNG or WebP image; remove or replace it"):
        open_source(data(root), "test").raw(0)
    (root / "val/n01440764/gone.JPEG").symlink_to(root / "gone")
    with pytest.raises(DataError, match=r"cannot read the image .*gone\.JPEG .*remove or replace it"):
        open_source(data(root), "test")
