"""Data sets in the layouts in which their authors publish them: one module each, chosen here."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.config import (
    Cifar,
    Files,
    Folder,
    HuggingFace,
    ImageNet,
    Sun397,
    TinyImageNet,
    Voc,
    Waterbirds,
    WebShards,
)
from pipeline.data.reading.listing import Listing

MODULES: dict[type[Files], str] = {
    Folder: "folder",
    ImageNet: "imagenet",
    Sun397: "sun397",
    Cifar: "cifar",
    TinyImageNet: "tiny_imagenet",
    Waterbirds: "waterbirds",
    Voc: "voc",
    WebShards: "webshards",
    HuggingFace: "huggingface",
}


def split_names(data: Files) -> list[str]:
    """The splits as published, before any validation split is cut. DataError where the root is not that data set."""
    return list(_module(data).split_names(data))


def open_listing(data: Files, split: str) -> Listing:
    """One of the published splits, in any order."""
    listing: Listing = _module(data).open_listing(data, split)
    return listing


def _module(data: Files) -> Any:
    """Imported when it is needed: some want pyarrow or webdataset."""
    return importlib.import_module(f"pipeline.data.sources.{MODULES[type(data)]}")
