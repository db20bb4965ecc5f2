"""A trained student's scores on the config's splits, and whether they are of today's stores."""

from __future__ import annotations

from typing import Any

from artifacts.errors import E2kdError
from pipeline.data.batches import PairedRows
from pipeline.evaluate.scores import Scores, samples_file, save_samples, score, student_answers
from pipeline.evaluate.shift import shift_curve
from pipeline.explain import Explainer
from pipeline.provenance import matching_store
from pipeline.training.run import Run
from pipeline.training.trained import load_student
from pipeline.workspace import Workspace


def evaluate_student(workspace: Workspace, name: str, seed: int) -> dict[str, Any]:
    """Scores of the run's kept weights on `evaluate.select` and `evaluate.splits`: the contents of result.json.

    Their values row by row go to `scores-<split>.safetensors` in the run's folder. With `evaluate.shifts` the result
    has `shift` too, the shift curve on the first split. `stores` says of each split which store it was scored beside.
    """
    explainer = load_student(workspace, name, seed).to(workspace.fabric.device)
    settings, folder = workspace.experiment.evaluate, workspace.layout.run(name, seed)
    splits, stores = {}, {}
    for split in dict.fromkeys(split for split in (settings.select, *settings.splits) if split):
        rows = scored_rows(workspace, split)
        assert rows.store is not None
        scores = score_student(workspace, explainer, rows)
        if workspace.fabric.is_global_zero:
            save_samples(samples_file(folder, split), scores.samples)
        splits[split], stores[split] = scores.means, rows.store.manifest.identity
    result: dict[str, Any] = {"student": name, "seed": seed, "splits": splits, "stores": stores}
    if settings.shifts:
        images = workspace.open_images(settings.splits[0])
        curve = shift_curve(explainer, images, settings, workspace.fabric.device)
        result["shift"] = {"split": settings.splits[0], **curve}
    return result


def scored_elsewhere(workspace: Workspace, run: Run) -> list[str]:
    """The splits whose store is not the one that a finished run was scored beside (it was made anew since)."""
    changed = []
    for split, known in run.result().get("stores", {}).items():
        try:
            store = workspace.open_store(split)
        except E2kdError:
            continue
        if store.manifest.identity != known:
            changed.append(split)
    return changed


def score_student(workspace: Workspace, explainer: Explainer, rows: PairedRows) -> Scores:
    """`explainer` is left in eval mode."""
    explainer.eval()
    return score(workspace.fabric, student_answers(explainer), rows, workspace.experiment.evaluate.batch_size)


def scored_rows(workspace: Workspace, split: str, cache_mib: int = 0) -> PairedRows:
    """A split beside the teacher's answers, with what is annotated."""
    images = workspace.open_images(split)
    return PairedRows(images, matching_store(workspace, split, images), masks="any", cache_mib=cache_mib)
