"""The report's figure: images with the teacher's and students' maps, and the training curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn

from artifacts import open_images
from pipeline.config import Experiment
from pipeline.data.loader import Batch, PairedRows
from pipeline.distill import load_student
from pipeline.explainers import heat
from pipeline.layout import Layout
from pipeline.overlay import overlay
from pipeline.precompute import open_matching_store
from pipeline.run import Run

PER_SPLIT = 4
"""Example images of each split: the first ones of the classes in turn, never picked by how they look."""


def draw(experiment: Experiment, layout: Layout, path: Path) -> None:
    """Draw the figure from finished runs of the first seed that has any."""
    students = _shown_students(experiment, layout)
    splits = experiment.evaluate.splits[:2]
    blocks = [_examples(experiment, layout, split, students) for split in splits]
    columns = 2 + len(students)
    rows = PER_SPLIT * len(blocks)
    figure = plt.figure(figsize=(1.35 * columns, 1.35 * rows + 3.4), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.35 * rows, 3.2])
    gallery, curves = parts
    axes = gallery.subplots(rows, columns, squeeze=False)
    for index, (split, block) in enumerate(zip(splits, blocks, strict=True)):
        _draw_block(axes[index * PER_SPLIT : (index + 1) * PER_SPLIT], split, block)
    for axis, title in zip(axes[0], ["image", "teacher", *students], strict=True):
        axis.set_title(title, fontsize=9)
    _draw_curves(curves, experiment, layout)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    partial.replace(path)


def _shown_students(experiment: Experiment, layout: Layout) -> dict[str, int]:
    """Student -> the seed shown: finished, with a teacher, at most five."""
    shown = {}
    for name, settings in experiment.students.items():
        done = [seed for seed in experiment.seeds if Run(layout.run(name, seed)).done]
        if done and settings.loss == "kd":
            shown[name] = done[0]
    return dict(list(shown.items())[:5])


def _examples(experiment: Experiment, layout: Layout, split: str, students: dict[str, int]) -> dict[str, Any]:
    """Images, labels, and per model (maps [n,h,w], predicted classes [n])."""
    images = open_images(layout.images(split))
    data = PairedRows(images, open_matching_store(experiment, layout, split, images))
    batch = data.read(_rows_by_class(images.labels))
    assert batch.teacher is not None
    seen = heat(batch.teacher.maps, batch.images.float() / 255)[:, 0]
    answers = {"teacher": (seen, batch.teacher.logits.argmax(1))}
    for name, seed in students.items():
        answers[name] = _answer(load_student(experiment, layout, name, seed), batch)
    return {"batch": batch, "answers": answers}


def _rows_by_class(labels: list[Any]) -> np.ndarray:
    """PER_SPLIT rows, the classes in turn."""
    by_class: dict[Any, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    turns = max(len(rows) for rows in by_class.values())
    in_turn = [
        rows[turn]
        for turn in range(turns)
        for _, rows in sorted(by_class.items(), key=str)
        if turn < len(rows)
    ]
    return np.array(in_turn[:PER_SPLIT])


@torch.no_grad()
def _answer(explainer: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    images = batch.images.float() / 255
    explained = explainer(images, batch.teacher.classes if batch.teacher else None)
    return heat(explained.maps, images)[:, 0], explained.logits.argmax(1)


def _draw_block(axes: np.ndarray, split: str, block: dict[str, Any]) -> None:
    batch: Batch = block["batch"]
    for row in range(len(axes)):
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
        if row >= len(batch.rows):
            for axis in axes[row]:
                axis.set_visible(False)
            continue
        image = batch.images[row].permute(1, 2, 0).numpy()
        axes[row, 0].imshow(image)
        axes[row, 0].set_ylabel(split if row == 0 else "", fontsize=9)
        label = int(batch.labels[row])
        for axis, (maps, predicted) in zip(axes[row, 1:], block["answers"].values(), strict=True):
            overlay(axis, image, maps[row])
            if label >= 0:
                right = int(predicted[row]) == label
                colour = "tab:green" if right else "tab:red"
                axis.text(
                    0.04, 0.04, "✓" if right else "✗", color=colour, transform=axis.transAxes, weight="bold"
                )
                for spine in axis.spines.values():
                    spine.set(color=colour, linewidth=2)


def _draw_curves(figure: Any, experiment: Experiment, layout: Layout) -> None:
    """Training loss and validation scores of the first finished seed of every student."""
    panels = {
        "loss": "training loss",
        "val_accuracy": "validation accuracy",
        "val_agreement": "validation agreement",
    }
    axes = figure.subplots(1, len(panels))
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=7)
        for name in experiment.students:
            points = _curve(experiment, layout, name, metric)
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        if metric == "loss":
            axis.set_yscale("log")
            axis.legend(fontsize=6)


def _curve(experiment: Experiment, layout: Layout, name: str, metric: str) -> list[tuple[int, float]]:
    runs = [Run(layout.run(name, seed)) for seed in experiment.seeds]
    finished = next((run for run in runs if run.done), None)
    if finished is None:
        return []
    return [(line["epoch"], line[metric]) for line in finished.history() if metric in line]
