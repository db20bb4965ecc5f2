"""Source images -> WebDataset shards of the canonical view, one packed set per split."""

from __future__ import annotations

from collections.abc import Collection

from artifacts import ImageSet, open_images
from artifacts.errors import ConfigError
from artifacts.packing import Packing, write_images
from artifacts.places import Place
from pipeline.config import DataConfig, Experiment, Files
from pipeline.config.problems import did_you_mean
from pipeline.data import Source, open_source, split_names
from pipeline.data.protocol import cut_together
from pipeline.data.reading.unreadable import UnreadableImages
from pipeline.data.source import Reduced
from pipeline.data.view import CanonicalView
from pipeline.progress import Progress, Quiet
from pipeline.workspace import Workspace


def pack(workspace: Workspace) -> None:
    """Pack every split that the experiment reads and that is not packed yet; a finished one is checked and kept."""
    for split in workspace.experiment.packed_splits:
        pack_split(workspace, split)


def pack_split(workspace: Workspace, split: str, again: Collection[str] = ()) -> ImageSet:
    """Pack one split, or continue where an interrupted run stopped; `again` names tars to pack once more."""
    experiment, place_of_split = workspace.experiment, workspace.layout.images(split)
    view = CanonicalView.of(experiment.view)
    nothing_to_do = place_of_split.exists("index.json") and not again
    # a finished set is only checked to be the same
    progress = Quiet() if nothing_to_do else workspace.progress
    source = split_source(workspace, split, progress)
    with progress.bar(f"pack {split}", len(source), "image") as advance:
        write_images(
            place_of_split,
            Packing(
                count=len(source),
                get=lambda row: view.apply(source.raw(row)),
                view=view.describe(),
                classes=source.classes,
                source=source.describe(),
                rows_per_shard=experiment.store.rows_per_shard,
            ),
            again=again,
            progress=advance,
        )
    return open_images(place_of_split)


def split_source(workspace: Workspace, split: str, progress: Progress) -> Source:
    """A split of `data`, or, unlabelled, NAME/SPLIT: a split of also.NAME. Raises ConfigError for an unknown one."""
    name, slash, inner = split.rpartition("/")
    if not slash:
        return _opened(workspace, workspace.experiment.data, split, "", progress)
    data = _other(workspace.experiment, split, name)
    return Reduced(_opened(workspace, data, inner, name, progress), annotated=False)


def _opened(workspace: Workspace, data: DataConfig, split: str, folder: str, progress: Progress) -> Source:
    """`folder`: where below images/ the data set's splits lie, and beside them what could not be read."""
    side = workspace.experiment.view.resize or workspace.experiment.view.size
    if not isinstance(data, Files) or data.on_bad_image == "stop":
        return open_source(data, split, side)
    beside = workspace.layout.artifacts / f"images/{folder}"
    unreadable = UnreadableImages(beside, data.folders, side, progress, split, _begun(data, split, beside))
    return open_source(data, split, side, unreadable)


def _begun(data: Files, split: str, beside: Place) -> list[str]:
    """Of the splits that are cut from the same published one, those that are packed, or were begun."""
    return [
        name
        for name in cut_together(data, split)
        if any((beside / name).exists(file) for file in ("packing.json", "index.json"))
    ]


def _other(experiment: Experiment, split: str, name: str) -> DataConfig:
    if name not in experiment.also:
        known = f"it has {', '.join(experiment.also)}" if experiment.also else "it is empty"
        hint = did_you_mean(name, experiment.also, known)
        raise ConfigError(f"split {split!r}: the section also has no {name!r}; {hint}")
    if name in split_names(experiment.data):
        raise ConfigError(f"also.{name} has the name of a split of data; give it another name")
    return experiment.also[name]
