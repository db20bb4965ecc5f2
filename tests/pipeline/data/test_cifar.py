"""CIFAR-10 and -100 in the binary version: records of label bytes and 32 x 32 px, channel by channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from artifacts.errors import DataError
from pipeline.config.data import Cifar
from pipeline.data import open_source, split_names

TEN = ["airplane", "automobile", "bird"]


def records(labels: list[list[int]], seed: int) -> np.ndarray:
    """u8 [images, label bytes + 3072]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3072), np.uint8)
    return np.concatenate([np.array(labels, np.uint8), pixels], axis=1)


def cifar10(root: Path) -> dict[str, np.ndarray]:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    (folder / "batches.meta.txt").write_text("\n".join(TEN) + "\n\n")
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    tables = {name: records([[0], [2], [1], [0]], seed) for seed, name in enumerate(names)}
    for name, table in tables.items():
        (folder / f"{name}.bin").write_bytes(table.tobytes())
    return tables


def cifar100(root: Path) -> dict[str, np.ndarray]:
    folder = root / "cifar-100-binary"
    folder.mkdir(parents=True)
    (folder / "fine_label_names.txt").write_text("\n".join(f"fine_{k}" for k in range(8)) + "\n")
    (folder / "coarse_label_names.txt").write_text("coarse_0\ncoarse_1\n")
    tables = {name: records([[1, 7], [0, 3], [1, 7]], seed) for seed, name in enumerate(("train", "test"))}
    for name, table in tables.items():
        (folder / f"{name}.bin").write_bytes(table.tobytes())
    return tables


def data(root: Path, source: str = "cifar10", **settings: object) -> Cifar:
    return Cifar.model_validate({"source": source, "root": root, **settings})


def test_cifar10_from_its_folder_or_the_one_above(tmp_path: Path) -> None:
    cifar10(tmp_path)
    for root in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        assert split_names(data(root)) == ["train", "test"]
        train, test = open_source(data(root), "train"), open_source(data(root), "test")
        assert (len(train), len(test)) == (20, 4)
        assert train.classes == TEN
        assert sorted(str(train.raw(row).label) for row in range(20)) == ["0"] * 10 + ["1"] * 5 + ["2"] * 5


def test_pixels_are_those_of_the_record(tmp_path: Path) -> None:
    tables = cifar10(tmp_path)
    train = open_source(data(tmp_path), "train")
    for row in range(len(train)):
        raw = train.raw(row)
        name, _, number = str(raw.source).partition("/")
        record = tables[name][int(number)]
        assert raw.label == record[0]
        assert raw.key == f"{name}--{int(number):05d}"
        y, x = 5, 17  # red of row 5, column 17 is byte 5 * 32 + 17; green 1024 further, blue 2048
        assert raw.image.getpixel((x, y)) == tuple(int(record[1 + c * 1024 + y * 32 + x]) for c in range(3))


def test_cifar100_has_the_fine_labels(tmp_path: Path) -> None:
    tables = cifar100(tmp_path)
    test = open_source(data(tmp_path, "cifar100"), "test")
    assert len(test.classes) == 8
    raws = [test.raw(row) for row in range(3)]
    assert {raw.source: raw.label for raw in raws} == {"test/00000": 7, "test/00001": 3, "test/00002": 7}
    pixels = tables["test"][1, 2:].reshape(3, 32, 32).transpose(1, 2, 0)
    image = next(raw.image for raw in raws if raw.source == "test/00001")
    assert np.array_equal(np.asarray(image), pixels)


def test_a_wrong_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere has no cifar-10-batches-bin/batches\.meta\.txt; fetch"):
        open_source(data(tmp_path / "nowhere"), "train")


@pytest.mark.parametrize(
    ("source", "marker", "archive"),
    [
        ("cifar10", "cifar-10-batches-py/batches.meta", "cifar-10-binary.tar.gz"),
        ("cifar10", "batches.meta", "cifar-10-binary.tar.gz"),
        ("cifar100", "cifar-100-python/meta", "cifar-100-binary.tar.gz"),
        ("cifar100", "meta", "cifar-100-binary.tar.gz"),
    ],
)
def test_the_pickled_version_is_refused(tmp_path: Path, source: str, marker: str, archive: str) -> None:
    (tmp_path / marker).parent.mkdir(exist_ok=True)
    (tmp_path / marker).write_bytes(b"\x80\x04.")
    with pytest.raises(DataError, match=rf"e2kd unpickles nothing: fetch {archive}"):
        open_source(data(tmp_path, source), "train")


def test_a_missing_batch(tmp_path: Path) -> None:
    cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-bin/data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"data_batch_4\.bin is missing or empty; fetch cifar-10-binary"):
        open_source(data(tmp_path), "train")
    assert len(open_source(data(tmp_path), "test")) == 4


def test_a_truncated_batch(tmp_path: Path) -> None:
    cifar10(tmp_path)
    file = tmp_path / "cifar-10-batches-bin/test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"test_batch\.bin has 12291 bytes, not a multiple of 3073"):
        open_source(data(tmp_path), "test")


def test_a_label_out_of_range_names_the_image(tmp_path: Path) -> None:
    table = cifar10(tmp_path)["test_batch"]
    table[2, 0] = 3
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").write_bytes(table.tobytes())
    with pytest.raises(DataError, match=r"test_batch\.bin: image 2 has the label 3, but there are 3 classes"):
        open_source(data(tmp_path), "test")
