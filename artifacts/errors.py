"""What users can get wrong, as one tree. `str(error)` is one message that names the file and the mend.

E2kdError
├── ConfigError            a setting is wrong
├── DataError              source images, labels or folders are wrong
├── ModelError             a model is unknown, unfit, or its weights are not its own
├── PlaceError             a folder or URL cannot be reached
├── ImageSetError          a packed image set is missing, incomplete or damaged
└── StoreError             a teacher store cannot be used
    ├── IncompleteStore    precompute has not finished
    ├── DamagedStore       bytes are missing or changed
    └── MismatchedStore    it belongs to another teacher, explainer, view or image set
"""

from __future__ import annotations


class E2kdError(Exception):
    """Base class. `exit_code` is what the command line returns."""

    exit_code = 2


class ConfigError(E2kdError):
    """A setting is wrong."""


class DataError(E2kdError):
    """Source images, labels or folders are wrong."""


class ModelError(E2kdError):
    """A model is unknown or unfit, or weights do not belong to it."""


class PlaceError(E2kdError):
    """A folder or URL cannot be read or written."""


class ImageSetError(E2kdError):
    """A packed image set is missing, incomplete or damaged."""


class StoreError(E2kdError):
    """A teacher store cannot be used."""


class IncompleteStore(StoreError):
    """Precompute has not finished."""


class DamagedStore(StoreError):
    """Bytes of a store are missing or changed."""


class MismatchedStore(StoreError):
    """A store of another teacher, explainer, view or image set."""
