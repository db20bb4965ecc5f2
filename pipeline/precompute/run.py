"""Stage 1: the teacher is asked once for every packed image, and its answers go into a store."""

from __future__ import annotations

from artifacts import ImageSet, TeacherStore
from artifacts.errors import DamagedStore, IncompleteStore, MismatchedStore
from artifacts.writer import ShardStream, StoreWriter
from pipeline.models import Explainable
from pipeline.precompute.answer import answer_shards
from pipeline.precompute.measure import score_teacher
from pipeline.progress import Progress
from pipeline.provenance import (
    WEIGHTS,
    expected,
    has_seen_weights,
    matching_store,
    read_teacher,
    see_weights,
    write_teacher,
)
from pipeline.sharing import WHOLE, Part
from pipeline.training.run import Run
from pipeline.training.trained import LiveTeacher, teacher_weights, weights_file
from pipeline.workspace import Workspace


def precompute(
    workspace: Workspace, split: str, teacher: LiveTeacher | None = None, part: Part = WHOLE
) -> TeacherStore | None:
    """Fill the store of one split; a finished one of this teacher, explainer and image set is kept.

    Every process computes whole shards of those that are not committed yet; `part` narrows them to those of one of
    several independent processes. None while shards of other parts are missing. `teacher` serves several splits; its
    network is built only if shards are missing, or if records alone do not say that a store is its. Raises
    MismatchedStore if the folder holds something else, DataError if the teacher's numbers are not finite.
    """
    teacher, fabric = teacher or LiveTeacher(workspace), workspace.fabric
    images = workspace.open_images(split)
    if not fabric.broadcast(_known(workspace, split, images)) and not fill(
        workspace, split, images, teacher, part
    ):
        return None
    store = workspace.open_store(split)
    score_teacher(workspace, split, store, teacher)
    return store


def _known(workspace: Workspace, split: str, images: ImageSet) -> bool:
    """Whether records say that the store is finished and this teacher's, whose weights' file has not changed since."""
    record = read_teacher(workspace)
    if record is None or not has_seen_weights(workspace, weights_file(workspace), record.weights_sha256):
        return False
    try:
        matching_store(workspace, split, images)
    except (IncompleteStore, DamagedStore, MismatchedStore, FileNotFoundError):
        return False
    return True


def fill(
    workspace: Workspace, split: str, images: ImageSet, teacher: LiveTeacher, part: Part = WHOLE
) -> bool:
    """Compute this process's uncommitted shards, whatever a manifest says. Returns whether the store is finished."""
    experiment, fabric = workspace.experiment, workspace.fabric
    writer = StoreWriter(workspace.store_place(split), expected(experiment, teacher.record, images))
    todo: list[int] = []
    if fabric.is_global_zero:
        if writer.place.exists("draft.json"):
            # whose it is, before anything is written
            writer.create()
        _record(workspace, teacher)
        writer.create()
        missing = set(range(len(images.shards))) - writer.committed()
        todo = sorted(shard for shard in missing if part.owns(shard))
    todo = fabric.broadcast(todo)
    if todo:
        _compare_views(teacher.net, images, workspace.progress)
        mine = todo[fabric.global_rank :: fabric.world_size]
        total = sum(len(images.shard_rows(shard)) for shard in mine)
        with workspace.progress.bar(f"precompute {split}", total, "image") as advance:
            stream = ShardStream(writer)
            answer_shards(teacher.explainer, images, mine, stream, experiment.store.batch_size, advance)
        fabric.barrier()
    return bool(fabric.broadcast(fabric.is_global_zero and _finished(workspace, split, writer, part)))


def _finished(workspace: Workspace, split: str, writer: StoreWriter, part: Part) -> bool:
    """Write the manifest if every shard is committed."""
    done, total = len(writer.committed()), writer.draft.shape.shards
    if done == total:
        writer.finish()
        return True
    if part.world > 1:
        workspace.progress.say(
            f"part {part.rank} of {part.world} of {split} is done; {done} of {total} shards are committed. The last "
            "part finishes the store, or any run without --rank"
        )
    return False


def _record(workspace: Workspace, teacher: LiveTeacher) -> None:
    """Write beside the stores whose they are."""
    is_new = write_teacher(workspace, teacher.record)
    see_weights(workspace, weights_file(workspace), teacher.record.weights_sha256)
    share_weights(workspace, again=is_new)


def share_weights(workspace: Workspace, again: bool = False) -> None:
    """A teacher that was taught here lies beside the stores, too, if other folders share them."""
    if not (
        workspace.experiment.teacher.train and workspace.layout.shared and Run(workspace.layout.teacher).done
    ):
        return
    weights = teacher_weights(workspace).read_bytes()
    if again or workspace.beside_stores.size(WEIGHTS) != len(weights):
        workspace.beside_stores.write(WEIGHTS, weights)


def _compare_views(teacher: Explainable, images: ImageSet, progress: Progress) -> None:
    """Say it if the weights were made for another view than the images were packed in."""
    made_for = teacher.preprocess.get("view", {})
    differing = [
        f"{key} {images.view[key]} (made for {made_for[key]})"
        for key in made_for
        if images.view.get(key) != made_for[key]
    ]
    if differing:
        progress.say(
            f"note: the teacher's weights were made for another view: {', '.join(differing)}; set `view` to it, or "
            "expect lower accuracy"
        )
