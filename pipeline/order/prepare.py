"""What comes before students: pack -> teach -> precompute. Each does what is missing and nothing twice."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext

from artifacts.durable import write_atomic
from pipeline.config import dump
from pipeline.data.pack import pack
from pipeline.precompute.measure import measure
from pipeline.precompute.run import precompute, share_weights
from pipeline.provenance import is_complete
from pipeline.sharing import WHOLE, Part, locked
from pipeline.teach.run import teach
from pipeline.training.trained import LiveTeacher, has_weights
from pipeline.workspace import Workspace


def prepare_teacher(workspace: Workspace) -> None:
    """Pack what is not packed (rank 0) and train the teacher if the config asks for one."""
    with _alone(workspace):
        _pack(workspace)
        if workspace.experiment.teacher.train:
            teach(workspace)


def prepare_stores(workspace: Workspace, part: Part = WHOLE, students: Collection[str] | None = None) -> bool:
    """Stage 1 for every split that students train on or are scored on. False while other parts are not done.

    Independent parts do not pack or teach: that is done once, before them. Raises ImageSetError or ModelError if it
    was not. The whole of it is one process's at a time: a second one waits, and finds it done. A teacher is not taught
    again for stores that are complete, as those that another folder's experiment made (`artifacts: URL`), unless one of
    `students` (candidates by name; None: all) asks it online and its weights cannot be had.
    """
    with _alone(workspace) if part == WHOLE else nullcontext():
        if part == WHOLE:
            _pack(workspace)
            if workspace.experiment.teacher.train and workspace.fabric.broadcast(
                _needs_teaching(workspace, students)
            ):
                teach(workspace)
        if workspace.fabric.is_global_zero:
            share_weights(workspace)
        teacher = LiveTeacher(workspace)
        complete = True
        for split in workspace.experiment.answered_splits:
            complete &= precompute(workspace, split, teacher, part) is not None
        if workspace.fabric.is_global_zero:
            write_atomic(workspace.layout.config, dump(workspace.experiment).encode())
        if complete:
            measure(workspace, teacher)
        return complete


def _needs_teaching(workspace: Workspace, students: Collection[str] | None) -> bool:
    """Unless every store is there, and for online students the weights too."""
    candidates = workspace.experiment.candidates
    asked = candidates if students is None else students
    online = any(candidates[name].settings.asks_online for name in asked)
    return not is_complete(workspace) or (online and not has_weights(workspace))


def _pack(workspace: Workspace) -> None:
    if workspace.fabric.is_global_zero:
        pack(workspace)
    workspace.fabric.barrier()


@contextmanager
def _alone(workspace: Workspace) -> Iterator[None]:
    """Waits while another process is at stage 1 of the same experiment."""
    root, waited = workspace.layout.root, False
    while True:
        with locked(root / "stage-1.lock", workspace.fabric) as mine:
            if mine:
                yield
                return
        if not waited:
            workspace.progress.say(f"another process packs, teaches or precomputes in {root}; waiting for it")
            waited = True
        time.sleep(_POLL_SECONDS)


_POLL_SECONDS = 0.5
