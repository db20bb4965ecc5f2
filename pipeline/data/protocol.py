"""Which images of a published data set are train, val and test, and which rows a student sees: the protocols of the
paper's experiments."""

from __future__ import annotations

import hashlib
import posixpath
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from artifacts.access import reading_from
from artifacts.errors import ConfigError, DataError
from pipeline.config import Files
from pipeline.config.data import Folder
from pipeline.data.reading.keys import name_bytes, printable, rank, safe_keys
from pipeline.data.reading.listing import Entry, Listing
from pipeline.data.source import Label, RawSample
from pipeline.data.sources import lister
from pipeline.data.sources.folder import pick

FindUnreadable = Callable[[str, Listing], Collection[str]]
"""(published split, its listing) -> ids of the images to leave out."""


def split_names(data: Files) -> list[str]:
    """The published splits, and `val` if the config holds one out of `train`. Raises ConfigError if it cannot."""
    with reading_from(data.root, DataError):
        names = list(lister(data).split_names(data))
    if data.val_per_class is not None and "val" in names:
        raise ConfigError(
            f"data.val_per_class: {data.source} has its own val ({data.root}); remove val_per_class",
            path=data.root,
            key="data.val_per_class",
        )
    if "val" in names or (data.val_per_class is None and not isinstance(data, Folder)):
        return names
    if "train" not in names:
        raise ConfigError(
            f"data.val_per_class: {data.root} has no train to hold images out of, only {', '.join(names)}; remove it",
            path=data.root,
            key="data.val_per_class",
        )
    return ["train", "val", *(name for name in names if name != "train")]


def open_split(
    data: Files, split: str, shorter_side: int | None, unreadable: FindUnreadable | None = None
) -> ListedSource:
    """A split in the order of its rows. The images that `unreadable` finds are left out before the split is cut."""
    origin = published_split(data, split)
    with reading_from(data.root, DataError):
        listing = lister(data).open_listing(data, origin)
    _check_once(data, origin, listing)
    left_out = frozenset(unreadable(origin, listing) if unreadable else ())
    entries = [entry for entry in listing.entries if entry.id not in left_out]
    if not entries:
        raise DataError(
            f"split {origin} of {data.root} has no {'readable ' if left_out else ''}images; add some",
            path=data.root,
        )
    _check_labels(data, listing, entries)
    _check_classes_left(data, origin, listing, entries)
    entries = _cut(in_order(entries, data.split_seed), data, split, listing.classes)
    if not entries:
        raise DataError(
            f"no image of {data.root} is left for split {split}; hold fewer out, or add images",
            path=data.root,
        )
    return ListedSource(data.source, split, listing, entries, len(left_out), shorter_side)


def _check_classes_left(data: Files, split: str, listing: Listing, entries: Sequence[Entry]) -> None:
    """Raises DataError if a class has lost all of its images."""
    gone = _labels(listing.entries) - _labels(entries)
    if gone:
        raise DataError(
            f"no image of class {listing.classes[min(gone)]} in {split} of {data.root} can be read; replace them, or "
            "remove the class",
            path=data.root,
        )


def published_split(data: Files, split: str) -> str:
    """The published split that a split's images come from."""
    return "train" if split == "val" and not _has_val(data) else split


def cut_together(data: Files, split: str) -> list[str]:
    """The splits whose images come from the same published split, itself among them."""
    origin = published_split(data, split)
    return [name for name in split_names(data) if published_split(data, name) == origin]


def in_order(entries: Iterable[Entry], seed: int) -> list[Entry]:
    """By a hash of (seed, id): any first n are a random choice, the same on every machine."""
    return sorted(entries, key=lambda entry: (rank(entry.id, seed), entry.id))


def _cut(entries: list[Entry], data: Files, split: str, classes: Sequence[str]) -> list[Entry]:
    """Of the published split's images in order: the first of each class are val, the next ones train."""
    if published_split(data, split) != "train":
        return entries
    if isinstance(data, Folder) and data.val_per_class is None and not _has_val(data):
        entries = pick(entries, data, split)
    held_out, shots, in_val = data.val_per_class or 0, data.train_per_class, split == "val"
    if not held_out and (in_val or shots is None):
        return entries
    labels = _one_label_each(entries, "val_per_class" if held_out else "train_per_class")
    _check_enough(Counter(labels), held_out + (0 if in_val else shots or 1), data, classes)
    val = _taken(entries, labels, held_out, data)
    if in_val:
        return [entries[position] for position in sorted(val)]
    rest = sorted(set(range(len(entries))) - val)
    entries, labels = [entries[position] for position in rest], [labels[position] for position in rest]
    if shots is None:
        return entries
    return [entries[position] for position in sorted(_taken(entries, labels, shots, data))]


