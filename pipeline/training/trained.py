"""Trained networks, back from their weights: the experiment's teacher, pretrained or taught here, and students."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import safetensors.torch

from artifacts import ImageSet
from artifacts.errors import CheckpointError, ModelError
from pipeline import explain as explainers
from pipeline.config import ExplainConfig
from pipeline.explain import Explainer
from pipeline.models import Explainable, build, fill, load_weights, weights_sha256
from pipeline.provenance import WEIGHTS, TeacherRecord, class_count, described, read_teacher
from pipeline.training.keep import kept_weights
from pipeline.training.run import Run
from pipeline.workspace import Workspace


def load_teacher(workspace: Workspace, images: ImageSet) -> Explainable:
    """The teacher with its final weights, in eval mode on the CPU. Raises ModelError if it was not taught yet."""
    experiment = workspace.experiment
    teacher = build(experiment.teacher, class_count(experiment, images))
    if experiment.teacher.train:
        if Run(workspace.layout.teacher).done:
            load_weights(teacher.net, teacher_weights(workspace))
        else:
            _load_shared(teacher, workspace)
    return teacher.eval().requires_grad_(False)


def teacher_weights(workspace: Workspace) -> Path:
    """The file with a taught teacher's weights."""
    train = workspace.experiment.teacher.train
    assert train is not None
    return kept_weights(Run(workspace.layout.teacher), train.keep)


def weights_file(workspace: Workspace) -> Path | None:
    """The file that the teacher's weights come from; None if a taught teacher is not here. It may not be there."""
    teacher = workspace.experiment.teacher
    if teacher.train:
        return teacher_weights(workspace) if Run(workspace.layout.teacher).done else None
    return Path(str(teacher.weights)).expanduser()


def has_weights(workspace: Workspace) -> bool:
    """Whether a taught teacher's weights are here, or beside the stores that this experiment shares."""
    return Run(workspace.layout.teacher).done or workspace.beside_stores.exists(WEIGHTS)


def _load_shared(teacher: Explainable, workspace: Workspace) -> None:
    """A teacher that another folder's experiment taught, from beside the stores that both use."""
    beside, record = workspace.beside_stores, read_teacher(workspace)
    if record is None or described(workspace.experiment) not in record.configs or not beside.exists(WEIGHTS):
        raise ModelError(
            f"the teacher in {workspace.layout.teacher} is not trained yet; run: e2kd teach CONFIG"
        )
    fill(teacher.net, safetensors.torch.load(beside.read(WEIGHTS)), str(beside / WEIGHTS))
    if weights_sha256(teacher) != record.weights_sha256:
        raise ModelError(
            f"{beside / WEIGHTS} is damaged; delete it, then run e2kd precompute CONFIG where the teacher was taught"
        )


class LiveTeacher:
    """The teacher's network, built when it is first asked for, once for all splits."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    @property
    def is_here(self) -> bool:
        """Whether its weights can be had: published ones, a file that is there, or a taught teacher's."""
        file = weights_file(self._workspace)
        if self._workspace.experiment.teacher.train:
            return has_weights(self._workspace)
        return file is None or file.is_file() or file.suffix == ""

    @cached_property
    def net(self) -> Explainable:
        return load_teacher(self._workspace, self._any_images)

    @cached_property
    def explainer(self) -> Explainer:
        explainer = build_explainer(self._workspace.experiment.explain, self.net)
        return explainer.to(self._workspace.fabric.device)

    @cached_property
    def record(self) -> TeacherRecord:
        """What the network in memory is."""
        net, size = self.net, self._any_images.size
        return TeacherRecord(
            configs=[described(self._workspace.experiment)],
            weights_sha256=weights_sha256(net),
            preprocessing=net.preprocess,
            classes=net.classes,
            image_size=size,
            map_size=self.explainer.map_size(size),
        )

    @cached_property
    def _any_images(self) -> ImageSet:
        return self._workspace.open_images(self._workspace.experiment.answered_splits[0])


def load_student(workspace: Workspace, name: str, seed: int) -> Explainer:
    """The explainer of a trained student, in eval mode on the CPU. Raises CheckpointError if its weights are gone."""
    run = Run(workspace.layout.run(name, seed))
    settings = workspace.experiment.candidates[name].settings
    net = build(settings, class_count(workspace.experiment, workspace.open_images(settings.split)))
    weights = kept_weights(run, settings.keep)
    if not weights.exists():
        raise CheckpointError(f"{weights} is gone; delete the run and train it again: rm -r {run.path}")
    load_weights(net.net, weights)
    return build_explainer(workspace.experiment.explain, net.eval())


def build_explainer(explain: ExplainConfig, model: Explainable) -> Explainer:
    return explainers.build(explain.explainer, model, **explain.settings)
