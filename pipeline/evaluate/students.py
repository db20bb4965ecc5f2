"""A trained student: its weights back from its run, and its scores."""

from __future__ import annotations

from typing import Any

from lightning_fabric import Fabric
from torch import nn

from artifacts import open_images, open_store
from artifacts.errors import E2kdError
from pipeline.config import Experiment
from pipeline.data.batches import PairedRows
from pipeline.evaluate.scores import Scores, samples_file, save_samples, score, student_answers
from pipeline.evaluate.shift import shift_curve
from pipeline.models import build, load_weights
from pipeline.precompute.answer import open_matching_store
from pipeline.training.loop import kept_weights
from pipeline.training.run import CheckpointError, Run
from pipeline.training.trained import build_explainer, class_count
from pipeline.workspace import Layout


def evaluate_student(
    experiment: Experiment, layout: Layout, fabric: Fabric, name: str, seed: int
) -> dict[str, Any]:
    """Scores of the run's kept weights on `evaluate.select` and `evaluate.splits`: the contents of result.json.

    Their values row by row go to `scores-<split>.safetensors` in the run's folder. With `evaluate.shifts` the result
    has `shift` too, the shift curve on the first split. `stores` says of each split which store it was scored beside.
    """
    explainer = load_student(experiment, layout, name, seed).to(fabric.device)
    settings, folder = experiment.evaluate, layout.run(name, seed)
    splits, stores = {}, {}
    for split in dict.fromkeys(split for split in (settings.select, *settings.splits) if split):
        rows = scored_rows(experiment, layout, split, cache_mib=0)
        assert rows is not None
        assert rows.store is not None
        scores = score_student(experiment, fabric, explainer, rows)
        if fabric.is_global_zero:
            save_samples(samples_file(folder, split), scores.samples)
        splits[split], stores[split] = dict(scores), rows.store.manifest.identity
    result: dict[str, Any] = {"student": name, "seed": seed, "splits": splits, "stores": stores}
    if settings.shifts:
        images = open_images(layout.images(settings.splits[0]))
        result["shift"] = {
            "split": settings.splits[0],
            **shift_curve(explainer, images, settings, fabric.device),
        }
    return result


def scored_elsewhere(experiment: Experiment, layout: Layout, run: Run) -> list[str]:
    """The splits whose store is not the one that a finished run was scored beside (it was made anew since)."""
    found = []
    for split, known in run.result().get("stores", {}).items():
        try:
            store = open_store(layout.store(experiment.store_name, split))
        except E2kdError:
            continue
        if store.manifest.identity != known:
            found.append(split)
    return found


def load_student(experiment: Experiment, layout: Layout, name: str, seed: int) -> nn.Module:
    """The explainer of a trained student, in eval mode on the CPU."""
    run = Run(layout.run(name, seed))
    settings = experiment.students[name]
    net = build(settings, class_count(experiment, open_images(layout.images(settings.split))))
    weights = kept_weights(run, settings.keep)
    if not weights.exists():
        raise CheckpointError(f"{weights} is gone; delete the run and train it again: rm -r {run.path}")
    load_weights(net.net, weights)
    return build_explainer(experiment.explain, net.eval())


def score_student(experiment: Experiment, fabric: Fabric, explainer: nn.Module, rows: PairedRows) -> Scores:
    """`explainer` is left in eval mode."""
    explainer.eval()
    return score(fabric, student_answers(explainer), rows, experiment.evaluate.batch_size)


def scored_rows(
    experiment: Experiment, layout: Layout, split: str | None, cache_mib: int
) -> PairedRows | None:
    """A split beside the teacher's answers, with what is annotated; None for no split."""
    if split is None:
        return None
    images = open_images(layout.images(split))
    store = open_matching_store(experiment, layout, split, images)
    return PairedRows(images, store, masks="any", cache_mib=cache_mib)
