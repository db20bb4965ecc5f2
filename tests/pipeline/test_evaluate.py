"""Scores of a split against hand-computed cases, whatever the batches and processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from artifacts import Sample, open_images
from artifacts.packing import write_images
from pipeline import metrics
from pipeline.data.loader import Answers, Batch, PairedRows
from pipeline.evaluate import measure, read_samples, samples_file, save_samples, score, teacher_answers
from pipeline.layout import Layout

SIZE = 8


class Split:
    """What `score` reads of a PairedRows: batches by row."""

    def __init__(self, whole: Batch, *, multilabel: bool = False, labelled: bool = True) -> None:
        self.whole, self.multilabel, self.labelled = whole, multilabel, labelled
        self.rows = np.arange(len(whole.rows))

    def read(self, rows: np.ndarray) -> Batch:
        def part(value: Any) -> Any:
            if isinstance(value, Answers):
                return Answers(*(tensor[rows] for tensor in value))
            return (
                tuple(value[row] for row in rows)
                if isinstance(value, tuple)
                else value
                if value is None
                else value[rows]
            )

        whole = self.whole
        return Batch(*(part(value) for value in (whole.rows, whole.images, whole.labels, whole.groups, whole.boxes,
                                                 whole.masks, whole.teacher)))  # fmt: skip


class OneProcess:
    """A Fabric of one CPU process, or the view of rank `global_rank` of `world_size`."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.global_rank, self.world_size, self.device = rank, world, torch.device("cpu")


def batch(logits: Tensor, labels: Tensor, **more: Any) -> tuple[Batch, Callable[..., Any]]:
    """Images that carry their own row number, and an answer that looks its logits up by it; maps are constant."""
    count = len(logits)
    images = torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    maps = more.pop("maps", torch.ones(count, 1, 2, 2))

    def answer(pixels: Tensor, classes: Tensor | None, stored: Answers | None) -> tuple[Tensor, Tensor]:
        rows = (pixels[:, 0, 0, 0] * 255).round().long()
        return logits[rows], maps[rows]

    return Batch(torch.arange(count), images, labels, **more), answer


def scored(whole: Batch, answer: Any, batch_size: int = 3, **split: Any) -> Any:
    return score(OneProcess(), answer, Split(whole, **split), batch_size)  # type: ignore[arg-type]


LOGITS = torch.tensor(
    [[3.0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, -9], [0, 0, 3, 0, 0, 0], [9, 0, 0, 0, 0, 1], [0, 0, 0, 0, 5, 0]]
)
LABELS = torch.tensor([0, 1, 0, 5, 5])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 99])
def test_accuracy_top5_and_groups(batch_size: int) -> None:
    groups = torch.tensor([0, 0, 1, 1, 1])
    found = scored(*batch(LOGITS, LABELS, groups=groups), batch_size)
    assert found["accuracy"] == pytest.approx(2 / 5)
    assert found["top5"] == pytest.approx(1.0)
    assert found["group_0_accuracy"] == 1
    assert found["group_1_accuracy"] == found["worst_group_accuracy"] == 0
    assert found.samples["accuracy"].tolist() == [1, 1, 0, 0, 0]
    assert "_group" not in found.samples
    assert "agreement" not in found


def test_calibration_by_hand() -> None:
    confidence, correct = torch.tensor([0.95, 0.95, 0.55, 1.0]), torch.tensor([1.0, 0, 1, 1])
    # 0.95 and 1.0 share the last of 15 bins: |2 - 2.9|, and 0.55 is alone: |1 - 0.55|
    assert metrics.calibration_error(confidence, correct) == pytest.approx((0.9 + 0.45) / 4)
    assert metrics.calibration_error(torch.tensor([0.0]), torch.tensor([0.0])) == 0
    sure = torch.zeros(4, 2)
    sure[:, 0] = 100.0
    assert scored(*batch(sure, torch.tensor([0, 0, 0, 1])))["ece"] == pytest.approx(0.25)


def test_agreement_and_the_cosine_of_every_explained_class() -> None:
    stored = torch.zeros(2, 2, 1, 2, 2)
    stored[0, 0, 0] = torch.tensor([[1.0, 1], [1, 1]])
    stored[0, 1, 0] = torch.tensor([[1.0, 0], [0, 0]])
    stored[1, 0, 0] = torch.tensor([[0.0, 0], [1, 1]])
    teacher = Answers(LOGITS[:2], torch.tensor([[0, 3], [1, -1]]), stored)
    found = scored(*batch(LOGITS[[0, 2]], LABELS[:2], teacher=teacher), labelled=False)
    assert found.samples["agreement"].tolist() == [1, 0]
    assert found.samples["map_cosine"].tolist() == pytest.approx([(1 + 0.5) / 2, 0.5**0.5])


