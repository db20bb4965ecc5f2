"""The experiment's teacher: pretrained, or taught here; and what the store must know about it."""

from __future__ import annotations

from artifacts import ImageSet
from artifacts.errors import ModelError
from pipeline import explain as explainers
from pipeline.config import Experiment, ExplainConfig
from pipeline.models import Explainable, build, load_weights
from pipeline.training.loop import kept_weights
from pipeline.training.run import Run
from pipeline.workspace import Layout


def class_count(experiment: Experiment, images: ImageSet) -> int:
    """C: the teacher's number of classes, which is also every student's.

    Raises ModelError where the data's labels are not the teacher's classes.
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


def load_teacher(experiment: Experiment, layout: Layout, images: ImageSet) -> Explainable:
    """The teacher with its final weights, in eval mode on the CPU. Raises ModelError where it was not taught yet."""
    teacher = build(experiment.teacher, class_count(experiment, images))
    if experiment.teacher.train:
        run = Run(layout.teacher)
        if not run.done:
            raise ModelError(f"the teacher in {layout.teacher} is not trained yet; run: e2kd teach CONFIG")
        load_weights(teacher.net, kept_weights(run, experiment.teacher.train.keep))
    return teacher.eval().requires_grad_(False)


def build_explainer(explain: ExplainConfig, model: Explainable) -> explainers.GradCAM | explainers.BCos:
    return explainers.build(explain.explainer, model, logit=explain.logit)
