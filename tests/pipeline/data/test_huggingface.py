"""Hugging Face data sets: parquet files and image folders with metadata.jsonl, and every way to be wrong."""

from __future__ import annotations

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from artifacts.errors import ConfigError, DataError
from pipeline.config.data import HuggingFace
from pipeline.data import open_source, split_names
from pipeline.data.reading.parquet import GroupCache, ParquetFile
from pipeline.data.source import RawSample


def encoded(red: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (red, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def data(root: Path, **settings: object) -> HuggingFace:
    return HuggingFace.model_validate({"source": "huggingface", "root": root, **settings})


def samples(config: HuggingFace, split: str = "train") -> dict[str | None, RawSample]:
    source = open_source(config, split)
    return {raw.source: raw for raw in map(source.raw, range(len(source)))}


def labels(config: HuggingFace, split: str = "train") -> list[object]:
    return [raw.label for _, raw in sorted(samples(config, split).items(), key=lambda item: str(item[0]))]


# --- parquet


def parquet(
    path: Path,
    labels: list[Any] | None,
    feature: object = None,
    struct: bool = True,
    first: int = 0,
    column: str = "label",
) -> Path:
    """Images in reds first, first + 1, ...; three rows a group; `feature`: what the hub writes about the label."""
    reds = range(first, first + (3 if labels is None else len(labels)))
    images = [{"bytes": encoded(red), "path": None} if struct else encoded(red) for red in reds]
    table = pa.table({"image": images} | ({} if labels is None else {column: labels}))
    if feature is not None:
        about = {"info": {"features": {"image": {"_type": "Image"}, column: feature}}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps(about).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


NAMES = {"names": ["cat", "dog"], "_type": "ClassLabel"}


@pytest.mark.parametrize("layout", ["data/{}-00000-of-00001.parquet", "{}-0.parquet", "{}/0000.parquet"])
@pytest.mark.parametrize("struct", [True, False])
def test_layouts_and_names_from_the_schema(tmp_path: Path, layout: str, struct: bool) -> None:
    parquet(tmp_path / layout.format("train"), [0, 1, 1, 0, 1], NAMES, struct)
    parquet(tmp_path / layout.format("validation"), [0, -1], NAMES, struct, first=100)
    assert split_names(data(tmp_path)) == ["train", "val"]
    assert open_source(data(tmp_path), "train").classes == ["cat", "dog"]
    assert labels(data(tmp_path)) == [0, 1, 1, 0, 1]
    assert labels(data(tmp_path), "val") == [0, None]
    name = layout.format("train").removesuffix(".parquet")
    assert {source: raw.image.getpixel((9, 9)) for source, raw in samples(data(tmp_path)).items()} == {
        f"{name}/{row:08d}": (row, 0, 0) for row in range(5)
    }


def test_several_files_of_a_split(tmp_path: Path) -> None:
    parquet(tmp_path / "data/train-00000-of-00002.parquet", [0, 1, 0, 1])
    parquet(tmp_path / "data/train-00001-of-00002.parquet", [2, 2], first=10)
    found = samples(data(tmp_path))
    assert found["data/train-00001-of-00002/00000001"].image.getpixel((0, 0)) == (11, 0, 0)
    assert labels(data(tmp_path)) == [0, 1, 0, 1, 2, 2]
    source = open_source(data(tmp_path), "train")
    assert source.classes == ["0", "1", "2"]
    assert sorted(source.key(row) for row in range(6))[0] == "data--train-00000-of-00002--00000000"


@pytest.mark.parametrize(
    "feature", [{"feature": NAMES, "_type": "Sequence"}, {"feature": NAMES, "_type": "List"}, [NAMES]]
)
def test_lists_of_labels(tmp_path: Path, feature: object) -> None:
    parquet(tmp_path / "train-0.parquet", [[1, 0], [1], [], None], feature)
    assert labels(data(tmp_path)) == [(0, 1), (1,), (), None]
    assert open_source(data(tmp_path), "train").classes == ["cat", "dog"]


def test_names_as_labels_are_sorted_over_all_splits(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", ["dog", "ant"])
    parquet(tmp_path / "test-0.parquet", ["cat"])
    assert open_source(data(tmp_path), "train").classes == ["ant", "cat", "dog"]
    assert labels(data(tmp_path)) == [2, 0]
    assert labels(data(tmp_path), "test") == [1]


def test_the_columns_are_the_configs(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", [1, 0], column="fine_label")
    assert labels(data(tmp_path, label="fine_label")) == [1, 0]
    assert labels(data(tmp_path, label=None)) == [None, None]
    assert open_source(data(tmp_path, label=None), "train").classes == []
    with pytest.raises(DataError, match=r"no column 'label'; set data\.label to one of image, fine_label"):
        open_source(data(tmp_path), "train")
    with pytest.raises(DataError, match=r"no column 'img'; set data\.image to one of image"):
        open_source(data(tmp_path, image="img", label=None), "train")


@pytest.mark.parametrize(("most", "reads"), [(10**6, 3), (1, 8)])
def test_row_groups_are_kept_while_there_is_room(tmp_path: Path, most: int, reads: int) -> None:
    """Eight rows in groups of three, in turns from each group: all are right, and each group is read once, or often."""
    path = parquet(tmp_path / "train-0.parquet", [0] * 8)
    cache = Counting(most)
    file = ParquetFile(path, "image", cache)
    order = [0, 3, 6, 1, 4, 7, 2, 5]
    assert [file.encoded(row) for row in order] == [encoded(row) for row in order]
    assert (len(file), cache.misses) == (8, reads)


class Counting(GroupCache):
    """Counts the groups that were not kept."""

    misses = 0

    def group(self, path: Path, group: int, column: str) -> Any:
        self.misses += (path, group) not in self._groups
        return super().group(path, group, column)


def test_threads_read_the_same_rows(tmp_path: Path) -> None:
    """`data.on_bad_image: skip` reads in threads; here they take each other's only row group away."""
    file = ParquetFile(parquet(tmp_path / "train-0.parquet", [0] * 12), "image", GroupCache(1))
    order = [7 * step % 12 for step in range(96)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(file.encoded, order)) == [encoded(row) for row in order]


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "train-0.parquet", [0])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'e2kd\[parquet\]'"):
        open_source(data(tmp_path), "train")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 2], r"train-0\.parquet, row 1: class 2 is out of range, there are 2 classes"),
        ([0, -2], r"train-0\.parquet, row 1: the label -2 is not a class index"),
        ([0.5, 1.5], r"train-0\.parquet, row 0: the label 0\.5"),
        (["cat", "bird"], r"train-0\.parquet, row 1: the label 'bird'"),
    ],
)
def test_a_label_out_of_range(tmp_path: Path, labels: list[Any], message: str) -> None:
    parquet(tmp_path / "train-0.parquet", labels, NAMES)
    with pytest.raises(DataError, match=message):
        open_source(data(tmp_path), "train")


