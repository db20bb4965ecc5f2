"""Images that cannot be read (`data.on_bad_image: skip`): found before packing, reported, and written down."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from artifacts.errors import DataError
from artifacts.names import in_file_name
from artifacts.names import printable as one_line
from artifacts.places import Place
from pipeline.config.text import json_of
from pipeline.data.reading.keys import name_bytes, printable
from pipeline.data.reading.listing import Entry, Listing
from pipeline.progress import Progress

AT_ONCE = 1024
"""Images handed to the threads together: a data set may have millions."""


class Known(BaseModel):
    """The file: which images were read, and what is wrong by the id of each that could not be."""

    listing: str
    unreadable: dict[str, str]


@dataclass(frozen=True)
class UnreadableImages:
    """Decodes every image of a published split once; what it found lies in `where`/unreadable-<split>.json.

    It names files below `folders`, the data set's own, which are not told: the file is exchanged. It counts for the
    same names, sizes and `shorter_side` (the view's, in px) only. If packing begins anew the images that it names are
    read again: one may have been repaired.

    packing     the split that is packed: the published one, or one that is cut from it
    begun       those of them whose packing has begun, or is finished: their rows stay as they are
    """

    where: Place
    folders: Sequence[Path]
    shorter_side: int | None
    progress: Progress
    packing: str
    begun: Collection[str] = ()

    def __call__(self, split: str, listing: Listing) -> list[str]:
        """The ids of the images that cannot be read, each of them reported unless it was for another split."""
        name, digest = f"unreadable-{in_file_name(split)}.json", _digest(listing, self.shorter_side)
        known = self._known(name, digest)
        found = self._find(split, listing) if known is None else self._still(known, listing)
        if found != known:
            self.where.write(name, json.dumps({"listing": digest, "unreadable": found}, indent=1).encode())
        if self.packing in self.begun or not self.begun:
            self._report(split, found, len(listing.entries))
        return list(found)

    def _report(self, split: str, found: dict[str, str], images: int) -> None:
        for reason in found.values():
            self.progress.say(f"left out: {one_line(reason)}")
        if found:
            count = f"{len(found)} of {images} images"
            self.progress.say(f"{count} of {split} cannot be read and are left out (data.on_bad_image: skip)")

    def _known(self, name: str, digest: str) -> dict[str, str] | None:
        """What an earlier pass found; None if there was no pass, or if the images have changed since."""
        try:
            known = Known.model_validate(json_of(self.where.read(name)))
            return known.unreadable if known.listing == digest else None
        except (FileNotFoundError, ValueError):
            return None

    def _still(self, known: dict[str, str], listing: Listing) -> dict[str, str]:
        """What is still wrong; as known where the split's packing goes on.

        Raises DataError if an image was repaired since another split was cut from the same images: its rows would
        be others now.
        """
        if self.packing in self.begun or not known:
            return known
        entries = [entry for entry in listing.entries if entry.id in known]
        with _threads() as threads:
            found = self._of(entries, listing, threads)
        repaired = next((id for id in known if id not in found), None)
        if repaired is not None and self.begun:
            folders = " ".join(str(self.where / name) for name in self.begun)
            raise DataError(
                f"{printable(repaired)} can be read now, but {' and '.join(self.begun)} left it out; pack again what "
                f"is cut from the same images: rm -r {folders}",
                key=repaired,
            )
        return known if repaired is None else found

    def _find(self, split: str, listing: Listing) -> dict[str, str]:
        """What is wrong, by id."""
        reasons: dict[str, str] = {}
        with (
            _threads() as threads,
            self.progress.bar(f"check {split}", len(listing.entries), "image") as advance,
        ):
            for start in range(0, len(listing.entries), AT_ONCE):
                entries = listing.entries[start : start + AT_ONCE]
                reasons |= self._of(entries, listing, threads)
                advance(len(entries))
        return reasons

    def _of(self, entries: Sequence[Entry], listing: Listing, threads: ThreadPoolExecutor) -> dict[str, str]:
        problems = threads.map(lambda entry: _problem(entry, listing, self.shorter_side), entries)
        return {
            entry.id: self._below(problem)
            for entry, problem in zip(entries, problems, strict=True)
            if problem is not None
        }

    def _below(self, problem: str) -> str:
        for folder in self.folders:
            problem = problem.replace(f"{folder}/", "")
        return problem


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Pillow's warnings are silenced for all of them: read_photo does it too, but threads undo each other's."""
    with warnings.catch_warnings(), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        warnings.simplefilter("ignore")
        yield threads


def _problem(entry: Entry, listing: Listing, shorter_side: int | None) -> str | None:
    try:
        listing.read(entry, shorter_side)
        if listing.mask is not None:
            listing.mask(entry)
    except DataError as error:
        return str(error)
    return None


def _digest(listing: Listing, shorter_side: int | None) -> str:
    """Of names and sizes, whatever order the file system gave them in."""
    digest = hashlib.sha256(f"{shorter_side}\n".encode())
    for entry in sorted(listing.entries, key=lambda entry: entry.id):
        digest.update(name_bytes(entry.id) + f" {entry.size}\n".encode())
    return digest.hexdigest()
