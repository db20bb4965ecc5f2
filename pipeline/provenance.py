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
from artifacts.errors import E2kdError, IncompleteStore, ModelError
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
from artifacts.records import MEND, mismatch, read_record, write_record
from pipeline.config import Experiment, ExplainConfig
from pipeline.explain import by_name
from pipeline.workspace import Workspace

FILE = "teacher.json"
WEIGHTS = "teacher.safetensors"
"""A taught teacher's weights, beside stores that other folders and machines use (`artifacts: URL`)."""


class WeightsFile(Record):
    """A file of weights as it was when they were hashed."""

    path: str
    bytes: int
    mtime_ns: int


class TeacherRecord(Record):
    """The teacher of an experiment's stores.

    config          the config's section `teacher`
    weights_sha256  of its network's state dict (`models.weights_sha256`)
    map_size        height and width of its maps of square images of `image_size` px
    file            the file that the weights were read from; None for published weights
    """

    schema_version: int = SCHEMA_VERSION
    config: dict[str, Any]
    weights_sha256: str
    preprocessing: dict[str, Any]
    classes: int
    image_size: int
    map_size: tuple[int, int]
    file: WeightsFile | None


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
    """Whether every store of the config is finished, sound in its records, and of the config's teacher and images."""
    try:
        for split in workspace.experiment.answered_splits:
            matching_store(workspace, split, workspace.open_images(split))
    except (E2kdError, FileNotFoundError):
        return False
    return True


def read_teacher(workspace: Workspace) -> TeacherRecord | None:
    """The record beside the stores. None if there is none, or if it is damaged: stage 1 writes it again."""
    try:
        return read_record(workspace.beside_stores, FILE, TeacherRecord)
    except (FileNotFoundError, E2kdError):
        return None


def write_teacher(workspace: Workspace, record: TeacherRecord) -> None:
    """Record the teacher, unless what is there says the same: of other machines only the file's state may differ.

    Raises MismatchedStore if stores of other weights lie there.
    """
    known = read_teacher(workspace)
    if known is not None and known.weights_sha256 != record.weights_sha256 and _any_store(workspace):
        weights = {"teacher.weights_sha256": (known.weights_sha256, record.weights_sha256)}
        raise mismatch(workspace.beside_stores, weights)
    if known is None or known.model_copy(update={"file": record.file}) != record:
        write_record(workspace.beside_stores, FILE, record)


def _any_store(workspace: Workspace) -> bool:
    return any(
        workspace.store_place(split).exists("draft.json") for split in workspace.experiment.answered_splits
    )


def check_teacher(workspace: Workspace, record: TeacherRecord) -> None:
    """Raises MismatchedStore with the differing settings unless the config's teacher is the recorded one."""
    differing = differing_values({"teacher": record.config}, {"teacher": described(workspace.experiment)})
    if differing:
        raise mismatch(workspace.beside_stores, differing)


def described(experiment: Experiment) -> dict[str, Any]:
    """What the config says of the teacher."""
    return experiment.teacher.model_dump(mode="json")


def as_now(path: Path | None) -> WeightsFile | None:
    """A file of weights as it is on the disk; None if it is not there."""
    if path is None or not path.is_file():
        return None
    state = path.stat()
    return WeightsFile(path=str(path), bytes=state.st_size, mtime_ns=state.st_mtime_ns)


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
