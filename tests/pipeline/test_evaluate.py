"""Scores of a split against hand-computed cases, whatever the batches and processes.

The second gloo process of `test_two_processes_score_as_one` runs this file, `python test_evaluate.py FOLDER`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor

from artifacts import Sample, open_images
from artifacts.errors import ConfigError, DataError, Diverged
from artifacts.packing import Packing, write_images
from pipeline.config import EvaluateConfig
from pipeline.data.batches import Answers, Batch, PairedRows
from pipeline.devices import start
from pipeline.evaluate import metrics
from pipeline.evaluate.scores import (
    Answer,
    Scores,
    measure,
    read_samples,
    samples_file,
    save_samples,
    score,
    student_answers,
    teacher_answers,
    teacher_answers_beyond,
)
from pipeline.evaluate.shift import shift_curve
from pipeline.explain import BCos, Explained, Explainer, GradCAM
from pipeline.workspace import Layout

SIZE = 8
ROOT = Path(__file__).parents[2]


class Split:
    """What `score` reads of a PairedRows: batches by row, and whose maps the store has."""

    def __init__(
        self, whole: Batch, *, multilabel: bool = False, labelled: bool = True, explainer: str = "gradcam"
    ) -> None:
        self.whole, self.multilabel, self.labelled = whole, multilabel, labelled
        self.rows = np.arange(len(whole.rows))
        manifest = SimpleNamespace(explainer=SimpleNamespace(name=explainer))
        self.store = SimpleNamespace(manifest=manifest)

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


def batch(
    logits: Tensor, labels: Tensor, explainer: type[Explainer] = GradCAM, **more: Any
) -> tuple[Batch, Answer]:
    """Images that carry their own row number, and an answer that looks its logits up by it; maps are constant."""
    count = len(logits)
    images = torch.zeros(count, 3, SIZE, SIZE, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(count)
    maps = more.pop("maps", torch.ones(count, 1, 2, 2))

    def ask(pixels: Tensor, classes: Tensor | None, stored: Answers | None) -> tuple[Tensor, Tensor]:
        rows = (pixels[:, 0, 0, 0] * 255).round().long()
        return logits[rows], maps[rows]

    return Batch(torch.arange(count), images, labels, **more), Answer(ask, explainer)


def scored(whole: Batch, answer: Answer, batch_size: int = 3, **split: Any) -> Any:
    return Both(score(OneProcess(), answer, Split(whole, **split), batch_size))  # type: ignore[arg-type]


class Both(dict[str, float]):
    """The means of scores by name, with their samples."""

    def __init__(self, scores: Scores) -> None:
        super().__init__(scores.means)
        self.samples = scores.samples


LOGITS = torch.tensor(
    [[3.0, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, -9], [0, 0, 3, 0, 0, 0], [9, 0, 0, 0, 0, 1], [0, 0, 0, 0, 5, 0]]
)
LABELS = torch.tensor([0, 1, 0, 5, 5])


@pytest.mark.parametrize("batch_size", [1, 2, 5, 99])
def test_accuracy_top5_and_groups(batch_size: int) -> None:
    groups = torch.tensor([0, 0, 1, 1, 1])
    found = scored(*batch(LOGITS, LABELS, groups=groups), batch_size)
    assert found["accuracy"] == pytest.approx(2 / 5)
    assert found["group_0_accuracy"] == 1
    assert found["group_1_accuracy"] == found["worst_group_accuracy"] == 0
    assert found.samples["accuracy"].tolist() == [1, 1, 0, 0, 0]
    assert found.samples["group"].tolist() == [0, 0, 1, 1, 1]
    assert not {"group", "confidence"} & set(found)
    assert "agreement" not in found


def test_top5_by_hand() -> None:
    """The labels are the first, the fifth and the sixth of seven distinct logits."""
    logits = torch.arange(7.0).flip(0).repeat(3, 1)
    found = scored(*batch(logits, torch.tensor([0, 4, 5])))
    assert found.samples["top5"].tolist() == [1, 1, 0]
    assert found["top5"] == pytest.approx(2 / 3)
    assert "top5" not in scored(*batch(logits[:, :5], torch.tensor([0, 4, 3])))


def test_groups_of_agreement_and_rows_of_no_group() -> None:
    """Agreement 1, 0 in group 0 and 1 in group 2; the row of no group agrees with nobody."""
    teacher = Answers(LOGITS[[0, 2, 2, 4]], torch.tensor([[0], [2], [2], [4]]), torch.ones(4, 1, 1, 2, 2))
    groups = torch.tensor([0, 0, 2, -1])
    found = scored(*batch(LOGITS[:4], LABELS[:4], groups=groups, teacher=teacher), labelled=False)
    assert found["agreement"] == 0.5
    assert found["group_0_agreement"] == found["worst_group_agreement"] == 0.5
    assert found["group_2_agreement"] == 1
    assert not any("accuracy" in name or "group_-1" in name for name in found)


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
        teacher_answers(GradCAM).ask(LOGITS, torch.tensor([3, 1]), teacher)[1],
        torch.stack([maps[0, 1], maps[1, 0]]),
    )
    whole, _ = batch(LOGITS[:2], LABELS[:2], teacher=teacher)
    found = scored(whole, teacher_answers(GradCAM))
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


@pytest.mark.parametrize("channels", [1, 6])
def test_epg_and_iou_by_hand(channels: int) -> None:
    """The map is the left half, the object the upper half. Of W(x) the contributions count: black pixels give none."""
    heat = torch.zeros(SIZE, SIZE)
    heat[:, :4] = 1
    maps = heat.repeat(1, 1, 1, 1)
    if channels == 6:
        maps = torch.cat([torch.ones(1, 3, SIZE, SIZE), heat.repeat(1, 3, 1, 1)], 1)
    masks = torch.zeros(1, 1, SIZE, SIZE)
    masks[:, :, :4] = 1
    explainer = {1: GradCAM, 6: BCos}[channels]
    found = scored(*batch(LOGITS[:1], LABELS[:1], explainer, masks=masks, maps=maps))
    assert found["epg"] == pytest.approx(0.5)
    assert found["iou"] == pytest.approx(16 / (32 + 32 - 16))


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
        found, maps = answer.ask(pixels, classes, stored)
        maps = maps.clone()
        if classes is not None:
            maps[classes == 0, :, :, 1:] = 0
        return found, maps

    found = scored(whole, Answer(left_for_class_0, GradCAM), batch_size, multilabel=True)
    assert found["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert "accuracy" not in found
    left = np.interp((np.arange(8) + 0.5) / 4 - 0.5, [0, 1], [1, 0])  # bilinear from 2 to 8 px
    label_0 = left[:4].sum() / left.sum()
    assert found.samples["epg"][0] == pytest.approx((label_0 + 0.5) / 2, abs=1e-6)
    assert found.samples["epg"][1] == pytest.approx(0.25)
    assert found.samples["epg"][2].isnan()


def several_labels() -> tuple[Batch, Answer]:
    """Maps of ones: the EPG of a label is the area of its boxes. Labels 1 and 1; 0.25; none; one without a box."""
    labels = torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 1]])
    boxes = (
        torch.tensor([[0.0, 0, 0, 8, 8], [1, 0, 0, 8, 8]]),
        torch.tensor([[0.0, 0, 0, 8, 2], [1, 0, 0, 8, 8]]),
        torch.tensor([[0.0, 0, 0, 8, 8]]),
        torch.tensor([[0.0, 0, 0, 8, 8]]),
    )
    return batch(torch.ones(4, 2), labels, boxes=boxes, masks=torch.ones(4, 1, SIZE, SIZE))


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_the_mean_is_over_images_and_labels_and_a_samples_own_over_its_labels(batch_size: int) -> None:
    found = scored(*several_labels(), batch_size, multilabel=True)
    assert found.samples["localised"].tolist() == [2, 1, 0, 0]
    assert found.samples["epg"].tolist()[:2] == [1, 0.25]
    assert found.samples["epg"][2:].isnan().all()
    assert found["epg"] == pytest.approx((1 + 1 + 0.25) / 3)
    assert "localised" not in found


def test_the_teacher_is_asked_for_the_labels_that_its_store_does_not_hold() -> None:
    """Live maps are ones: their EPG is the area of the label's boxes."""
    whole, _ = several_labels()
    stored = torch.zeros(4, 2, 1, 2, 2)
    stored[:, 0] = 1
    teacher = Answers(torch.ones(4, 2), torch.tensor([[1, -2], [1, -2], [0, 1], [0, -2]]), stored)
    asked: list[list[int]] = []

    def explain(images: Tensor, classes: Tensor) -> Explained:
        asked.append(classes.tolist())
        return Explained(torch.ones(len(images), 2), torch.ones(len(images), 1, 2, 2), classes)

    explainer = torch.nn.Module()
    explainer.forward = explain
    answer = replace(teacher_answers_beyond(explainer), explainer=GradCAM)  # the fake has no heat of its own
    found = scored(replace(whole, teacher=teacher), answer, 4, multilabel=True)
    assert asked == [[0, 0, 1]]
    assert found.samples["localised"].tolist() == [2, 1, 0, 0]
    assert found["epg"] == pytest.approx((1 + 1 + 0.25) / 3)


