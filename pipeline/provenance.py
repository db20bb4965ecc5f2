"""Whose answers a store holds, from records: who trains students never needs the teacher's network to know it.

Stage 1 writes `teacher.json` beside the stores of an experiment: what the config says of the teacher, and the hash of
the weights that it found there. A store belongs to a config if the config's teacher is the recorded one and the
store's manifest says what follows from record, config and image set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from artifacts import ImageSet, TeacherStore
from artifacts.codecs import get_codec
from artifacts.errors import DamagedStore, IncompleteStore, ModelError
from artifacts.fields import Extent, Settings, Sha256
from artifacts.manifest import (
    SCHEMA_VERSION,
    CodecInfo,
    ExplainerInfo,
    ManifestDraft,
    Record,
    StoreShape,
    TeacherInfo,
    differing_values,
)
from artifacts.places import place
from artifacts.records import MEND, mismatch, read_record, write_record
from pipeline.config import Experiment, ExplainConfig
from pipeline.explain import by_name
from pipeline.workspace import Workspace

FILE = "teacher.json"
SEEN = "teacher-weights.json"
WEIGHTS = "teacher.safetensors"
"""A taught teacher's weights, beside stores that other folders and machines use (`artifacts: URL`)."""


class SeenWeights(Record):
    """In an experiment's own folder: a file of weights as it was when its network was hashed."""

    path: str
    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    weights_sha256: Sha256

    @classmethod
    def of(cls, file: Path, weights_sha256: str) -> SeenWeights:
        state = file.stat()
        return cls(
            path=str(file.resolve()),
            bytes=state.st_size,
            mtime_ns=state.st_mtime_ns,
            ctime_ns=state.st_ctime_ns,
            inode=state.st_ino,
            weights_sha256=weights_sha256,
        )


class TeacherRecord(Record):
    """The teacher of an experiment's stores.

    configs         what configs say of it (`described`); several may have the same network
    weights_sha256  of its network's state dict (`models.weights_sha256`)
    map_size        height and width of its maps of square images of `image_size` px
    """

    schema_version: int = SCHEMA_VERSION
    configs: list[Settings]
    weights_sha256: Sha256
    preprocessing: Settings
    classes: Extent
    image_size: Extent
    map_size: tuple[Extent, Extent]


def class_count(experiment: Experiment, images: ImageSet) -> int:
    """C: the teacher's number of classes, which is also every student's.

    Raises ModelError if the data's labels are not the teacher's classes.
    """
    named, said = len(images.classes), experiment.teacher.classes
    if not named and said is None:
        raise ModelError(f"{images.place} has no classes: say how many the teacher has with teacher.classes")
    if named and said not in (None, named):
        raise ModelError(
            f"the teacher has {said} classes but {images.place} has {named}; use its data, correct teacher.classes, "
            "or ignore the labels with data.labels: false to distil on unrelated images"
        )
    return said or named


def matching_store(workspace: Workspace, split: str, images: ImageSet) -> TeacherStore:
    """The finished store of a split.

    Raises MismatchedStore with the differing fields unless it is of this config's teacher, explainer and images,
    IncompleteStore if stage 1 has not finished it.
    """
    store = workspace.open_store(split)
    record = read_teacher(workspace)
    if record is None:
        raise IncompleteStore(f"{workspace.beside_stores} does not say whose its stores are; {MEND}")
    check_teacher(workspace, record)
    store.check_same(expected(workspace.experiment, record, images))
    return store


def is_complete(workspace: Workspace) -> bool:
    """Whether every store of the config is finished. Raises MismatchedStore if one is of another teacher or images."""
    try:
        for split in workspace.experiment.answered_splits:
            matching_store(workspace, split, workspace.open_images(split))
    except (IncompleteStore, DamagedStore, FileNotFoundError):
        return False
    return True


def read_teacher(workspace: Workspace) -> TeacherRecord | None:
    """The record beside the stores. None if there is none, or if it is damaged: stage 1 writes it again."""
    try:
        return read_record(workspace.beside_stores, FILE, TeacherRecord)
    except (FileNotFoundError, DamagedStore):
        return None