def test_the_teacher_agrees_with_itself_and_has_only_its_own_maps() -> None:
    maps = torch.rand(2, 2, 1, 2, 2) + 0.1
    teacher = Answers(LOGITS[:2], torch.tensor([[0, 3], [1, -1]]), maps)
    assert torch.equal(
        teacher_answers(LOGITS, torch.tensor([3, 1]), teacher)[1], torch.stack([maps[0, 1], maps[1, 0]])
    )
    whole, _ = batch(LOGITS[:2], LABELS[:2], teacher=teacher)
    found = scored(whole, teacher_answers)
    assert found["agreement"] == 1
    assert found["map_cosine"] == pytest.approx(1)


def test_rows_without_an_annotation_do_not_count() -> None:
    masks = torch.zeros(3, 1, SIZE, SIZE)
    masks[0, :, :, : SIZE // 2] = 1
    masks[1] = 1
    found = scored(*batch(LOGITS[:3], LABELS[:3], masks=masks))
    assert found.samples["epg"].tolist()[:2] == pytest.approx([0.5, 1])
    assert found.samples["epg"][2].isnan()
    assert found["epg"] == pytest.approx(0.75)


def test_dead_maps_count_as_missing_the_object() -> None:
    masks = torch.ones(2, 1, SIZE, SIZE)
    maps = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    found = scored(*batch(LOGITS[:2], LABELS[:2], masks=masks, maps=maps))
    assert found["dead"] == found["epg"] == 0.5


LABEL_TABLE = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 0]])
BOXES = (
    torch.tensor([[0.0, 0, 0, 4, 8], [1, 4, 0, 8, 4], [1, 4, 4, 8, 8]]),
    torch.tensor([[1.0, 0, 0, 8, 2]]),
    torch.empty(0, 5),
)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_several_labels_f1_over_the_split_and_each_labels_own_boxes(batch_size: int) -> None:
    logits = torch.tensor([[1.0, -1, 1], [-1, 1, -1], [-1, -1, -1]])
    whole, answer = batch(logits, LABEL_TABLE, boxes=BOXES, masks=torch.ones(3, 1, SIZE, SIZE))

    def left_for_class_0(pixels: Tensor, classes: Tensor | None, stored: Any) -> tuple[Tensor, Tensor]:
        """The left half for class 0, everything for class 1."""
        found, maps = answer(pixels, classes, stored)
        maps = maps.clone()
        if classes is not None:
            maps[classes == 0, :, :, 1:] = 0
        return found, maps

    found = scored(whole, left_for_class_0, batch_size, multilabel=True)
    assert found["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert "accuracy" not in found
    left = np.interp((np.arange(8) + 0.5) / 4 - 0.5, [0, 1], [1, 0])  # bilinear from 2 to 8 px
    label_0 = left[:4].sum() / left.sum()
    assert found.samples["epg"][0] == pytest.approx((label_0 + 0.5) / 2, abs=1e-6)
    assert found.samples["epg"][1] == pytest.approx(0.25)
    assert found.samples["epg"][2].isnan()


def test_any_number_of_processes_measures_the_same() -> None:
    """Each process's rows; what they sum up to is the one process's result."""
    whole, answer = batch(LOGITS, LABELS)
    split = Split(whole)
    together: dict[int, float] = {}
    for rank in (0, 1):
        mine = split.rows[rank::2]
        values = measure(answer, split.read(mine), split)  # type: ignore[arg-type]
        together |= dict(zip(mine.tolist(), values["accuracy"].float().tolist(), strict=True))
    assert [together[row] for row in range(5)] == scored(whole, answer).samples["accuracy"].tolist()


def test_a_student_of_another_kind_of_map_has_no_map_cosine() -> None:
    teacher = Answers(LOGITS[:2], torch.tensor([[0], [1]]), torch.rand(2, 1, 6, 8, 8))
    assert "map_cosine" not in scored(*batch(LOGITS[:2], LABELS[:2], teacher=teacher))


def test_samples_come_back_from_their_file(tmp_path: Path) -> None:
    file = samples_file(tmp_path, "sun/train")
    assert file.name == "scores-sun--train.safetensors"
    save_samples(file, {"accuracy": torch.tensor([1.0, 0]), "epg": torch.tensor([0.5, float("nan")])})
    found = read_samples(file)
    assert found["accuracy"].tolist() == [1, 0]
    assert found["epg"][1].isnan()


def test_unlabelled_images_without_a_store(tmp_path: Path, fabric: Fabric) -> None:
    layout = Layout(tmp_path)
    write_images(
        layout.images("val"),
        count=3,
        get=lambda row: Sample(f"s{row}", np.full((3, SIZE, SIZE), row, np.uint8)),
        view={"size": SIZE},
        classes=[],
        source="test",
        rows_per_shard=2,
    )
    rows = PairedRows(open_images(layout.images("val")), masks="any")
    _, answer = batch(LOGITS[:3], LABELS[:3])
    found = score(fabric, answer, rows, 2)
    assert set(found) == {"dead"}