def test_a_mask_does_not_say_whose_it_is() -> None:
    """Where rows have several labels those without boxes have no EPG, whichever batch they come in."""
    whole, answer = several_labels()
    without = replace(whole, boxes=None)
    assert not {"epg", "iou"} & scored(without, answer, multilabel=True).keys()
    alone = measure(answer, without, Split(whole, multilabel=True))  # type: ignore[arg-type]
    assert alone["epg"].isnan().all()
    assert alone.keys() == measure(answer, whole, Split(whole, multilabel=True)).keys()  # type: ignore[arg-type]


def test_unlabelled_rows_are_not_rows_without_a_class() -> None:
    assert "f1" not in scored(*several_labels(), multilabel=True, labelled=False)


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


def splits() -> dict[str, tuple[Batch, Answer, bool]]:
    """Name -> (rows, answer, several labels?): odd numbers of rows, several labels, and fewer rows than processes."""
    masks = torch.zeros(5, 1, SIZE, SIZE)
    masks[:3, :, :2] = 1
    teacher = Answers(LOGITS.flip(0), LOGITS.flip(0).argmax(1)[:, None], torch.ones(5, 1, 1, 2, 2))
    groups, maps = torch.tensor([0, 1, 1, 0, -1]), torch.arange(20.0).reshape(5, 1, 2, 2)
    return {
        "odd": (*batch(LOGITS, LABELS, groups=groups, masks=masks, teacher=teacher, maps=maps), False),
        "several": (*several_labels(), True),
        "one": (*batch(LOGITS[:1], LABELS[:1], masks=masks[:1], groups=groups[:1]), False),
    }


