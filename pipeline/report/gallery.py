"""Images beside the teacher's and every method's map (as the paper's Figs. 3-5), with marks of right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifacts import ImageSet
from artifacts.errors import E2kdError
from artifacts.names import in_file_name
from pipeline.data.source import Label
from pipeline.explain import Explainer, by_name
from pipeline.provenance import matching_store
from pipeline.report.document import Block, Picture, Text
from pipeline.report.overlay import drawn, overlay, save
from pipeline.report.pictures import grid
from pipeline.report.results import Results
from pipeline.training.trained import load_student

PER_SPLIT = 4
"""Example images of each split: the first ones of the classes in turn, never picked by how they look."""

MOST_SPLITS, MOST_METHODS = 2, 12

RIGHT, WRONG = "#1a7f37", "#cf222e"


@dataclass(frozen=True)
class Examples:
    """n images u8 [n,3,S,S], their labels, the explained classes i64 [n], and the class names."""

    images: Tensor
    labels: Sequence[Label]
    explained: Tensor
    names: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """A model's logits [n,C], its maps [n,c,h,w] of the explained classes, and the kind of these maps."""

    logits: Tensor
    maps: Tensor
    explainer: type[Explainer]


def draw_gallery(results: Results, folder: Path) -> list[Block]:
    """`maps-<split>.png` of the first held-out splits; a sentence if a split's images or store are not usable."""
    blocks: list[Block] = []
    for split in results.experiment.evaluate.splits[:MOST_SPLITS]:
        try:
            examples, answers = _ask(results, split)
        except E2kdError as error:
            # the reason may name folders and people: it is for whoever makes the report, not for who reads it
            results.workspace.progress.say(f"no maps of {split} are shown: {error}")
            blocks.append(
                Text(f"No maps of {split} are shown: its images, its store or a student cannot be used.")
            )
            continue
        file = f"maps-{in_file_name(split)}.png"
        draw_examples(examples, answers, folder / file)
        left_out = [method.name for method in results.methods[MOST_METHODS:]]
        caption = _caption(split) + (f" Not shown: {', '.join(left_out)}." if left_out else "")
        blocks.append(Picture(file, _alt(split, examples, answers), caption, 110 * (1 + len(answers))))
    return blocks


def predicted(logits: Tensor, label: Label) -> Label:
    """What logits [C] answer, in the form of the label: the top-1, or every class with a logit of 0 and above."""
    if isinstance(label, tuple):
        return tuple(torch.nonzero(logits >= 0)[:, 0].tolist())
    return int(logits.argmax())


def is_right(logits: Tensor, label: Label) -> bool | None:
    """Whether the answer is the label (of several classes: the same set); None if there is no label."""
    if label is None:
        return None
    answer = predicted(logits, label)
    return (
        set(answer) == set(label)
        if isinstance(answer, tuple) and isinstance(label, tuple)
        else answer == label
    )


def rows_by_class(labels: Sequence[Label], count: int = PER_SPLIT) -> np.ndarray:
    """The first rows of the classes in turn, i64 [<= count]; of several classes the first decides."""
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        first = (label[0] if label else -1) if isinstance(label, tuple) else -1 if label is None else label
        by_class.setdefault(first, []).append(row)
    queues = [rows for _, rows in sorted(by_class.items())]
    turns = max(map(len, queues), default=0)
    in_turn = (rows[turn] for turn in range(turns) for rows in queues if turn < len(rows))
    return np.array([row for row, _ in zip(in_turn, range(count), strict=False)], np.int64)


