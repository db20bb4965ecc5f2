"""The on-disk formats of e2kd: packed image sets and teacher stores. Usable without torch.

images = open_images("out/toybirds/images/train")
store = open_store("out/toybirds/stores/gradcam-centred/train")
images[7].image, store.read([7]).maps
"""

from artifacts.errors import (
    CheckpointError,
    ConfigError,
    DamagedStore,
    DataError,
    Diverged,
    E2kdError,
    ImageSetError,
    IncompleteStore,
    JobsFailed,
    MismatchedStore,
    ModelError,
    PlaceError,
    StoreError,
    WriteError,
)
from artifacts.images import ImageSet, Sample, open_images
from artifacts.rows import TeacherRows
from artifacts.store import TeacherStore, open_store
from artifacts.verify import Problem, VerifyReport, verify_images, verify_store

__all__ = [
    "open_images",
    "open_store",
    "verify_store",
    "verify_images",
    "ImageSet",
    "Sample",
    "TeacherStore",
    "TeacherRows",
    "VerifyReport",
    "Problem",
    "E2kdError",
    "ConfigError",
    "DataError",
    "ModelError",
    "CheckpointError",
    "Diverged",
    "PlaceError",
    "WriteError",
    "JobsFailed",
    "ImageSetError",
    "StoreError",
    "IncompleteStore",
    "DamagedStore",
    "MismatchedStore",
]
