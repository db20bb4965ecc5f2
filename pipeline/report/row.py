"""One row of a store as a picture: the image, the teacher's map over it, its highest logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import from_numpy

from artifacts import ImageSet, TeacherStore
from pipeline.explain import by_name
from pipeline.report.overlay import drawn, overlay, save
from pipeline.report.plotting import plt

TOP = 5


def draw_row(store: TeacherStore, images: ImageSet, row: int, path: Path) -> list[tuple[str, float]]:
    """Write the picture; returns the top classes with their logits, highest first."""
    answers, sample = store.read([row]), images[row]
    names, logits = store.manifest.teacher.class_names, answers.logits[0, 0]
    order = np.argsort(-logits)[:TOP]
    top = [(names[k] if k < len(names) else f"class {k}", float(logits[k])) for k in order.tolist()]
    explained = int(answers.explained_class[0, 0, 0])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
    pixels = sample.image.transpose(1, 2, 0)
    left.imshow(pixels)
    left.set_title(drawn(f"row {row}: {sample.key}, label {sample.label}"), fontsize=9, parse_math=False)
    image = from_numpy(sample.image)[None].float() / 255
    explainer = store.manifest.explainer.name
    overlay(middle, pixels, by_name(explainer).heat(from_numpy(answers.maps[0, :1, 0]), image)[0, 0])
    middle.set_title(drawn(f"{explainer} of class {explained}"), fontsize=9, parse_math=False)
    for axis in (left, middle):
        axis.set_xticks([])
        axis.set_yticks([])
    bars = range(len(top))
    right.barh(
        bars, [logit for _, logit in top], color=["C1" if k == explained else "C0" for k in order.tolist()]
    )
    right.set_yticks(bars, [drawn(name, 24) for name, _ in top], fontsize=8, parse_math=False)
    right.invert_yaxis()
    right.set_title("highest logits", fontsize=9)
    save(figure, path, dpi=110)
    return top
