"""The table of data sources and the classes of their settings."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from artifacts.errors import ConfigError
from pipeline.config import parse
from pipeline.config.data import Files
from pipeline.config.sources import SOURCES
from pipeline.data import open_source
from pipeline.data.sources import TABLE, OnDisk

REST: dict[str, Any] = {
    "view": {"size": 48},
    "teacher": {"model": "toy/resnet", "train": {}},
    "students": {"kd": {"model": "toy/resnet"}},
}


def test_the_table_has_one_row_for_each_class_of_settings() -> None:
    assert [row.config for row in TABLE] == list(dict.fromkeys(SOURCES.values()))
    for row in TABLE:
        assert isinstance(row, OnDisk) == issubclass(row.config, Files)


def test_every_source_is_found_by_its_name() -> None:
    extra: dict[str, dict[str, object]] = {"webdataset": {"shards": {"train": "train.tar"}}}
    for name, cls in SOURCES.items():
        root = {"root": "."} if issubclass(cls, Files) else {}
        data = parse({"data": {"source": name, **root, **extra.get(name, {})}, **REST}).data
        assert (type(data), data.source) == (cls, name)


def test_an_unknown_source_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data.source: 'imagnet' is unknown; did you mean imagenet\?"):
        parse({"data": {"source": "imagnet", "root": "."}, **REST})


def test_optional_libraries_wait_for_the_source_that_needs_them() -> None:
    """The table imports every module, but pyarrow and scipy's reader only where their data is."""
    code = (
        "import sys, pipeline.data; print(sorted({'pyarrow', 'scipy.io', 'webdataset'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_source_without_a_split_says_which_it_has() -> None:
    data = parse({"data": {"source": "toybirds"}, **REST}).data
    with pytest.raises(ConfigError, match="no split 'tests'; did you mean test-id"):
        open_source(data, "tests")
