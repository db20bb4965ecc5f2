"""WebDataset shards: patterns, WebDataset's grouping, annotations, and every way to be wrong."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from artifacts.errors import ConfigError, DataError
from pipeline.config.data import WebShards
from pipeline.data import open_source, split_names
from pipeline.data.source import RawSample

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def image(colour: tuple[int, int, int] = RED, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def half_mask(size: tuple[int, int] = (40, 30)) -> bytes:
    """The left half is object."""
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[:, : size[0] // 2] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def about(**annotations: object) -> bytes:
    return json.dumps(annotations).encode()


def data(root: Path, pattern: str = "a.tar", **settings: object) -> WebShards:
    return WebShards.model_validate(
        {"source": "webdataset", "root": root, "shards": {"train": pattern}, **settings}
    )


def samples(config: WebShards, split: str = "train") -> dict[str | None, RawSample]:
    source = open_source(config, split)
    return {raw.source: raw for raw in map(source.raw, range(len(source)))}


def labels(config: WebShards, split: str = "train") -> dict[str | None, object]:
    return {name: raw.label for name, raw in samples(config, split).items()}


# --- what is read


def test_images_and_labels_of_every_kind(tmp_path: Path) -> None:
    tar(
        tmp_path / "a.tar",
        {
            "0001.jpg": image(kind="JPEG"),
            "0001.cls": b"2\n",
            "0002.JPEG": image(kind="JPEG"),
            "0002.json": about(label=[4, 1]),
            "deep.er/0003.PNG": image(GREEN),
            "deep.er/0003.json": about(label=None, group=3),
            "0004.webp": image(BLUE, "WEBP"),
        },
    )
    found = samples(data(tmp_path))
    assert {name: raw.label for name, raw in found.items()} == {
        "a/0001": 2,
        "a/0002": (1, 4),
        "a/deep.er/0003": None,
        "a/0004": None,
    }
    assert found["a/deep.er/0003"].group == 3
    assert found["a/deep.er/0003"].image.getpixel((5, 5)) == GREEN
    assert found["a/0004"].image.size == (40, 30)
    assert open_source(data(tmp_path), "train").classes == ["0", "1", "2", "3", "4"]


def test_boxes_and_masks_keep_the_image_whole(tmp_path: Path) -> None:
    tar(
        tmp_path / "a.tar",
        {
            "0.jpg": image(kind="JPEG"),
            "0.json": about(label=1, boxes=[[1, 4, 5, 20.5, 30]]),
            "1.jpg": image(kind="JPEG"),
            "1.mask.png": half_mask(),
            "2.jpg": image(kind="JPEG"),
        },
    )
    source = open_source(data(tmp_path), "train", 6)
    found = {raw.source: raw for raw in map(source.raw, range(3))}
    assert [found[name].image.size for name in ("a/0", "a/1", "a/2")] == [(40, 30), (40, 30), (20, 15)]
    boxes, mask = found["a/0"].boxes, found["a/1"].mask
    assert boxes is not None
    assert boxes.tolist() == [[1, 4, 5, 20.5, 30]]
    assert mask is not None
    assert np.asarray(mask)[0, [0, 19, 20, 39]].tolist() == [255, 255, 0, 0]
    assert found["a/0"].mask is found["a/2"].mask is found["a/2"].boxes is None


@pytest.mark.parametrize("pattern", ["a.tar", "./*.tar", "link.tar"])
def test_a_tar_of_two_splits(tmp_path: Path, pattern: str) -> None:
    tar(tmp_path / "a.tar", {"0.png": image(), "0.cls": b"0"})
    (tmp_path / "link.tar").symlink_to("a.tar")
    config = data(tmp_path, shards={"train": "a.tar", "test": pattern})
    with pytest.raises(
        DataError, match=r"[.]tar is in both data\.shards\.train and data\.shards\.test; take it out of one"
    ):
        open_source(config, "train")


def test_a_class_that_only_an_unreadable_image_has(tmp_path: Path) -> None:
    members = {"0.png": image(), "0.json": about(label=[0]), "1.png": b"", "1.json": about(label=[0, 2])}
    tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=r"no image of class 2 in train of .* can be read; replace them"):
        open_source(data(tmp_path), "train", unreadable=lambda split, listing: ["a/1"])


def test_what_webdataset_writes_and_reads_is_what_we_read(tmp_path: Path) -> None:
    """The same samples under the same names, also where directories have dots and names many."""
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"v1.0/{number:03d}", "big.name.txt": "x", "cls": number, "png": image()}
            )
    with (tmp_path / "a.tar").open("rb") as file:
        theirs = list(group_by_keys(tar_file_expander([{"url": "a.tar", "stream": file}])))
    expected = {f"a/{sample['__key__']}": int(sample["cls"]) for sample in theirs}
    assert labels(data(tmp_path)) == expected
    assert len(expected) == 5


class Trap:
    """Unpickled, it fails the test."""

    def __reduce__(self) -> tuple[object, ...]:
        return (pytest.fail, ("unpickled",))


def test_other_members_are_left_alone(tmp_path: Path) -> None:
    tar(
        tmp_path / "a.tar",
        {
            "README": b"text",
            "about.txt": b"text",
            "__meta__/0.json": b"{",
            "0.pkl": pickle.dumps(Trap()),
            "0.pyd": pickle.dumps(Trap()),
            "0.cls": b"0",
            "0.png": image(),
        },
    )
    assert labels(data(tmp_path)) == {"a/0": 0}


def test_patterns(tmp_path: Path) -> None:
    for number in range(3):
        tar(tmp_path / f"s/train-{number:06d}.tar", {"x.png": image(), "x.cls": str(number).encode()})
    expected = {f"s/train-{number:06d}/x": number for number in range(3)}
    for pattern in ("s/train-{000000..000002}.tar", "s/*.tar", "**/train-*.tar", "s/train-00000[012].tar"):
        assert labels(data(tmp_path, pattern)) == expected
    assert labels(data(tmp_path, "s/train-000001.tar")) == {"s/train-000001/x": 1}
    keys = [open_source(data(tmp_path, "s/*.tar"), "train").key(row) for row in range(3)]
    assert sorted(keys) == [f"s--train-{number:06d}--x" for number in range(3)]


def test_the_classes_are_the_same_in_all_splits(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.png": image(), "x.cls": b"4"})
    tar(tmp_path / "b.tar", {"x.png": image(), "x.cls": b"1"})
    both = data(tmp_path, shards={"train": "a.tar", "test": "b.tar"})
    assert split_names(both) == ["train", "test"]
    assert open_source(both, "test").classes == ["0", "1", "2", "3", "4"]
    named = data(tmp_path, "b.tar", classes=["cat", "dog"])
    assert open_source(named, "train").classes == ["cat", "dog"]


def test_unlabelled_shards_have_no_classes(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.png": image(), "y.png": image()})
    assert open_source(data(tmp_path), "train").classes == []


def test_a_tar_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.png": image(), "x.cls": b"1"})
    first = open_source(data(tmp_path), "train").describe()
    tar(tmp_path / "a.tar", {"x.png": image(), "x.cls": b"1", "y.png": image(), "y.cls": b"0"})
    assert labels(data(tmp_path)) == {"a/x": 1, "a/y": 0}
    assert open_source(data(tmp_path), "train").describe() != first


# --- every way to be wrong


@pytest.mark.parametrize("pattern", ["a.tar", "train-{0..3}.tar", "*.tar", "http://host/{0..1}.tar"])
def test_a_missing_tar(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(DataError, match=r"does not exist; set data\.root and data\.shards\.train"):
        split_names(data(tmp_path, pattern))


@pytest.mark.parametrize("pattern", ["/tmp/a.tar", "../a.tar", "{a.tar"])
def test_a_pattern_that_cannot_be(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.shards\.train: "):
        split_names(data(tmp_path, pattern))


CUT = {"in the pixels": 700, "in a header": 1700, "before a header": 1536, "before the end": 2560, "empty": 0}


@pytest.mark.parametrize("length", CUT.values(), ids=CUT.keys())
def test_a_truncated_tar(tmp_path: Path, length: int) -> None:
    """Members are a header of 512 bytes and whole blocks of 512: 0..1536, 1536..2560, then the end."""
    path = tar(tmp_path / "a.tar", {"x.png": image().ljust(600, b"\0"), "x.cls": b"1"})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"cannot read .*a\.tar .*cut off, damaged or compressed"):
        open_source(data(tmp_path), "train")


def test_a_damaged_header_in_the_middle(tmp_path: Path) -> None:
    path = tar(tmp_path / "a.tar", {"x.png": image().ljust(600, b"\0"), "x.cls": b"1"})
    content = bytearray(path.read_bytes())
    content[1540] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"no header and no end at byte 1536"):
        open_source(data(tmp_path), "train")


def test_a_compressed_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.png"))
    with pytest.raises(DataError, match=r"a\.tar .*compressed"):
        open_source(data(tmp_path), "train")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"x.png": b"", "x.cls": b"-1"}, r"a\.tar, x\.cls: the label '-1' is not a class index"),
        ({"x.png": b"", "x.cls": b"cat"}, r"a\.tar, x\.cls: the label 'cat'"),
        ({"x.png": b"", "x.json": b"{"}, r"a\.tar, x\.json is no JSON"),
        ({"x.png": b"", "x.json": b"[" * 100_000}, r"a\.tar, x\.json is no JSON"),
        ({"x.png": b"", "x.json": b"[1]"}, r"a\.tar, x\.json is no JSON object"),
        ({"x.png": b"", "x.json": about(label="cat")}, r"a\.tar, x\.json: the label 'cat'"),
        ({"x.png": b"", "x.json": about(label=True)}, r"a\.tar, x\.json: the label True"),
        ({"x.png": b"", "x.json": about(label=[0, -3])}, r"a\.tar, x\.json: the label -3"),
        ({"x.png": b"", "x.json": about(label=0, group="a")}, r"a\.tar, x\.json: the label 'a'"),
        ({"x.png": b"", "x.json": about(label=0, group=[1])}, r"a\.tar, x\.json: the group \[1\]"),
        ({"x.png": b"", "x.json": about(label=0, boxes=[[0, 1, 2, 3]])}, r"a\.tar, x\.json: boxes are no"),
        ({"x.png": b"", "x.json": about(label=0, boxes=[[0, 5, 2, 3, 9]])}, "a box is empty"),
        ({"x.png": b"", "x.json": about(label=0, boxes=[[0.5, 1, 2, 3, 9]])}, "its class is no integer"),
        ({"x.png": b"", "x.json": about(label=0, boxes=[[0, 1, 2, 3, 1e300]])}, "boxes are no list"),
        ({"x.png": b"", "x.json": about(label=0, boxes=[[3e38, 1, 2, 3, 4]])}, "boxes are no list"),
        ({"x.png": b"", "x.json": about(label=0, boxes=[[7, 1, 2, 3, 9]])}, "class 7 is out of range"),
        ({"x.cls": b"1"}, r"a\.tar: the sample x has no image"),
        ({"x.png": b"", "./x.png": b""}, r"a\.tar has two samples x, not beside each other"),
        ([("x.png", b""), ("x.png", b"")], r"a\.tar, x\.png: the sample has two files \.png"),
        (
            [("x.png", b""), ("y.png", b""), ("x.png", b"")],
            r"a\.tar has two samples x, not beside each other",
        ),
    ],
)
def test_wrong_members(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    tar(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message):
        open_source(data(tmp_path), "train")


@pytest.mark.parametrize("member", [("x.cls", b"2"), ("x.json", about(label=[0, 2]))])
def test_a_label_out_of_range(tmp_path: Path, member: tuple[str, bytes]) -> None:
    tar(tmp_path / "a.tar", [("x.png", image()), member])
    with pytest.raises(
        DataError, match=rf"a\.tar, {member[0]}: class 2 is out of range, there are 2 classes"
    ):
        open_source(data(tmp_path, classes=["cat", "dog"]), "train")


def test_a_label_beyond_reason_makes_no_billion_classes(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.png": image(), "x.cls": b"999999999"})
    with pytest.raises(DataError, match="class 999999999 is out of range"):
        open_source(data(tmp_path), "train")


def test_val_per_class_without_train(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.png": image(), "x.cls": b"1"})
    config = data(tmp_path, shards={"test": "a.tar"}, val_per_class=1)
    with pytest.raises(
        ConfigError, match=r"data\.val_per_class: .* has no train to hold images out of, only test"
    ):
        open_source(config, "train")


def test_an_unreadable_image(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.png": image()[:60]})
    with pytest.raises(DataError, match=r"a\.tar, x\.png"):
        open_source(data(tmp_path), "train").raw(0)


def test_a_mask_of_another_size_or_no_image(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", {"x.png": image(), "x.mask.png": half_mask((8, 8))})
    tar(tmp_path / "b.tar", {"x.png": image(), "x.mask.png": b"no image"})
    with pytest.raises(DataError, match=r"a\.tar, x\.mask\.png has 8 x 8 px, its image 40 x 30"):
        open_source(data(tmp_path), "train").raw(0)
    with pytest.raises(DataError, match=r"cannot read the mask .*b\.tar, x\.mask\.png"):
        open_source(data(tmp_path, "b.tar"), "train").raw(0)
