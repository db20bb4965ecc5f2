"""Which rows of a published data set are train, val and test: the protocols of the paper's experiments."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from artifacts.errors import ConfigError, DataError
from pipeline.config import Files, Folder
from pipeline.data import published
from pipeline.data.folder import pick
from pipeline.data.keys import name_bytes, printable, rank, safe_keys
from pipeline.data.listing import Entry, Listing
from pipeline.data.source import RawSample

FindUnreadable = Callable[[str, Listing], Collection[str]]
"""(published split, its listing) -> ids of the images to leave out."""


def split_names(data: Files) -> list[str]:
    """The published splits, and `val` where the config holds one out of `train`. Raises ConfigError where it cannot."""
    names = published.split_names(data)
    if data.val_per_class is not None and "val" in names:
        raise ConfigError(
            f"data.val_per_class: {data.source} has its own val ({data.root}); remove val_per_class"
        )
    if "val" in names or (data.val_per_class is None and not isinstance(data, Folder)):
        return names
    if "train" not in names:
        raise ConfigError(
            f"data.val_per_class: {data.root} has no train to hold images out of, only {', '.join(names)}; remove it"
        )
    return ["train", "val", *(name for name in names if name != "train")]


def open_split(
    data: Files, split: str, shorter_side: int | None, unreadable: FindUnreadable | None = None
) -> ListedSource:
    """A split in the order of its rows. What `unreadable` finds is left out before anything is cut."""
    origin = published_split(data, split)
    listing = published.open_listing(data, origin)
    left_out = frozenset(unreadable(origin, listing) if unreadable else ())
    entries = [entry for entry in listing.entries if entry.id not in left_out]
    if not entries:
        raise DataError(f"split {origin} of {data.root} has no {'readable ' if left_out else ''}images")
    _check_labels(data, listing, entries)
    entries = _cut(in_order(entries, data.split_seed), data, split, listing.classes)
    if not entries:
        raise DataError(f"no image of {data.root} is left for split {split}; hold fewer out, or add images")
    return ListedSource(data.source, split, listing, entries, len(left_out), shorter_side)


def published_split(data: Files, split: str) -> str:
    """The published split that a split's images come from."""
    return "train" if split == "val" and "val" not in published.split_names(data) else split


def in_order(entries: Iterable[Entry], seed: int) -> list[Entry]:
    """By a hash of (seed, id): any first n are a random choice, the same on every machine."""
    return sorted(entries, key=lambda entry: (rank(entry.id, seed), entry.id))


def _cut(entries: list[Entry], data: Files, split: str, classes: Sequence[str]) -> list[Entry]:
    """Of the published split's images in order: the first of each class are val, the next ones train."""
    if published_split(data, split) != "train":
        return entries
    if isinstance(data, Folder) and "val" not in published.split_names(data) and data.val_per_class is None:
        entries = pick(entries, data, split)
    if split == "val":
        return _per_class(entries, 0, data.val_per_class, data, "val_per_class", classes)
    return _per_class(
        entries, data.val_per_class or 0, data.train_per_class, data, "train_per_class", classes
    )


def _per_class(
    entries: list[Entry], skip: int, count: int | None, data: Files, key: str, classes: Sequence[str]
) -> list[Entry]:
    """Images number skip .. skip + count of each class (count None: all from skip on)."""
    if not skip and count is None:
        return entries
    seen: Counter[int] = Counter()
    kept = []
    for entry in entries:
        if not isinstance(entry.label, int):
            said = "no label" if entry.label is None else f"the labels {list(entry.label)}"
            key = "val_per_class" if skip else key
            raise ConfigError(f"data.{key} needs one label an image, but {entry.id} has {said}; remove it")
        seen[entry.label] += 1
        if seen[entry.label] > skip and (count is None or seen[entry.label] <= skip + count):
            kept.append(entry)
    _check_enough(seen, skip + (1 if count is None else count), data, classes)
    return kept


def _check_enough(seen: Counter[int], wanted: int, data: Files, classes: Sequence[str]) -> None:
    label = min((label for label in range(len(classes)) if seen[label] < wanted), default=None)
    if label is not None:
        raise DataError(
            f"class {classes[label]} of {data.root} has {seen[label]} images, {wanted} are asked for; lower "
            "data.val_per_class or data.train_per_class"
        )


def _check_labels(data: Files, listing: Listing, entries: Sequence[Entry]) -> None:
    for entry in entries:
        labels = (entry.label,) if isinstance(entry.label, int) else entry.label or ()
        if any(not 0 <= label < len(listing.classes) for label in labels):
            raise DataError(
                f"{data.root}: {entry.id} has the label {entry.label}, but there are {len(listing.classes)} classes; "
                "correct it"
            )


@dataclass(frozen=True)
class ListedSource:
    """One split of a data set on disk, as a Source. `left_out`: unreadable images of its published split."""

    name: str
    split: str
    listing: Listing
    entries: Sequence[Entry]
    left_out: int
    shorter_side: int | None

    @property
    def classes(self) -> list[str]:
        return list(self.listing.classes)

    @cached_property
    def _keys(self) -> list[str]:
        return safe_keys([entry.id for entry in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def key(self, row: int) -> str:
        return self._keys[row]

    def raw(self, row: int) -> RawSample:
        entry, listing = self.entries[row], self.listing
        mask = None if listing.mask is None else listing.mask(entry)
        whole = mask is not None or entry.boxes is not None  # which are in px of the file: no reduced JPEG
        return RawSample(
            key=self.key(row),
            image=listing.read(entry, None if whole else self.shorter_side),
            label=entry.label,
            group=entry.group,
            boxes=entry.boxes,
            mask=mask,
            source=printable(entry.id),
        )

    def describe(self) -> str:
        digest = hashlib.sha256()
        for entry in self.entries:
            digest.update(name_bytes(entry.id) + f" {entry.size} {entry.label} {entry.group}\n".encode())
            digest.update(b"" if entry.boxes is None else entry.boxes.tobytes() + b"\n")
        skipped = f", {self.left_out} unreadable left out" if self.left_out else ""
        about = f"{self.name} {self.split}, {len(self)} images{skipped}"
        return f"{about}, names, sizes, labels and boxes {digest.hexdigest()[:16]}"
