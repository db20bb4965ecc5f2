"""Mending what `verify` found: exactly the damaged shards are packed or computed again."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fabric import Fabric

from artifacts import DamagedStore, StoreError, open_images
from artifacts.manifest import Manifest, ManifestDraft
from artifacts.places import LocalPlace, Place
from artifacts.records import check_same, read_record, write_record
from artifacts.verify import Problem
from artifacts.writer import StoreWriter
from pipeline.config import Experiment
from pipeline.data.pack import pack_split
from pipeline.precompute.answer import draft_of, precompute
from pipeline.progress import Progress
from pipeline.training.trained import load_teacher
from pipeline.workspace import Layout


def repair_images(
    experiment: Experiment, layout: Layout, split: str, problems: Sequence[Problem], progress: Progress
) -> None:
    """Pack the tars again that `problems` name, and write the records that cannot be read; the rest is kept.

    Raises ImageSetError where the set is not the one that the experiment's config asks for.
    """
    again = {problem.array for problem in problems if problem.shard is not None and problem.array}
    pack_split(experiment, layout, split, progress, again)


def repair_store(
    experiment: Experiment,
    layout: Layout,
    split: str,
    problems: Sequence[Problem],
    fabric: Fabric,
    progress: Progress,
) -> None:
    """Compute the shards again that `problems` name, and write the records that cannot be read.

    Raises MismatchedStore where the store is not the one that the experiment's config asks for.
    """
    images = open_images(layout.images(split))
    draft = draft_of(experiment, load_teacher(experiment, layout, images), images)
    writer = StoreWriter(layout.store(experiment.store_name, split), draft)
    records: dict[str, type[ManifestDraft]] = {"manifest.json": Manifest, "draft.json": ManifestDraft}
    damaged = [name for name, model in records.items() if not _sound(writer.place, name, model, draft)]
    for name in damaged:
        writer.place.remove(name)
    if "draft.json" in damaged:
        write_record(writer.place, "draft.json", draft)
    writer.write_metadata()
    for shard in {problem.shard for problem in problems if problem.shard is not None and problem.mend}:
        writer.uncommit(shard)
    precompute(experiment, layout, split, images, fabric, progress)


def experiment_store(experiment: Experiment, layout: Layout, where: Place) -> tuple[str, bool]:
    """(split, whether it is an image set) of a place of this experiment. Raises StoreError where it is none of its."""
    for split in experiment.packed_splits:
        if _same(where, layout.images(split)):
            return split, True
        if _same(where, layout.store(experiment.store_name, split)):
            return split, False
    raise StoreError(
        f"{where} is none of the experiment's image sets or stores (its store is "
        f"{layout.stores(experiment.store_name)}); give its own config with --config"
    )


def _same(a: Place, b: Place) -> bool:
    if isinstance(a, LocalPlace) and isinstance(b, LocalPlace):
        return a.path.resolve() == b.path.resolve()
    return str(a).rstrip("/") == str(b).rstrip("/")


def _sound(where: Place, name: str, model: type[ManifestDraft], draft: ManifestDraft) -> bool:
    """Whether a record can be read. Raises MismatchedStore if it is about something else, StoreError if it is newer."""
    try:
        check_same(where, read_record(where, name, model), draft)
    except (FileNotFoundError, DamagedStore):
        return False
    return True