def scored_by(fabric: Any) -> dict[str, Tensor]:
    """Every mean and every sample of `splits`."""
    found: dict[str, Tensor] = {}
    for name, (whole, answer, several) in splits().items():
        scores = Both(score(fabric, answer, Split(whole, multilabel=several), 2))  # type: ignore[arg-type]
        found |= {f"{name}.mean.{metric}": torch.tensor(value) for metric, value in scores.items()}
        found |= {f"{name}.samples.{metric}": values for metric, values in scores.samples.items()}
    return found


def joined(rank: int, folder: Path) -> dict[str, Tensor]:
    """What one of two gloo processes, which meet in a folder, knows of the scores."""
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", meet, timedelta(seconds=100), world_size=2, rank=rank)
    try:
        return scored_by(start())
    finally:
        dist.destroy_process_group()


def test_two_processes_score_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torchrun |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in (torchrun | {"GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}).items():
        monkeypatch.setenv(name, value)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RANK": "1", "LOCAL_RANK": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as other:
        zero = joined(0, tmp_path)
        error = other.communicate(timeout=100)[1]
    assert other.returncode == 0, error
    expected = scored_by(OneProcess())
    assert len(expected) > 25
    for found in (zero, load_file(tmp_path / "1.safetensors")):
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(found[name], values, rtol=0, atol=0, equal_nan=True)


def test_a_student_of_another_kind_of_map_has_no_map_cosine() -> None:
    teacher = Answers(LOGITS[:2], torch.tensor([[0], [1]]), torch.rand(2, 1, 6, 8, 8))
    rows = batch(LOGITS[:2], LABELS[:2], teacher=teacher)
    assert "map_cosine" not in scored(*rows, explainer="bcos")
    one_channel = replace(rows[0], teacher=teacher._replace(maps=torch.rand(2, 1, 1, 2, 2)))
    assert "map_cosine" not in scored(one_channel, rows[1], explainer="bcos")
    assert "map_cosine" in scored(one_channel, rows[1], explainer="gradcam")


def test_samples_come_back_from_their_file(tmp_path: Path) -> None:
    file = samples_file(tmp_path, "sun/train")
    assert file.name == "scores-sun--train.safetensors"
    save_samples(file, {"accuracy": torch.tensor([1.0, 0]), "epg": torch.tensor([0.5, float("nan")])})
    found = read_samples(file)
    assert found["accuracy"].tolist() == [1, 0]
    assert found["epg"][1].isnan()


def test_a_damaged_file_of_samples_is_named(tmp_path: Path) -> None:
    file = samples_file(tmp_path, "test")
    save_samples(file, {"accuracy": torch.rand(9)})
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"scores-test\.safetensors is damaged .*e2kd evaluate"):
        read_samples(file)
    with pytest.raises(FileNotFoundError):
        read_samples(tmp_path / "none")


def packed(layout: Layout) -> None:
    write_images(
        layout.images("val"),
        Packing(
            count=3,
            get=lambda row: Sample(f"s{row}", np.full((3, SIZE, SIZE), row, np.uint8)),
            view={"size": SIZE},
            classes=[],
            source="test",
            rows_per_shard=2,
        ),
    )


def test_unlabelled_images_without_a_store(tmp_path: Path, fabric: Fabric) -> None:
    layout = Layout(tmp_path)
    packed(layout)
    rows = PairedRows(open_images(layout.images("val")), masks="any")
    _, answer = batch(LOGITS[:3], LABELS[:3])
    found = Both(score(fabric, answer, rows, 2))
    assert set(found) == {"dead"}


class Still(torch.nn.Module):
    """Explains every image by the same map."""

    def forward(self, images: Tensor, classes: Tensor | None = None, explain: bool = True) -> Explained:
        logits = images.mean((2, 3))
        return Explained(logits, torch.ones(len(images), 1, 2, 2), logits.argmax(1))


class Lost(Still):
    """A network that answers some images with NaN."""

    def forward(self, images: Tensor, classes: Tensor | None = None, explain: bool = True) -> Explained:
        whole = super().forward(images, classes, explain)
        maps = whole.maps.where(torch.arange(len(images))[:, None, None, None] > 0, torch.nan)
        return Explained(whole.logits, maps, whole.classes)


def test_a_diverged_network_has_no_scores(tmp_path: Path) -> None:
    """NaN maps would be left out of EPG as rows without an annotation are, and raise it."""
    whole, _ = batch(LOGITS, LABELS)
    with pytest.raises(Diverged, match="NaN or infinity"):
        scored(whole, student_answers(Lost()))
    layout = Layout(tmp_path)
    packed(layout)
    with pytest.raises(Diverged, match="maps of shifted images"):
        shift_curve(
            Lost(), open_images(layout.images("val")), EvaluateConfig(shifts=(1,)), torch.device("cpu")
        )


def test_a_shift_must_leave_something_of_the_image(tmp_path: Path) -> None:
    layout, cpu = Layout(tmp_path), torch.device("cpu")
    packed(layout)
    images = open_images(layout.images("val"))
    found = shift_curve(Still(), images, EvaluateConfig(shifts=(SIZE - 1,)), cpu)
    assert found == {"shifts": [SIZE - 1], "cosine": [1.0]}
    with pytest.raises(ConfigError, match=r"evaluate\.shifts: 8 px"):
        shift_curve(Still(), images, EvaluateConfig(shifts=(0, SIZE)), cpu)


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_file(joined(1, Path(sys.argv[1])), Path(sys.argv[1]) / "1.safetensors")
