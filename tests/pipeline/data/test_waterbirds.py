"""Waterbirds: metadata.csv, groups, CUB's boxes and masks, and every way to be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from artifacts.errors import ConfigError, DataError
from pipeline.config import parse
from pipeline.config.data import Waterbirds
from pipeline.data import open_source, split_names
from pipeline.data.pack import pack_split
from pipeline.workspace import Layout, Workspace

HEADER = "img_id,img_filename,y,split,place,place_filename"
GROUPS = [(0, 0), (0, 1), (1, 0), (1, 1)]
BOX = "10.0 4.0 20.0 12.0"


def name_of(y: int, split: int, place: int) -> str:
    return f"{y + 1:03d}.Bird/Bird_{split}{place}.jpg"


def write(root: Path, lines: list[str], header: str = HEADER) -> None:
    (root / "metadata.csv").write_text("\n".join([header, *lines]) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One image of each group in each split, 40 x 30 px, in one colour an image; CUB beside it."""
    root, lines, images, boxes = tmp_path / "waterbirds", [], ["999 003.Other/Not_used.jpg"], ["999 0 0 5 5"]
    for number, (split, (y, place)) in enumerate((split, group) for split in range(3) for group in GROUPS):
        name = name_of(y, split, place)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (20 * number, 0, 0)).save(root / name)
        lines.append(f"{number + 1},{name},{y},{split},{place},/o/ocean/00000001.jpg")
        images.append(f"{number + 1} {name}")
        boxes.append(f"{number + 1} {BOX}")
    write(root, lines)
    cub = tmp_path / "CUB_200_2011"
    cub.mkdir()
    (cub / "images.txt").write_text("\n".join(images) + "\n")
    (cub / "bounding_boxes.txt").write_text("\n".join(boxes) + "\n")
    return root


def data(root: Path, **settings: object) -> Waterbirds:
    return Waterbirds.model_validate({"source": "waterbirds", "root": root, **settings})


def with_cub(root: Path) -> Waterbirds:
    return data(root, cub=root.parent / "CUB_200_2011")