def write_teacher(workspace: Workspace, record: TeacherRecord) -> bool:
    """Record the teacher, beside other configs of the same network. Returns whether another teacher was there, or none.

    Raises MismatchedStore if stores of other weights lie there.
    """
    known = read_teacher(workspace)
    if known is not None and known.weights_sha256 == record.weights_sha256:
        more = [config for config in record.configs if config not in known.configs]
        if more:
            both = known.model_copy(update={"configs": [*known.configs, *more]})
            write_record(workspace.beside_stores, FILE, both)
        return False
    if known is not None and _any_store(workspace):
        weights = {"teacher.weights_sha256": (known.weights_sha256, record.weights_sha256)}
        raise mismatch(workspace.beside_stores, weights)
    write_record(workspace.beside_stores, FILE, record)
    return True


def _any_store(workspace: Workspace) -> bool:
    return any(name.endswith("/draft.json") for name in workspace.beside_stores.sizes())


def check_teacher(workspace: Workspace, record: TeacherRecord) -> None:
    """Raises MismatchedStore with the differing settings unless the config's teacher is the recorded one."""
    own = described(workspace.experiment)
    if own not in record.configs:
        differing = differing_values({"teacher": record.configs[-1]}, {"teacher": own})
        raise mismatch(workspace.beside_stores, differing)


def check_network(workspace: Workspace, store: TeacherStore, weights_sha256: str) -> None:
    """Raises MismatchedStore unless a network is the one that answered for a store."""
    recorded = store.manifest.teacher.weights_sha256
    if recorded != weights_sha256:
        raise mismatch(store.place, {"teacher.weights_sha256": (recorded, weights_sha256)})


def described(experiment: Experiment) -> dict[str, Any]:
    """What the config says of the teacher's network. Of a file of weights its name: a folder is a machine's own."""
    said = experiment.teacher.model_dump(
        mode="json", exclude={"classes": True, "train": {"workers", "cache_mib"}}
    )
    train = said["train"] and {**said["train"], "init": _name(said["train"]["init"])}
    return {**said, "weights": _name(said["weights"]), "train": train}


def _name(weights: str | None) -> str | None:
    return None if weights is None else Path(weights).name


def see_weights(workspace: Workspace, file: Path | None, weights_sha256: str) -> None:
    """Note what a file of weights was when its network was hashed."""
    if file is not None and file.is_file():
        write_record(place(workspace.layout.root), SEEN, SeenWeights.of(file, weights_sha256))


def has_seen_weights(workspace: Workspace, file: Path | None, weights_sha256: str) -> bool:
    """Whether a file of weights is as it was when its network was hashed, or is not here to be looked at."""
    if file is None or not file.is_file():
        return True
    try:
        seen = read_record(place(workspace.layout.root), SEEN, SeenWeights)
    except (FileNotFoundError, DamagedStore):
        return False
    return seen == SeenWeights.of(file, weights_sha256)


def expected(experiment: Experiment, record: TeacherRecord, images: ImageSet) -> ManifestDraft:
    """Everything that decides the numbers in a store."""
    height, width = record.map_size
    return ManifestDraft(
        teacher=TeacherInfo(
            architecture=experiment.teacher.model,
            weights_sha256=record.weights_sha256,
            preprocessing=record.preprocessing,
            classes=class_count(experiment, images),
            class_names=images.classes,
        ),
        explainer=ExplainerInfo(name=experiment.explainer, settings=_explained(experiment.explain)),
        view=images.view,
        images=images.fingerprint,
        shape=StoreShape(
            rows=len(images),
            rows_per_shard=images.rows_per_shard,
            classes=record.classes,
            explained=experiment.explain.stored,
            channels=by_name(experiment.explainer).channels,
            height=height,
            width=width,
        ),
        logits=_codec(experiment.store.logits),
        maps=_codec(_map_codec(experiment)),
    )


def _explained(explain: ExplainConfig) -> dict[str, Any]:
    """What decides the maps: the explainer's settings, and of which classes if it is not the top-1 alone."""
    if explain.classes == "top1":
        return explain.settings
    return explain.settings | {"classes": explain.classes, "most": explain.most}


def _map_codec(experiment: Experiment) -> str:
    """`auto`: the explainer's own."""
    codec = experiment.store.maps
    return codec if codec != "auto" else by_name(experiment.explainer).codec


def _codec(name: str) -> CodecInfo:
    codec = get_codec(name)
    return CodecInfo(codec=codec.codec_id, error_bound=codec.error_bound)