def _ask(results: Results, split: str) -> tuple[Examples, dict[str, Answer]]:
    """The stored teacher and the first finished seed of every method, about the same images and classes."""
    workspace = results.workspace
    images = workspace.open_images(split)
    store = matching_store(workspace, split, images)
    rows = rows_by_class(images.labels)
    stored = store.read(rows)
    classes = torch.from_numpy(stored.explained_class[:, 0, 0])
    examples = _examples(images, rows, classes)
    logits, maps = torch.from_numpy(stored.logits[:, 0]), torch.from_numpy(stored.maps[:, 0, 0])
    answers = {"teacher": Answer(logits, maps, by_name(store.manifest.explainer.name))}
    for method in results.methods[:MOST_METHODS]:
        seed = next(iter(results.results[method.name]))
        student = load_student(workspace, method.student, seed)
        answers[method.name] = _answer(student, examples)
    return examples, answers


def _examples(images: ImageSet, rows: np.ndarray, classes: Tensor) -> Examples:
    labels = [images.labels[row] for row in rows.tolist()]
    return Examples(torch.from_numpy(images.read_images(rows)), labels, classes, images.classes)


@torch.no_grad()
def _answer(explainer: Explainer, examples: Examples) -> Answer:
    explained = explainer(examples.images.float() / 255, examples.explained)
    return Answer(explained.logits, explained.maps, type(explainer))


def draw_examples(examples: Examples, answers: Mapping[str, Answer], path: Path) -> None:
    """Write the PNG: a row per image, a column for it and one per model."""
    rows, columns = len(examples.labels), 1 + len(answers)
    figure, axes = grid(rows, columns, (1.5 * columns, 1.62 * rows + 0.3))
    for axis, title in zip(axes[0], ["image", *answers], strict=True):
        axis.set_title(drawn(title), fontsize=10, parse_math=False)
    for row in range(rows):
        image = examples.images[row].permute(1, 2, 0).numpy()
        axes[row, 0].imshow(image)
        axes[row, 0].set_xlabel(_name(examples, int(examples.explained[row])), fontsize=8, parse_math=False)
        for axis, answer in zip(axes[row, 1:], answers.values(), strict=True):
            _draw_map(axis, answer.explainer, answer.maps[row], image)
            _mark(axis, is_right(answer.logits[row], examples.labels[row]))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    save(figure, path)


def _draw_map(axis: Any, explainer: type[Explainer], maps: Tensor, image: np.ndarray) -> None:
    """A map [c,h,w] in its explainer's own colours on white, or else as heat over the grey image u8 [S,S,3]."""
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    picture = explainer.picture(maps[None], pixels)
    if picture is not None:
        axis.imshow(picture[0].permute(1, 2, 0).numpy())
    else:
        overlay(axis, image, explainer.heat(maps[None], pixels)[0, 0])


def _mark(axis: Any, right: bool | None) -> None:
    if right is None:
        return
    paint = RIGHT if right else WRONG
    box = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axis.text(
        0.05,
        0.06,
        "✓" if right else "✗",
        color=paint,
        transform=axis.transAxes,
        weight="bold",
        fontsize=9,
        bbox=box,
    )
    for spine in axis.spines.values():
        spine.set(color=paint, linewidth=2)


def _name(examples: Examples, cls: int, most: int = 22) -> str:
    name = str(examples.names[cls]) if 0 <= cls < len(examples.names) else f"class {cls}"
    return drawn(name, most)


def _caption(split: str) -> str:
    return (
        f"{split}: the first images of the classes in turn; under each the class whose map is shown, the teacher's. "
        "✓ in green: answered as the label says; ✗ in red: not. Maps of the first finished seed. GradCAM: heat over "
        "the grey image; B-cos: the dynamic weights in colour."
    )


def _alt(split: str, examples: Examples, answers: Mapping[str, Answer]) -> str:
    """Who is right how often, in words."""
    told = []
    for name, answer in answers.items():
        marks = [
            is_right(logits, label) for logits, label in zip(answer.logits, examples.labels, strict=True)
        ]
        told.append(name if None in marks else f"{name} (right on {sum(map(bool, marks))} of {len(marks)})")
    return f"{len(examples.labels)} images of {split} with the maps of {', '.join(told)}"
