"""PASCAL VOC: lists, annotations, the difficult flag, hand-computed boxes, and every way to be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from artifacts.errors import DataError
from pipeline.config import parse
from pipeline.config.data import Voc
from pipeline.data import open_source, split_names
from pipeline.data.pack import pack_split
from pipeline.data.sources.voc import CLASSES
from pipeline.workspace import Layout, Workspace

DOG, CAR, PERSON = 11, 6, 14


def thing(name: str, xmin: object, ymin: object, xmax: object, ymax: object, difficult: int = 0) -> str:
    """An object as VOC writes it; its parts have names and boxes of their own, which are none of ours."""
    return (
        f"<object><name>{name}</name><pose>Left</pose><truncated>0</truncated><difficult>{difficult}</difficult>"
        f"<bndbox><xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax></bndbox>"
        "<part><name>head</name><bndbox><xmin>2</xmin><ymin>2</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
        "</object>"
    )


def annotate(base: Path, name: str, *objects: str, size: tuple[int, int] = (40, 30)) -> None:
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    (base / f"Annotations/{name}.xml").write_text(
        f"<annotation><folder>VOC2007</folder><filename>{name}.jpg</filename>{sides}{''.join(objects)}</annotation>"
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Three images of 40 x 30 px; the second's dog is marked difficult, and the third's only object."""
    base = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (base / folder).mkdir(parents=True)
    for number in (1, 2, 3):
        Image.new("RGB", (40, 30), (50 * number, 0, 0)).save(base / f"JPEGImages/{number:06d}.jpg")
    annotate(base, "000001", thing("person", 11, 6, 20, 25), thing("car", 1, 1, 40, 30))
    annotate(
        base,
        "000002",
        thing("dog", 5, 5, 9, 9, difficult=1),
        thing("person", 2, 2, 8, 8),
        thing("person", 3, 3, 9, 9),
    )
    annotate(base, "000003", thing("dog", 5, 5, 9, 9, difficult=1))
    (base / "ImageSets/Main/train.txt").write_text("000001\n000002\n")
    (base / "ImageSets/Main/test.txt").write_text("000003\n")
    return base


def data(root: Path, **settings: object) -> Voc:
    return Voc.model_validate({"source": "voc", "root": root, **settings})


def sole(base: Path, *objects: str, **settings: object) -> list[list[float]]:
    """The boxes of an image with these objects."""
    annotate(base, "000003", *objects)
    boxes = open_source(data(base, **settings), "test").raw(0).boxes
    assert boxes is not None
    return boxes.tolist()


def test_the_classes_are_vocs_twenty() -> None:
    assert len(CLASSES) == 20
    assert sorted(CLASSES) == CLASSES
    assert [CLASSES[number] for number in (DOG, CAR, PERSON)] == ["dog", "car", "person"]


def test_the_splits_are_the_lists_that_exist(base: Path) -> None:
    assert split_names(data(base)) == ["train", "test"]
    (base / "ImageSets/Main/trainval.txt").write_text("000001\n")
    assert split_names(data(base)) == ["train", "trainval", "test"]


@pytest.mark.parametrize("up", [0, 1, 2])
def test_the_root_may_be_any_of_three_folders(base: Path, up: int) -> None:
    root = [base, *base.parents][up]
    assert len(open_source(data(root), "train")) == 2


def test_labels_and_boxes(base: Path) -> None:
    """Corners 11 6 20 25 from 1, inclusive: left and upper edge 10 and 5, right and lower 20 and 25."""
    source = open_source(data(base), "train", 4)
    raw = {name: found for found in map(source.raw, range(2)) for name in [found.source]}
    first, second = raw["JPEGImages/000001.jpg"], raw["JPEGImages/000002.jpg"]
    assert first.image.size == (40, 30)  # whole, though the view is 4 px
    assert (first.label, second.label) == ((CAR, PERSON), (DOG, PERSON))
    assert first.boxes is not None
    assert first.boxes.dtype == np.float32
    assert first.boxes.tolist() == [[PERSON, 10, 5, 20, 25], [CAR, 0, 0, 40, 30]]


def test_difficult_objects_can_be_dropped(base: Path) -> None:
    train = open_source(data(base, difficult="drop"), "train")
    assert {train.raw(row).label for row in range(2)} == {(CAR, PERSON), (PERSON,)}
    raw = open_source(data(base, difficult="drop"), "test").raw(0)
    assert raw.label == ()
    assert raw.boxes is not None
    assert raw.boxes.shape == (0, 5)
    assert open_source(data(base), "test").raw(0).label == (DOG,)


def test_corners_may_be_fractions_and_begin_at_0(base: Path) -> None:
    """VOC2011 and later have some fractions; sets made in its format often count from 0."""
    assert sole(base, thing("dog", "4.5", 2, 9, 8), thing("car", 0, 0, 9, 8)) == [
        [DOG, 3.5, 1, 9, 8],
        [CAR, 0, 0, 9, 8],
    ]


def test_corners_are_inclusive_so_equal_ones_are_a_pixel(base: Path) -> None:
    assert sole(base, thing("dog", 5, 2, 5, 8), thing("car", 40, 30, 40, 30)) == [
        [DOG, 4, 1, 5, 8],
        [CAR, 39, 29, 40, 30],
    ]


