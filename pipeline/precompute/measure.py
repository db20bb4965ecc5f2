"""What stage 1 knows about its stores besides the answers: the teacher's scores, and what storing and freezing cost."""

from __future__ import annotations

from artifacts import TeacherStore
from pipeline.data.batches import PairedRows
from pipeline.evaluate.scores import score, teacher_answers, teacher_answers_beyond
from pipeline.evaluate.shift import shift_curve
from pipeline.explain import by_name
from pipeline.precompute.codec_cost import codec_cost
from pipeline.precompute.codec_cost import tell as tell_cost
from pipeline.precompute.freezing_gap import freezing_gap
from pipeline.precompute.freezing_gap import tell as tell_gap
from pipeline.training.trained import LiveTeacher
from pipeline.workspace import CODEC_COST, FREEZING_GAP, SHIFT_CURVE, Workspace, teacher_scores


def measure(workspace: Workspace, teacher: LiveTeacher) -> None:
    """Measure, once a store, what storing and freezing cost under the students' geometry, and say it."""
    if workspace.fabric.is_global_zero:
        _measure_shift(workspace, teacher)
        _measure_costs(workspace, teacher)


def _measure_costs(workspace: Workspace, teacher: LiveTeacher) -> None:
    student = next(iter(workspace.experiment.candidates.values())).settings
    store, device = workspace.open_store(student.split), workspace.fabric.device
    of_store = {"store": store.manifest.identity}
    if all(workspace.has_measured(name, of_store) for name in (FREEZING_GAP, CODEC_COST)):
        return
    if not _can_ask(workspace, teacher, "what storing and freezing cost"):
        return
    images = workspace.open_images(student.split)
    cost = codec_cost(teacher.explainer, images, store, student.augment, device)
    workspace.write_measured(CODEC_COST, of_store | cost)
    workspace.progress.say(tell_cost(cost))
    gap = freezing_gap(teacher.explainer, images, store, student.augment, device)
    workspace.write_measured(FREEZING_GAP, of_store | gap)
    workspace.progress.say(tell_gap(gap))


def _measure_shift(workspace: Workspace, teacher: LiveTeacher) -> None:
    """The teacher's own shift curve, if `evaluate.shifts` asks for one and it is not there."""
    settings = workspace.experiment.evaluate
    if not settings.shifts:
        return
    split = settings.splits[0]
    of_split = {"store": workspace.open_store(split).manifest.identity, "split": split}
    if workspace.has_measured(SHIFT_CURVE, {**of_split, "shifts": list(settings.shifts)}):
        return
    if not _can_ask(workspace, teacher, "the teacher's shift curve"):
        return
    images = workspace.open_images(split)
    curve = shift_curve(teacher.explainer, images, settings, workspace.fabric.device)
    workspace.write_measured(SHIFT_CURVE, of_split | curve)


def _can_ask(workspace: Workspace, teacher: LiveTeacher, what: str) -> bool:
    """Stores serve students without their teacher; what needs its network is then said to be missing."""
    if not teacher.is_here:
        workspace.progress.say(f"not measured: {what}; the teacher's weights are not here")
    return teacher.is_here


def score_teacher(workspace: Workspace, split: str, store: TeacherStore, teacher: LiveTeacher) -> None:
    """The teacher's own accuracy and EPG, for the report; read off the store. If images have several labels, the
    teacher is asked for the maps of those that the store does not hold, so that its EPG is over the students' labels.
    """
    name, of_store = teacher_scores(split), {"store": store.manifest.identity}
    if workspace.fabric.broadcast(workspace.has_measured(name, of_store)):
        return
    rows = PairedRows(workspace.open_images(split), store, masks="any")
    answer = teacher_answers(by_name(workspace.experiment.explainer))
    if rows.multilabel:
        if not _can_ask(workspace, teacher, f"the teacher's scores on {split}"):
            return
        answer = teacher_answers_beyond(teacher.explainer)
    scores = score(workspace.fabric, answer, rows, workspace.experiment.evaluate.batch_size)
    own = {
        name: value
        for name, value in scores.means.items()
        if "agreement" not in name and name != "map_cosine"
    }
    if workspace.fabric.is_global_zero:
        workspace.write_measured(name, of_store | own)
