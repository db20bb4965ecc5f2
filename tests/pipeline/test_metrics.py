"""Metrics on cases small enough to compute by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.data.masks import boxes_to_mask
from pipeline.evaluate.metrics import (
    accuracy,
    agreement,
    calibration_error,
    epg,
    f1,
    f1_counts,
    in_top,
    iou,
    shift_similarity,
)

MAPS = torch.tensor([[[[4.0, 2.0], [-5.0, 2.0]]], [[[0.0, 0.0], [-1.0, 0.0]]], [[[1.0, 0.0], [0.0, 0.0]]]])
MASKS = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 1]], [[0, 1], [1, 0]]]).bool()


def test_accuracy_and_agreement() -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0, 9.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert float(accuracy(student, torch.tensor([1, 0, 0, 0]))) == 0.5
    assert float(agreement(student, teacher)) == 0.75


def test_f1_by_hand() -> None:
    """Predicted 4 (a logit of 0 counts), true 3, both 2: 2*2 / 7."""
    logits = torch.tensor([[0.0, -1.0, 2.0], [1.0, -3.0, 1.0]])
    labels = torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert float(f1(logits, labels)) == pytest.approx(4 / 7)
    assert float(f1(-logits - 1, torch.zeros(2, 3))) == 0


def test_f1_counts_add_up_to_f1() -> None:
    logits = torch.tensor([[0.0, -1.0, 2.0], [1.0, -3.0, 1.0]])
    labels = torch.tensor([[1, 1, 1], [0, 0, 0]])
    counts = {name: values.tolist() for name, values in f1_counts(logits, labels).items()}
    assert counts == {"f1_hits": [2, 0], "f1_predicted": [2, 2], "f1_true": [3, 0]}
    assert float(f1(logits, labels)) == pytest.approx(2 * 2 / (4 + 3))


def test_in_top_by_hand() -> None:
    logits = torch.tensor([[5.0, 4, 3, 2]]).repeat(4, 1)
    labels = torch.tensor([0, 1, 2, -1])
    assert in_top(logits, labels, 1).tolist() == [True, False, False, False]
    assert in_top(logits, labels, 2).tolist() == [True, True, False, False]


def test_calibration_error_by_hand() -> None:
    """Two bins (0, .5] and (.5, 1]: |1 - (.2 + .5)| and |1 - (.6 + .9)|, over four."""
    confidence, correct = torch.tensor([0.2, 0.5, 0.6, 0.9]), torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert calibration_error(confidence, correct, bins=2) == pytest.approx((0.3 + 0.5) / 4)
    assert calibration_error(torch.empty(0), torch.empty(0)) == 0


def test_epg_by_hand() -> None:
    """Energies 8, 0 and 1; inside 6, 0 and 0."""
    expected = torch.tensor([0.75, 0.0, 0.0])
    torch.testing.assert_close(epg(MAPS, MASKS), expected)
    torch.testing.assert_close(epg(MAPS, MASKS[:, None].float()), expected)
    assert epg(torch.full((1, 1, 2, 2), 1e-8), torch.ones(1, 1, 2, 2)).item() == 0


def test_iou_by_hand() -> None:
    """Scaled to 0..1: [1, .5, 0, .5]; strictly above .5 is one pixel of three in the mask."""
    torch.testing.assert_close(iou(MAPS, MASKS), torch.tensor([1 / 3, 0.0, 0.0]))
    torch.testing.assert_close(iou(MAPS, MASKS, threshold=0.4), torch.tensor([0.5, 0.0, 0.0]))
    assert iou(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)).item() == 0
    # A map without a zero, scaled: [1, .5, .25, 0].
    high = torch.tensor([8.0, 6.0, 5.0, 4.0]).reshape(1, 1, 2, 2)
    assert iou(high, torch.tensor([[[1, 1], [0, 0]]])).item() == 0.5


def test_masks_of_other_sizes_are_refused() -> None:
    for metric in (epg, iou):
        with pytest.raises(ValueError, match="upsample"):
            metric(torch.rand(2, 1, 7, 7), torch.rand(2, 14, 14))


def test_explanations_that_move_along_are_similar() -> None:
    images = torch.rand(4, 3, 32, 32)
    moving = shift_similarity(lambda x: x.mean(1, keepdim=True), images, [0, 3, 16])
    assert moving.shape == (3, 4)
    torch.testing.assert_close(moving, torch.ones(3, 4))

    def fixed(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.rand(len(x), 1, 32, 32) - 0.5

    assert shift_similarity(fixed, images, [5]).abs().max() < 0.2


def test_coarse_maps_are_compared_at_image_size() -> None:
    """Average pooling over 4x4 moves exactly with shifts of 4 px, but for the border cells' interpolation."""
    images = torch.rand(3, 3, 32, 32)
    similar = shift_similarity(lambda x: torch.nn.functional.avg_pool2d(x, 4), images, [4])
    assert similar.min() > 0.99


def test_maps_that_move_along_are_1_at_every_shift_whatever_leaves_the_canvas() -> None:
    """A pixelwise map: the border that is repeated, and the pixels pushed out, are outside the compared area."""
    images = torch.rand(3, 3, 32, 32)
    similar = shift_similarity(lambda x: (x**2).mean(1, keepdim=True) - 0.3, images, range(17))
    torch.testing.assert_close(similar, torch.ones(17, 3), rtol=0, atol=1e-6)


def test_patches_of_16_have_a_period_of_16() -> None:
    """A ViT's fixed grid (paper Fig. 5): again 1 when the shift is a whole patch, and low in between."""

    def patches(images: Tensor) -> Tensor:
        cells = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True) - 0.5, 16)
        return cells.repeat_interleave(16, 2).repeat_interleave(16, 3)

    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    similar = shift_similarity(patches, images, range(17)).mean(1)
    assert similar[0] == pytest.approx(1)
    assert similar[16] == pytest.approx(1)
    assert similar[4:13].max() < 0.6


@pytest.mark.parametrize("shift", [-1, 8, 9])
def test_a_shift_that_leaves_nothing_is_refused(shift: int) -> None:
    with pytest.raises(ValueError, match="shifts must be 0 to 7 px"):
        shift_similarity(lambda x: x, torch.rand(1, 3, 8, 8), [0, shift])


def test_boxes_to_mask() -> None:
    boxes = torch.tensor([[7, 1.0, 0.0, 3.0, 1.0], [2, 0.6, 2.0, 1.5, 4.0]])
    union = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    assert torch.equal(boxes_to_mask(boxes, 4, cls=7), union)
    assert torch.equal(boxes_to_mask(boxes, 4), union)  # the second holds no pixel centre
    boxes[1, 1] = 0.5
    union[2:, 0] = True
    assert torch.equal(boxes_to_mask(boxes, 4), union)
    assert not boxes_to_mask(torch.zeros(0, 5), 4).any()