def segment(root: Path, folder: Path) -> None:
    """A mask an image: left half object."""
    mask = np.zeros((30, 40), np.uint8)
    mask[:, :20] = 255
    for path in root.rglob("*.jpg"):
        file = (folder / "segmentations" / path.relative_to(root)).with_suffix(".png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(file)


@pytest.mark.parametrize(
    ("split", "groups"),
    [
        ("train", [0, 1, 2, 3]),
        ("val", [0, 1, 2, 3]),
        ("test", [0, 1, 2, 3]),
        ("val-id", [0, 3]),
        ("val-ood", [1, 2]),
        ("test-id", [0, 3]),
        ("test-ood", [1, 2]),
    ],
)
def test_splits_and_groups(root: Path, split: str, groups: list[int]) -> None:
    source = open_source(data(root), split)
    found = [source.raw(row) for row in range(len(source))]
    assert source.classes == ["landbird", "waterbird"]
    assert sorted(raw.group for raw in found if raw.group is not None) == groups
    number = {"train": 0, "val": 1, "test": 2}[split.split("-")[0]]
    for raw in found:
        assert raw.group is not None
        assert raw.label == raw.group // 2
        assert raw.source == name_of(raw.group // 2, number, raw.group % 2)
        assert raw.boxes is None
        assert raw.mask is None
        assert raw.image.getpixel((3, 3)) == pytest.approx((20 * (4 * number + raw.group), 0, 0), abs=3)


def test_all_splits_are_named(root: Path) -> None:
    assert split_names(data(root)) == ["train", "val", "test", "test-id", "test-ood", "val-id", "val-ood"]
    with pytest.raises(ConfigError, match="did you mean test-ood"):
        open_source(data(root), "test-od")


def test_the_birds_box_is_cubs_whatever_the_view(root: Path) -> None:
    """x y width height 10 4 20 12 -> edges 10, 4, 30, 16; a small view does not shrink the image under the box."""
    source = open_source(with_cub(root), "test-ood", 4)
    for raw in (source.raw(0), source.raw(1)):
        assert raw.image.size == (40, 30)
        assert raw.boxes is not None
        assert raw.boxes.tolist() == [[raw.label, 10, 4, 30, 16]]


def test_a_mask_is_compared_with_the_upright_image(root: Path) -> None:
    """40 x 30 px, to be turned by 90 degrees: the mask of 40 x 30 px does not lie on its 30 x 40."""
    segment(root, root.parent)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(root / name_of(0, 0, 0), exif=turned)
    source = open_source(with_cub(root), "train")
    row = next(row for row in range(4) if source.key(row).startswith("001_Bird--Bird_00"))
    with pytest.raises(DataError, match=r"Bird_00\.png has 40 x 30 px, its image 30 x 40"):
        source.raw(row)


@pytest.mark.parametrize("inside", [True, False])
def test_segmentations_in_cub_or_beside_it(root: Path, inside: bool) -> None:
    segment(root, root.parent / "CUB_200_2011" if inside else root.parent)
    raw = open_source(with_cub(root), "train").raw(0)
    assert raw.mask is not None
    assert np.asarray(raw.mask)[:, [0, 19, 20, 39]].tolist() == [[255, 255, 0, 0]] * 30


def test_packed_groups_boxes_and_masks(root: Path, tmp_path: Path) -> None:
    """40 x 30 px to 15 px high and 20 wide, then the middle 15: box 10,4,30,16 -> 5,2,15,8 -> less 2 from the left."""
    segment(root, root.parent)
    experiment = parse(
        {
            "data": {"source": "waterbirds", "root": str(root), "cub": str(root.parent / "CUB_200_2011")},
            "view": {"size": 15},
            "teacher": {"model": "toy/resnet", "train": {"epochs": 1}},
            "students": {"kd": {"model": "toy/resnet"}},
        }
    )
    packed = pack_split(Workspace(experiment, Layout(tmp_path / "out")), "test-ood")
    assert sorted(zip(packed.labels, packed.groups, strict=True)) == [(0, 1), (1, 2)]
    for row in range(2):
        sample = packed[row]
        assert sample.boxes is not None
        assert sample.boxes.tolist() == [[sample.label, 3, 2, 13, 8]]
        assert sample.mask is not None
        assert sample.mask[:, [0, 14]].tolist() == [[255, 0]] * 15


# --- every way to be wrong


def test_a_wrong_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*metadata\.csv \(No such file.*set data\.root"):
        split_names(data(tmp_path))


def test_a_missing_column(root: Path) -> None:
    write(root, ["1,a.jpg,0,0"], "img_id,img_filename,y,split")
    with pytest.raises(DataError, match=r"metadata\.csv has no column place"):
        split_names(data(root))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1,a.jpg,2,0,0,p", "line 2: y is '2', not one of 0, 1"),
        ("1,a.jpg,0,3,0,p", "line 2: split is '3'"),
        ("1,a.jpg,0,0,-1,p", "line 2: place is '-1'"),
        ("1,a.jpg", "line 2: y is None"),
    ],
)
def test_a_number_out_of_range(root: Path, line: str, message: str) -> None:
    write(root, [line])
    with pytest.raises(DataError, match=message):
        open_source(data(root), "train")


def test_a_quote_that_is_never_closed(root: Path) -> None:
    write(root, ['1,"a.jpg,0,0,0,p'] + ["2,b.jpg,0,0,0," + "p" * 1000] * 150)
    with pytest.raises(DataError, match=r"metadata\.csv, line \d+ is no CSV \(field larger"):
        split_names(data(root))


def test_an_image_named_twice(root: Path) -> None:
    write(root, ["1,a.jpg,0,0,0,p", "2,a.jpg,0,0,0,p"])
    with pytest.raises(DataError, match=r"line 3: a\.jpg is named twice"):
        split_names(data(root))


def test_a_missing_image(root: Path) -> None:
    (root / name_of(1, 2, 0)).unlink()
    assert len(open_source(data(root), "test-id")) == 2
    with pytest.raises(DataError, match=r"line 12 names .*Bird_20\.jpg, which cannot be read"):
        open_source(data(root), "test")


@pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", ""])
def test_an_image_outside_the_root(root: Path, name: str) -> None:
    write(root, [f"1,{name},0,0,0,p"])
    with pytest.raises(DataError, match="not a file below"):
        open_source(data(root), "train")


def test_an_unreadable_image(root: Path) -> None:
    (root / name_of(0, 0, 0)).write_bytes(b"no image")
    source = open_source(data(root, limit=None), "train")
    row = next(row for row in range(4) if source.key(row).startswith("001_Bird--Bird_00"))
    with pytest.raises(DataError, match=r"Bird_00\.jpg is not a JPEG"):
        source.raw(row)


def test_a_wrong_cub_folder(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images\.txt .*set data\.cub to CUB_200_2011"):
        open_source(data(root, cub=tmp_path / "nowhere"), "train")


def test_an_image_that_cub_does_not_list(root: Path) -> None:
    file = root.parent / "CUB_200_2011/images.txt"
    file.write_text(file.read_text().replace(name_of(0, 0, 0), "001.Bird/Else.jpg"))
    with pytest.raises(
        DataError,
        match=r"line 2: CUB's images\.txt or bounding_boxes\.txt does not list 001\.Bird/Bird_00\.jpg",
    ):
        open_source(with_cub(root), "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 1 2 3", "line 1: 4 fields instead of 5"),
        ("1 1 2 x 4", "the line of image 1 is wrong"),
        ("1 1 2 0 4", "the line of image 1 is wrong"),
        ("77 1 2 3 4", "has image 77, which images.txt does not list"),
    ],
)
def test_a_wrong_line_of_boxes(root: Path, line: str, message: str) -> None:
    (root.parent / "CUB_200_2011/bounding_boxes.txt").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        open_source(with_cub(root), "train")