def _has_val(data: Files) -> bool:
    """Whether the data set is published with a val of its own."""
    return "val" in lister(data).split_names(data)


def _taken(entries: Sequence[Entry], labels: Sequence[int], count: int, data: Files) -> set[int]:
    """Positions of `count` images of each class, by `data.split_rule`."""
    if data.split_rule == "authors":
        return _as_the_authors(entries, labels, count, data.split_seed)
    return first_of_each_class(labels, count)


def first_of_each_class(labels: Iterable[Label], count: int) -> set[int]:
    """Positions of the first `count` of each class."""
    seen: Counter[Label] = Counter()
    positions = set()
    for position, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= count:
            positions.add(position)
    return positions


def select_rows(labels: Sequence[Label], rows: int | None, shots: int | None) -> np.ndarray:
    """The rows of a packed split that a student sees, i64 [N]: the first `rows`, of these the first `shots` of each
    class."""
    count = len(labels) if rows is None else min(rows, len(labels))
    if shots is None:
        return np.arange(count)
    return np.array(sorted(first_of_each_class(labels[:count], shots)), np.int64)


def _as_the_authors(entries: Sequence[Entry], labels: Sequence[int], count: int, seed: int) -> set[int]:
    """Positions of the images that e2KD's released code takes (its `find_fewshot_indices`, from Big Transfer).

    Of the images in the order of torchvision's ImageFolder, shuffled by a torch DataLoader after `manual_seed(seed)`:
    the last `count` of each class, seen until every class has as many.
    """
    if not count:
        return set()
    by_folder = sorted(
        range(len(entries)),
        key=lambda position: (labels[position], *posixpath.split(entries[position].id)),
    )
    latest: dict[int, deque[int]] = {label: deque(maxlen=count) for label in labels}
    missing = count * len(latest)
    for index in _loader_order(len(entries), seed):
        position = by_folder[index]
        kept = latest[labels[position]]
        missing -= len(kept) < count
        kept.append(position)
        if not missing:
            break
    return {position for kept in latest.values() for position in kept}


def _loader_order(count: int, seed: int) -> list[int]:
    """The order in which `DataLoader(..., shuffle=True)` visits `count` samples after `torch.manual_seed(seed)`."""
    # Only here: `e2kd pack` does not need it otherwise.
    import torch

    draws = torch.Generator().manual_seed(seed)

    def draw() -> int:
        return int(torch.empty((), dtype=torch.int64).random_(generator=draws))

    # The first number is the loader's own seed, the next one its sampler's.
    draw()
    return torch.randperm(count, generator=torch.Generator().manual_seed(draw())).tolist()


def _one_label_each(entries: Sequence[Entry], key: str) -> list[int]:
    labels = []
    for entry in entries:
        if not isinstance(entry.label, int):
            said = "no label" if entry.label is None else f"the labels {list(entry.label)}"
            raise ConfigError(
                f"data.{key} needs one label an image, but {entry.id} has {said}; remove it",
                key=f"data.{key}",
            )
        labels.append(entry.label)
    return labels


def _check_enough(seen: Counter[int], wanted: int, data: Files, classes: Sequence[str]) -> None:
    label = min((label for label in range(len(classes)) if seen[label] < wanted), default=None)
    if label is not None:
        raise DataError(
            f"class {classes[label]} of {data.root} has {seen[label]} images, {wanted} are asked for; lower "
            "data.val_per_class or data.train_per_class",
            path=data.root,
        )


def _check_once(data: Files, split: str, listing: Listing) -> None:
    seen: set[str] = set()
    for entry in listing.entries:
        if entry.id in seen:
            raise DataError(
                f"split {split} of {data.root} lists {printable(entry.id)} twice; remove one of the two lines",
                path=data.root,
                key=entry.id,
            )
        seen.add(entry.id)


def _check_labels(data: Files, listing: Listing, entries: Sequence[Entry]) -> None:
    for entry in entries:
        labels = (entry.label,) if isinstance(entry.label, int) else entry.label or ()
        if any(not 0 <= label < len(listing.classes) for label in labels):
            raise DataError(
                f"{data.root}: {entry.id} has the label {entry.label}, but there are {len(listing.classes)} classes; "
                "correct it",
                path=data.root,
                key=entry.id,
            )


def _labels(entries: Iterable[Entry]) -> set[int]:
    several = ((entry.label,) if isinstance(entry.label, int) else entry.label or () for entry in entries)
    return {label for labels in several for label in labels}


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
        # Masks and boxes are in px of the file: no reduced JPEG.
        whole = mask is not None or entry.boxes is not None
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
