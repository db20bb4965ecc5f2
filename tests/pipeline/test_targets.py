"""What a step is about: the drawn class, the teacher's positive classes, mixup of images and frozen targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import explain as explainers
from pipeline.augment.counter import key_ids, mixup_share
from pipeline.config import ModelConfig
from pipeline.data.batches import Answers, Targets
from pipeline.distill.targets import drawn_targets, mixed, mixed_targets
from pipeline.explain.classes import class_share, drawn, positive_classes
from pipeline.models import build
from pipeline.models.bcos import BCosClassifier

CLASSES = torch.tensor([[4, 2, -1], [1, -1, -1], [0, 3, 5]])


@pytest.fixture
def small_bcos() -> BCosClassifier:
    torch.manual_seed(0)
    net = build(ModelConfig(model="bcos/small", width=4), 5)
    assert isinstance(net, BCosClassifier)
    return net


def test_every_explained_class_is_drawn_about_equally_often_and_none_that_is_absent() -> None:
    ids = key_ids(["a", "b", "c"])
    counts = np.zeros((3, 3))
    for epoch in range(300):
        counts[np.arange(3), drawn(CLASSES, class_share(0, epoch, ids)).numpy()] += 1
    assert (counts[0, :2] > 110).all()
    assert counts[0, 2] == 0
    assert counts[1].tolist() == [300, 0, 0]
    assert (counts[2] > 70).all()


def test_the_draw_is_the_samples_own_whatever_the_batch() -> None:
    ids = key_ids([f"key-{i}" for i in range(9)])
    assert torch.equal(class_share(3, 5, ids)[4:], class_share(3, 5, ids[4:]))
    assert not torch.equal(class_share(3, 5, ids), class_share(3, 6, ids))


def test_drawn_targets_are_the_maps_of_the_drawn_class() -> None:
    maps = torch.arange(9.0).reshape(3, 3, 1, 1, 1)
    found = drawn_targets(Answers(torch.zeros(3, 6), CLASSES, maps), torch.tensor([0.6, 0.99, 0.99]))
    assert found.classes.tolist() == [2, 1, 5]
    assert found.maps.flatten().tolist() == [1, 3, 8]


def test_positive_classes_highest_first_at_least_one_at_most_so_many() -> None:
    logits = torch.tensor([[-1.0, 2.0, 0.5, 3.0], [-3.0, -1.0, -2.0, -4.0], [1.0, 0.0, -1.0, -1.0]])
    assert positive_classes(logits, 2).tolist() == [[3, 1], [1, -1], [0, -1]]
    assert positive_classes(logits, 6)[0].tolist() == [3, 1, 2, -1, -1, -1]


def test_mixed_pairs_with_the_batch_rolled_by_one() -> None:
    assert mixed(torch.tensor([1.0, 2.0, 4.0]), 0.75).tolist() == [1.75, 1.75, 3.5]


def test_the_share_of_mixup_is_a_function_of_seed_epoch_and_step() -> None:
    shares = [mixup_share(1.0, 0, 0, step) for step in range(400)]
    assert shares == [mixup_share(1.0, 0, 0, step) for step in range(400)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)  # Beta(1, 1) is uniform
    assert np.var(shares) == pytest.approx(1 / 12, abs=0.01)
    assert np.std([mixup_share(20.0, 0, 0, step) for step in range(400)]) < 0.12


@pytest.mark.parametrize("logit", ["raw", "centred"])
def test_explaining_a_weighted_sum_is_the_weighted_sum_of_explanations(
    logit: str, small_bcos: BCosClassifier
) -> None:
    """Why frozen maps may be mixed linearly: W(x) is linear in what is explained."""
    explainer = explainers.build("bcos", small_bcos.double(), logit=logit).eval()
    images = torch.rand(3, 3, 24, 24, dtype=torch.float64)
    of_1, of_2 = (explainer(images, torch.full((3,), k)).maps for k in (1, 2))
    targets = Targets(torch.zeros(3, 5), torch.tensor([1, 2, 2]), torch.stack([of_1[0], of_2[1], of_2[2]]))
    weights = mixed_targets(targets, 0.7).classes
    assert torch.allclose(weights.sum(1), torch.ones(3))
    found = explainer(images, weights.double()).maps
    expected = 0.7 * of_1[0] + 0.3 * of_2[0]
    assert torch.allclose(found[0], expected, atol=1e-12)
    assert torch.allclose(found[2], of_2[2], atol=1e-12)


def test_a_rule_of_the_logits_decides_what_is_explained(small_bcos: BCosClassifier) -> None:
    def lowest(logits: Tensor) -> Tensor:
        assert not logits.requires_grad
        return logits.argmin(1)

    explainer = explainers.build("bcos", small_bcos).eval()
    images = torch.rand(4, 3, 24, 24)
    for differentiable in (False, True):
        found = explainer(images, lowest, differentiable=differentiable)
        assert torch.equal(found.classes, found.logits.argmin(1))
        assert torch.equal(found.maps, explainer(images, found.classes, differentiable=differentiable).maps)
