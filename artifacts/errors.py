"""What users can get wrong, as one tree. `str(error)` is one message that names the file and the mend.

E2kdError
├── ConfigError            a setting is wrong
├── DataError              source images, labels or folders are wrong
├── ModelError             a model is unknown, unfit, or its weights are not its own
├── CheckpointError        a file of a training run is damaged or gone
├── Diverged               a loss, or a network's answer, became NaN or infinite
├── PlaceError             a folder or URL cannot be reached or read
├── WriteError             a file cannot be written
├── JobsFailed             runs in other processes failed
├── ImageSetError          a packed image set is missing, incomplete or damaged
└── StoreError             a teacher store cannot be used
    ├── IncompleteStore    precompute has not finished
    ├── DamagedStore       bytes are missing or changed
    └── MismatchedStore    it belongs to another teacher, explainer, view or image set

A program reads the fields of an error instead of its message. An exception of another class is a bug.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from artifacts.names import masked


class E2kdError(Exception):
    """Base class. Passwords of URLs are in no message. A field is None if the place that raised the error does not
    know it.

    path    the file, folder or URL
    shard   the number of a shard
    array   the name of a store's array
    rows    rows of an image set or store
    key     a sample's key, or a setting's dotted name
    line    of a text file, counted from 1
    fields  by dotted name: (what a store, image set or run says, what the config says)
    """

    def __init__(
        self,
        message: str,
        *,
        path: object = None,
        shard: int | None = None,
        array: str | None = None,
        rows: range | None = None,
        key: str | None = None,
        line: int | None = None,
        fields: Mapping[str, tuple[Any, Any]] | None = None,
    ) -> None:
        super().__init__(masked(message))
        self.path = None if path is None else masked(str(path))
        self.shard, self.array, self.rows = shard, array, rows
        self.key, self.line = key, line
        self.fields = None if fields is None else dict(fields)


class ConfigError(E2kdError):
    """A setting is wrong."""


class DataError(E2kdError):
    """Source images, labels or folders are wrong."""


class ModelError(E2kdError):
    """A model is unknown or unfit, or weights do not belong to it."""


class CheckpointError(E2kdError):
    """A file of a training run is damaged, gone, or of another version."""


class Diverged(E2kdError):
    """The loss, or what the network answers, became NaN or infinite."""


class PlaceError(E2kdError):
    """A folder or URL cannot be reached or read."""


class WriteError(E2kdError):
    """A file cannot be written. `errno` is the operating system's reason, if it gave one."""

    def __init__(self, message: str, *, path: object = None, errno: int | None = None) -> None:
        super().__init__(message, path=path)
        self.errno = errno


class JobsFailed(E2kdError):
    """Runs in other processes failed. `codes`: by (student, seed), what its process returned (-9: by signal 9)."""

    def __init__(self, message: str, *, codes: Mapping[tuple[str, int], int] | None = None) -> None:
        super().__init__(message)
        self.codes = dict(codes or {})

    @property
    def exit_code(self) -> int:
        """2 if all runs failed by the user's input, 130 if some were interrupted, 1 if one failed in another way."""
        codes = set(self.codes.values())
        if codes - {2, 130}:
            return 1
        return 130 if 130 in codes else 2


class ImageSetError(E2kdError):
    """A packed image set is missing, incomplete or damaged."""


class StoreError(E2kdError):
    """A teacher store cannot be used."""


class IncompleteStore(StoreError):
    """Precompute has not finished: `done` of `shards` shards are committed; None if there is no store at all."""

    def __init__(
        self, message: str, *, path: object = None, done: int | None = None, shards: int | None = None
    ) -> None:
        super().__init__(message, path=path)
        self.done, self.shards = done, shards


class DamagedStore(StoreError):
    """Bytes of a store are missing or changed."""


class MismatchedStore(StoreError):
    """A store of another teacher, explainer, view or image set."""
