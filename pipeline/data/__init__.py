"""Where images come from: `open_source` opens a split of any data source in the table of `data.sources`."""

from __future__ import annotations

from artifacts.errors import ConfigError
from pipeline.config import DataConfig, Files
from pipeline.config.problems import did_you_mean
from pipeline.data import protocol
from pipeline.data.protocol import FindUnreadable
from pipeline.data.source import RawSample, Reduced, Source
from pipeline.data.sources import drawer

__all__ = ["RawSample", "Source", "open_source", "split_names"]


def split_names(data: DataConfig) -> list[str]:
    """The splits of a data set. Raises DataError if a folder is missing or empty."""
    if isinstance(data, Files):
        return protocol.split_names(data)
    return list(drawer(data).split_names(data))


def open_source(
    data: DataConfig, split: str, shorter_side: int | None = None, unreadable: FindUnreadable | None = None
) -> Source:
    """Open one split of a data set.

    `shorter_side` is the shorter side in px that the view will resize to: large JPEGs are then decoded at a reduced
    scale of at least twice that. `unreadable` finds the images that `on_bad_image: skip` leaves out. Raises ConfigError
    for an unknown split, DataError for unfit folders.
    """
    known = split_names(data)
    if split not in known:
        hint = did_you_mean(split, known, f"it has {', '.join(known)}")
        raise ConfigError(f"data source {data.source} has no split {split!r}; {hint}", key="data")
    source = _open(data, split, shorter_side, unreadable)
    return source if data.limit is None else Reduced(source, data.limit)


def _open(
    data: DataConfig, split: str, shorter_side: int | None, unreadable: FindUnreadable | None
) -> Source:
    if isinstance(data, Files):
        return protocol.open_split(data, split, shorter_side, unreadable)
    return drawer(data).open_split(data, split)