def test_blank_lines_of_cub(root: Path) -> None:
    for name in ("images.txt", "bounding_boxes.txt"):
        file = root.parent / "CUB_200_2011" / name
        file.write_text("\n" + file.read_text() + "\n  \n")
    assert len(open_source(with_cub(root), "train")) == 4


def test_masks_that_are_missing_or_of_another_size(root: Path) -> None:
    segment(root, root.parent)
    file = root.parent / "segmentations/001.Bird/Bird_00.png"
    Image.new("L", (7, 5)).save(file)
    source = open_source(with_cub(root), "train")
    row = next(row for row in range(4) if source.key(row).startswith("001_Bird--Bird_00"))
    with pytest.raises(DataError, match=r"Bird_00\.png has 7 x 5 px, its image 40 x 30"):
        source.raw(row)
    file.unlink()
    with pytest.raises(DataError, match=r"line 2 names .*Bird_00\.png"):
        open_source(with_cub(root), "train")


def test_an_image_that_is_not_of_cubs_size(root: Path) -> None:
    source = open_source(with_cub(root), "val")
    for row in range(len(source)):
        source.raw(row)
    file = root / name_of(0, 1, 0)
    Image.new("RGB", (28, 21)).save(file)  # resized: the box ends at 30, 16
    source = open_source(with_cub(root), "val")
    message = r"has 28 x 21 px, but CUB's box of it ends at 30, 16 .*CUB's own size"
    with pytest.raises(DataError, match=message):
        [source.raw(row) for row in range(len(source))]


def test_a_box_may_leave_its_image_by_a_pixel(root: Path) -> None:
    Image.new("RGB", (30, 16)).save(root / name_of(0, 1, 0))
    boxes = root.parent / "CUB_200_2011/bounding_boxes.txt"
    boxes.write_text(boxes.read_text().replace(BOX, "10.0 4.0 20.5 12.0"))
    source = open_source(with_cub(root), "val")
    assert all(source.raw(row).boxes is not None for row in range(len(source)))
