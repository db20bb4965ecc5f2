"""Mending what `verify` found: exactly the damaged shards are packed or computed again."""

from __future__ import annotations

from collections.abc import Sequence

from artifacts import DamagedStore
from artifacts.manifest import Manifest, ManifestDraft
from artifacts.places import Place
from artifacts.records import check_same, read_record, write_record
from artifacts.verify import Problem
from artifacts.writer import StoreWriter
from pipeline.data.pack import pack_split
from pipeline.precompute.run import fill, precompute
from pipeline.provenance import expected
from pipeline.training.trained import LiveTeacher
from pipeline.workspace import Workspace


def repair_images(workspace: Workspace, split: str, problems: Sequence[Problem]) -> None:
    """Pack the tars again that `problems` name, and write the records that cannot be read; the rest is kept.

    Raises ImageSetError if the set is not the one that the experiment's config asks for.
    """
    again = {problem.array for problem in problems if problem.shard is not None and problem.array}
    pack_split(workspace, split, again)


def repair_store(workspace: Workspace, split: str, problems: Sequence[Problem]) -> None:
    """Compute the shards again that `problems` name, and write the records that cannot be read.

    Raises MismatchedStore if the store is not the one that the experiment's config asks for.
    """
    teacher = LiveTeacher(workspace)
    images = workspace.open_images(split)
    draft = expected(workspace.experiment, teacher.record, images)
    writer = StoreWriter(workspace.store_place(split), draft)
    records: dict[str, type[ManifestDraft]] = {"manifest.json": Manifest, "draft.json": ManifestDraft}
    damaged = [name for name, model in records.items() if not _sound(writer.place, name, model, draft)]
    for name in damaged:
        writer.place.remove(name)
    if "draft.json" in damaged:
        write_record(writer.place, "draft.json", draft)
    writer.write_metadata()
    for shard in {problem.shard for problem in problems if problem.shard is not None and problem.mend}:
        writer.uncommit(shard)
    fill(workspace, split, images, teacher)
    precompute(workspace, split, teacher)


def _sound(where: Place, name: str, model: type[ManifestDraft], draft: ManifestDraft) -> bool:
    """Whether a record can be read. Raises MismatchedStore if it is about something else, StoreError if it is newer."""
    try:
        check_same(where, read_record(where, name, model), draft)
    except (FileNotFoundError, DamagedStore):
        return False
    return True