@pytest.mark.parametrize("difficult", ["keep", "drop"])
def test_packed_labels_and_boxes(base: Path, tmp_path: Path, difficult: str) -> None:
    """40 x 30 px to 20 x 15, then the middle 15: corners halve and move 2 to the left; an empty label stays one."""
    experiment = parse(
        {
            "data": {"source": "voc", "root": str(base), "difficult": difficult},
            "view": {"size": 15},
            "teacher": {"model": "toy/resnet", "train": {"epochs": 1}},
            "students": {"kd": {"model": "toy/resnet"}},
        }
    )
    train = pack_split(Workspace(experiment, Layout(tmp_path / "out")), "train")
    kept = (DOG, PERSON) if difficult == "keep" else (PERSON,)
    assert set(train.labels) == {(CAR, PERSON), kept}
    boxes = train[train.labels.index((CAR, PERSON))].boxes
    assert boxes is not None
    assert boxes.tolist() == [[PERSON, 3, 2.5, 8, 12.5], [CAR, 0, 0, 15, 15]]
    test = pack_split(Workspace(experiment, Layout(tmp_path / "out")), "test")
    assert test[0].label == ((DOG,) if difficult == "keep" else ())
    assert test[0].boxes is not None
    assert len(test[0].boxes) == (difficult == "keep")


# --- every way to be wrong


def test_a_wrong_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no VOC2007/ImageSets/Main; set data\.root to VOCdevkit"):
        split_names(data(tmp_path))


def test_another_year(base: Path) -> None:
    with pytest.raises(DataError, match=r"is not VOC2012; set data\.year"):
        split_names(data(base, year="2012"))


def test_no_list(base: Path) -> None:
    for file in (base / "ImageSets/Main").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"has none of train\.txt, val\.txt"):
        split_names(data(base))


@pytest.mark.parametrize("path", ["JPEGImages/000003.jpg", "Annotations/000003.xml"])
def test_a_missing_file(base: Path, path: str) -> None:
    (base / path).unlink()
    with pytest.raises(DataError, match=rf"{path}(, which cannot be read)? \(No such file"):
        open_source(data(base), "test")


def test_an_unreadable_image(base: Path) -> None:
    file = base / "JPEGImages/000003.jpg"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(DataError, match=r"000003\.jpg"):
        open_source(data(base), "test").raw(0)


@pytest.mark.parametrize(
    "corners",
    [
        (0, 2, 0, 8),
        (9, 8, 12, 3),
        (-1, 2, 9, 8),
        (2, 2, 41, 8),
        (2, 2, 9, 31),
        (2, 2, "nan", 8),
        ("x", 2, 9, 8),
    ],
)
def test_a_box_that_is_empty_outside_or_no_box(base: Path, corners: tuple[object, ...]) -> None:
    with pytest.raises(DataError, match=r"000003\.xml: "):
        sole(base, thing("dog", *corners))


def test_a_wrong_box_counts_only_where_it_is_used(base: Path) -> None:
    wrong = thing("dog", 9, 9, 2, 2, difficult=1)
    assert sole(base, wrong, thing("car", 1, 1, 2, 2), difficult="drop") == [[CAR, 0, 0, 2, 2]]


def test_an_unknown_class(base: Path) -> None:
    with pytest.raises(DataError, match=r"000003\.xml has an object of the class 'zebra'"):
        sole(base, thing("zebra", 1, 1, 9, 9))


def test_no_object(base: Path) -> None:
    with pytest.raises(DataError, match=r"000003\.xml has no object"):
        sole(base)


def test_an_image_listed_twice(base: Path) -> None:
    (base / "ImageSets/Main/test.txt").write_text("000003\n000001\n000003\n")
    with pytest.raises(DataError, match=r"test\.txt names 000003 twice"):
        open_source(data(base), "test")


@pytest.mark.parametrize("turned", [True, False])
def test_an_image_of_another_size_than_annotated(base: Path, turned: bool) -> None:
    """Boxes of another size's, or of the image before its EXIF turned it upright, would lie elsewhere in silence."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = base / "JPEGImages/000003.jpg"
    Image.new("RGB", (40, 30) if turned else (30, 40)).save(file, **({"exif": exif} if turned else {}))
    with pytest.raises(DataError, match=r"000003\.jpg has 30 x 40 px, its annotation says 40 x 30"):
        open_source(data(base), "test").raw(0)


def test_no_size(base: Path) -> None:
    (base / "Annotations/000003.xml").write_text(f"<annotation>{thing('dog', 1, 1, 9, 9)}</annotation>")
    with pytest.raises(DataError, match=r"000003\.xml: size/width is '', not a number"):
        open_source(data(base), "test")


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><annotation><object>&b;</object></annotation>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB.encode(), "declares a document type or entities"),
        (f'<?xml version="1.0" encoding="UTF-16"?>{BOMB}'.encode("utf-16"), "cannot read"),
        (b"<annotation><object>", "is no XML"),
        (b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_xml_that_is_refused(base: Path, content: bytes, message: str) -> None:
    (base / "Annotations/000003.xml").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(data(base), "test")