def test_files_that_name_different_classes(tmp_path: Path) -> None:
    parquet(tmp_path / "train-0.parquet", [0], NAMES)
    parquet(tmp_path / "test-0.parquet", [0], {"names": ["dog", "cat"]})
    with pytest.raises(DataError, match="name different classes"):
        open_source(data(tmp_path), "train")


@pytest.mark.parametrize("content", [b"no parquet", b"", "cut"])
def test_a_damaged_file(tmp_path: Path, content: bytes | str) -> None:
    path = parquet(tmp_path / "train-0.parquet", [0] * 9)
    path.write_bytes(content if isinstance(content, bytes) else path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cannot read .*train-0\.parquet"):
        open_source(data(tmp_path), "train")


def test_rows_without_an_image(tmp_path: Path) -> None:
    images = [{"bytes": b"no image", "path": None}, {"bytes": None, "path": "a.png"}]
    pq.write_table(pa.table({"image": images, "label": [0, 0]}), tmp_path / "train-0.parquet")
    source = open_source(data(tmp_path), "train")
    messages = {
        0: r"train-0\.parquet, row 0 is not a JPEG",
        1: r"train-0\.parquet, row 1: image holds no bytes",
    }
    for row in range(2):
        with pytest.raises(DataError, match=messages[int(source.key(row)[-1])]):
            source.raw(row)


# --- images with metadata.jsonl


def folder(root: Path, lines: list[dict[str, Any]], images: bool = True) -> Path:
    """metadata.jsonl, and an image in red i for line i."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for red, line in enumerate(lines) if images else ():
        path = root / line["file_name"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(red))
    return root


def test_one_metadata_file_is_train_or_split_by_folders(tmp_path: Path) -> None:
    folder(tmp_path / "flat", [{"file_name": f"{i}.png", "label": i} for i in range(3)])
    assert split_names(data(tmp_path / "flat")) == ["train"]
    assert labels(data(tmp_path / "flat")) == [0, 1, 2]
    names = ["train/a/0.png", "validation/1.png", "test/2.png", "train/3.png"]
    folder(tmp_path / "deep", [{"file_name": name, "label": 1} for name in names])
    assert split_names(data(tmp_path / "deep")) == ["train", "val", "test"]
    assert set(samples(data(tmp_path / "deep"))) == {"train/a/0.png", "train/3.png"}
    assert samples(data(tmp_path / "deep"), "val")["validation/1.png"].image.getpixel((0, 0)) == (1, 0, 0)


def test_a_metadata_file_a_split(tmp_path: Path) -> None:
    folder(
        tmp_path / "train",
        [{"file_name": "a.png", "label": "dog"}, {"file_name": "b.png", "label": ["ant", "dog"]}],
    )
    folder(
        tmp_path / "validation",
        [{"file_name": "a.png", "label": "cat"}, {"file_name": "c.png", "label": None}],
    )
    assert split_names(data(tmp_path)) == ["train", "val"]
    assert open_source(data(tmp_path), "val").classes == ["ant", "cat", "dog"]
    assert labels(data(tmp_path)) == [2, (0, 2)]
    assert labels(data(tmp_path), "val") == [1, None]


def test_objects_are_boxes(tmp_path: Path) -> None:
    """x y width height 4 5 10 20 -> edges 4, 5, 14, 25; the image stays whole for them."""
    objects = {"bbox": [[4, 5, 10, 20], [0.5, 0, 1, 2]], "categories": [1, 0]}
    folder(
        tmp_path,
        [
            {"file_name": "a.png", "label": 1, "objects": objects},
            {"file_name": "b.png", "label": 0, "objects": {"bbox": [], "categories": []}},
            {"file_name": "c.png", "label": 0},
        ],
    )
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes(encoded(0, "JPEG"))  # decoded small for a small view, but for boxes
    source = open_source(data(tmp_path), "train", 6)
    found = {raw.source: raw for raw in map(source.raw, range(3))}
    assert (found["a.png"].image.size, found["c.png"].image.size) == ((40, 30), (20, 15))
    boxes, none = found["a.png"].boxes, found["b.png"].boxes
    assert boxes is not None
    assert boxes.tolist() == [[1, 4, 5, 14, 25], [0, 0.5, 0, 1.5, 2]]
    assert none is not None
    assert none.shape == (0, 5)
    assert found["c.png"].boxes is None


def test_a_wrong_root(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"has no metadata\.jsonl with images, and no parquet files"):
            split_names(data(root))


def test_a_missing_image(tmp_path: Path) -> None:
    folder(tmp_path, [{"file_name": "a.png", "label": 0}], images=False)
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1 names .*a\.png, which cannot be read"):
        open_source(data(tmp_path), "train")


def test_an_unreadable_image(tmp_path: Path) -> None:
    folder(tmp_path, [{"file_name": "a.png", "label": 0}])
    (tmp_path / "a.png").write_bytes(encoded(3)[:40])
    with pytest.raises(DataError, match=r"a\.png"):
        open_source(data(tmp_path), "train").raw(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"label": 0}, "has no file_name"),
        ({"file_name": "../a.png", "label": 0}, "not a file below"),
        ({"file_name": "a\0.png", "label": 0}, "which no file can be called"),
        ({"file_name": "\ud800.png", "label": 0}, "which no file can be called"),
        (
            {"file_name": "a.png", "text": "a cat"},
            r"has no 'label'; set data\.label to one of file_name, text, or to null",
        ),
        ({"file_name": "a.png", "label": -2}, "the label -2 is not a class index"),
        ({"file_name": "a.png", "label": {"x": 1}}, "is not a class index"),
        ({"file_name": "a.png", "label": ["cat", 1]}, "labels are names here and numbers before"),
        ({"file_name": "a.png", "label": 0, "objects": {"bbox": [[1, 2, 3, 4]]}}, "objects are no bbox"),
        (
            {"file_name": "a.png", "label": 0, "objects": {"bbox": [[1, 2, 3]], "categories": [0]}},
            "objects are no bbox",
        ),
        (
            {"file_name": "a.png", "label": 0, "objects": {"bbox": [[1, 2, 0, 4]], "categories": [0]}},
            "a box is empty",
        ),
        (
            {"file_name": "a.png", "label": 0, "objects": {"bbox": [[1, 2, 3, 4]], "categories": [9]}},
            "class 9 is out of range",
        ),
    ],
)
def test_a_wrong_line(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    folder(tmp_path, [line], images=False)
    with pytest.raises(
        DataError, match=rf"metadata\.jsonl, line 1:? .*{message}|metadata\.jsonl, line 1:? {message}"
    ):
        open_source(data(tmp_path), "train")


def test_text_may_have_line_separators(tmp_path: Path) -> None:
    """U+2028 may stand in JSON as it is; it ends no line."""
    folder(tmp_path, [{"file_name": "a.png", "label": 1}])
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "label": 1, "text": "a\u2028b"}\n', "utf-8"
    )
    assert labels(data(tmp_path)) == [1]


def test_no_json(tmp_path: Path) -> None:
    for line in ("{", "[" * 100_000):
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n\n' + line + "\n")
        with pytest.raises(DataError, match=r"metadata\.jsonl, line 3 is no JSON"):
            open_source(data(tmp_path), "train")


def test_an_image_named_twice(tmp_path: Path) -> None:
    folder(tmp_path, [{"file_name": "a.png", "label": 0}] * 2)
    with pytest.raises(DataError, match="names an image twice"):
        open_source(data(tmp_path), "train")
