"""Source images -> WebDataset shards of the canonical view, one packed set per split."""

from __future__ import annotations

from collections.abc import Collection

from artifacts import ImageSet, open_images
from artifacts.packing import write_images
from pipeline.config import Experiment
from pipeline.data import open_source
from pipeline.layout import Layout
from pipeline.progress import Progress, Quiet
from pipeline.views import CanonicalView


def pack(experiment: Experiment, layout: Layout, progress: Progress) -> None:
    """Pack every split that the experiment reads and that is not packed yet; a finished one is checked and kept."""
    for split in experiment.packed_splits:
        pack_split(experiment, layout, split, progress)


def pack_split(
    experiment: Experiment, layout: Layout, split: str, progress: Progress, again: Collection[str] = ()
) -> ImageSet:
    """Pack one split, or continue where an interrupted run stopped; `again` names tars to pack once more."""
    where = layout.images(split)
    source = open_source(experiment.data, split, experiment.view.resize or experiment.view.size)
    view = CanonicalView.of(experiment.view)
    if where.exists("index.json") and not again:
        progress = Quiet()  # nothing to do but to check that it is the same
    with progress.bar(f"pack {split}", len(source), "image") as advance:
        write_images(
            where,
            count=len(source),
            get=lambda row: view.apply(source.raw(row)),
            view=view.describe(),
            classes=source.classes,
            source=source.describe(),
            rows_per_shard=experiment.store.rows_per_shard,
            again=again,
            progress=advance,
        )
    return open_images(where)
