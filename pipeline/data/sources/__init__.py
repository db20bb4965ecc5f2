"""Every data source: one row of the table, one class in `pipeline/config/data.py`, one module.

The module of a data set on disk lists the images of each split as its authors publish it, and `data.protocol` orders
and cuts them. The module of a generated data set draws each split itself. A module imports what is optional (pyarrow,
scipy) inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pipeline.config import DataConfig, Files
from pipeline.config import data as config
from pipeline.data.reading.listing import Listing
from pipeline.data.source import Source
from pipeline.data.sources import (
    cifar,
    folder,
    huggingface,
    imagenet,
    sun397,
    tiny_imagenet,
    voc,
    waterbirds,
    webshards,
)
from pipeline.data.toys import toybirds, toyshapes

F = TypeVar("F", bound=Files)
D = TypeVar("D", bound=DataConfig)
Some = TypeVar("Some", bound=DataConfig, contravariant=True)


class Lists(Protocol[Some]):
    """The module of a data set on disk."""

    def split_names(self, data: Some) -> Sequence[str]:
        """The splits as published, before any validation split is cut. Raises DataError if `data.root` is not that
        data set."""

    def open_listing(self, data: Some, split: str) -> Listing:
        """One of the published splits, in any order."""


class Draws(Protocol[Some]):
    """The module of a generated data set."""

    def split_names(self, data: Some) -> Sequence[str]: ...

    def open_split(self, data: Some, split: str) -> Source: ...


@dataclass(frozen=True)
class OnDisk(Generic[F]):
    """A row of the table: a data set on disk."""

    config: type[F]
    module: Lists[F]


@dataclass(frozen=True)
class Generated(Generic[D]):
    """A row of the table: a data set that is drawn from a seed."""

    config: type[D]
    module: Draws[D]


TABLE = (
    Generated(config.ToyBirds, toybirds),
    Generated(config.ToyShapes, toyshapes),
    OnDisk(config.Folder, folder),
    OnDisk(config.ImageNet, imagenet),
    OnDisk(config.Sun397, sun397),
    OnDisk(config.Cifar, cifar),
    OnDisk(config.TinyImageNet, tiny_imagenet),
    OnDisk(config.Waterbirds, waterbirds),
    OnDisk(config.Voc, voc),
    OnDisk(config.WebShards, webshards),
    OnDisk(config.HuggingFace, huggingface),
)

_ROWS: dict[type[DataConfig], OnDisk[Any] | Generated[Any]] = {row.config: row for row in TABLE}


def lister(data: F) -> Lists[F]:
    """The module of a data set on disk."""
    row = _ROWS[type(data)]
    assert isinstance(row, OnDisk)
    return row.module


def drawer(data: D) -> Draws[D]:
    """The module of a generated data set."""
    row = _ROWS[type(data)]
    assert isinstance(row, Generated)
    return row.module
