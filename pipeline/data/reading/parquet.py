"""Parquet files as on the Hugging Face hub: labels read as a column, images by row group.

Rows are packed in the order of a hash, and a row group is the least that can be read. Groups are kept until they take
CACHE_BYTES, the oldest go first: a set that fits is read once; of a larger one, an image costs about one group (the
hub's have 100 to 1000 images). Export such a set as an image folder or as WebDataset shards.
"""

from __future__ import annotations

import importlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from artifacts.errors import ConfigError, DataError
from pipeline.config.text import json_of
from pipeline.data.reading.regular import regular_size

CACHE_BYTES = 2**30
LEAST_ROW = 8
"""Bytes of a file per row, at least: an image takes more, however it is compressed."""
MOST_GROWTH, SMALL = 16, 2**26
"""A column takes at most so many times its file's bytes in memory; it may take SMALL bytes in any case."""
BATCH = 256
"""Rows that are decoded together."""


def pyarrow_parquet() -> Any:
    """pyarrow.parquet. Raises ConfigError if pyarrow is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            "data.root holds parquet files; run: pip install 'e2kd[parquet]'", key="data.root"
        ) from None


def files_by_split(root: Path) -> dict[str, list[Path]]:
    """`data/<split>-*.parquet`, `<split>-*.parquet` or `<split>/*.parquet`: the first layout that has a file."""
    for folder in (root / "data", root):
        named = _by_name(sorted(folder.glob("*-*.parquet")))
        if named:
            return named
    folders = sorted({path.parent for path in root.glob("[!.]*/*.parquet")})
    return {folder.name: sorted(folder.glob("*.parquet")) for folder in folders}


def _by_name(paths: list[Path]) -> dict[str, list[Path]]:
    named: dict[str, list[Path]] = {}
    for path in paths:
        named.setdefault(path.name.partition("-")[0], []).append(path)
    return named


class ParquetFile:
    """One file: its number of rows, one column of all rows, and the images row by row."""

    def __init__(self, path: Path, image: str, cache: GroupCache) -> None:
        self.path, self._image, self._cache = path, image, cache
        with opened(path) as file:
            about, self._schema = file.metadata, file.schema_arrow
            sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        _check_rows(sizes, path)
        self._ends = list(accumulate(sizes))
        self._column(image, "data.image")

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def names(self, label: str) -> list[str]:
        """Class names of the label column from the schema's metadata; empty if it has none."""
        try:
            about = json_of((self._schema.metadata or {}).get(b"huggingface", b"{}"))
            return _names(about["info"]["features"][label])
        except (ValueError, KeyError, TypeError):
            return []

    def values(self, column: str) -> list[Any]:
        """The column of all rows, as Python values."""
        self._column(column, "data.label")
        with opened(self.path) as file:
            batches = read_bounded(file, self.path, column, list(range(file.metadata.num_row_groups)))
        return [value for batch in batches for value in batch.to_pylist()]

    def encoded(self, row: int) -> bytes:
        """The image of a row as its file was. Raises DataError if the row has no bytes."""
        group = bisect_right(self._ends, row)
        first = self._ends[group - 1] if group else 0
        value = self._cache.group(self.path, group, self._image)[row - first].as_py()
        data = value.get("bytes") if isinstance(value, Mapping) else value
        if not isinstance(data, bytes):
            raise DataError(
                f"{self.path}, row {row}: {self._image} holds no bytes of an image; export the data set with its "
                "images",
                path=self.path,
                rows=range(row, row + 1),
            )
        return data

    def _column(self, name: str, key: str) -> None:
        if name not in self._schema.names:
            raise DataError(
                f"{self.path} has no column {name!r}; set {key} to one of {', '.join(self._schema.names)}",
                path=self.path,
                key=key,
            )


class GroupCache:
    """Image columns of the row groups read last, up to `most` bytes; one is always kept. Threads may share it."""

    def __init__(self, most: int = CACHE_BYTES) -> None:
        self._most, self._groups = most, OrderedDict[tuple[Path, int], Any]()
        self._lock = threading.Lock()

    def group(self, path: Path, group: int, column: str) -> Any:
        """The column of a row group, as a pyarrow ChunkedArray."""
        with self._lock:
            return self._group(path, group, column)

    def _group(self, path: Path, group: int, column: str) -> Any:
        found = self._groups.pop((path, group), None)
        if found is None:
            with opened(path) as file:
                batches = read_bounded(file, path, column, [group])
            found = importlib.import_module("pyarrow").chunked_array(batches) if batches else []
        self._groups[path, group] = found
        while len(self._groups) > 1 and sum(kept.nbytes for kept in self._groups.values()) > self._most:
            self._groups.popitem(last=False)
        return found


def _check_rows(sizes: Sequence[int], path: Path) -> None:
    """Raises DataError for more rows than images can be in the file, and for row groups without rows or below 0."""
    bytes_, rows = path.stat().st_size, sum(sizes)
    if any(size < 0 for size in sizes) or rows * LEAST_ROW > bytes_:
        raise DataError(
            f"{path} says that it has {rows:,} rows in {bytes_:,} bytes, which no images are; download it again",
            path=path,
        )


def read_bounded(file: Any, path: Path, column: str, groups: list[int]) -> list[Any]:
    """A column of some row groups, as pyarrow arrays. Raises DataError if it grows by more than images and labels do:
    a few bytes can stand for gigabytes."""
    most = max(MOST_GROWTH * path.stat().st_size, SMALL)
    claimed = sum(
        about.total_uncompressed_size
        for group in groups
        for place in range(file.metadata.row_group(group).num_columns)
        if (about := file.metadata.row_group(group).column(place)).path_in_schema.split(".")[0] == column
    )
    batches, taken = [], 0
    if 0 <= claimed <= most:
        for batch in file.iter_batches(BATCH, row_groups=groups, columns=[column], use_threads=False):
            batches.append(batch.column(column))
            taken += batches[-1].nbytes
            if taken > most:
                break
    if not 0 <= claimed <= most or taken > most:
        raise DataError(
            f"{path}: the column {column} takes more than {most:,} bytes in memory, far more than its file; export "
            "the data set again",
            path=path,
            key=column,
        )
    return batches


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises DataError naming a damaged file."""
    parquet, arrow = pyarrow_parquet(), importlib.import_module("pyarrow")
    try:
        regular_size(path)
        with parquet.ParquetFile(path) as file:
            yield file
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"cannot read {path} ({error}): cut off or no parquet file; download it again", path=path
        ) from None


def _names(feature: Any) -> list[str]:
    """ClassLabel names of a feature, or of the elements of a list of it."""
    if isinstance(feature, list):
        return _names(feature[0]) if feature else []
    if "names" in feature:
        return [str(name) for name in feature["names"]]
    return _names(feature["feature"]) if "feature" in feature else []
