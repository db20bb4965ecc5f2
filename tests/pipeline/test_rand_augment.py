"""RandAugment of online students: torchvision's, a sample's own in any batch, and refused beside stored answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandAugment

from artifacts.errors import ConfigError
from pipeline.augment.counter import RAND_AUGMENT_COLUMN, bits, key_ids
from pipeline.augment.rand_augment import rand_augment
from pipeline.config import Experiment
from pipeline.distill.run import distill
from pipeline.workspace import Layout, Workspace

IDS = key_ids([f"key-{number}" for number in range(12)])
Tiny = Callable[..., Experiment]


@pytest.fixture
def images() -> Tensor:
    pixels = torch.randint(0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    return pixels.float() / 255


def test_it_is_torchvisions(images: Tensor) -> None:
    found = rand_augment(images, 10, seed=3, epoch=2, ids=IDS)
    transform = RandAugment(num_ops=2, magnitude=10, interpolation=InterpolationMode.BILINEAR)
    for row, state in enumerate(bits(3, 2, IDS, [RAND_AUGMENT_COLUMN])[:, 0]):
        torch.manual_seed(int(state))
        expected = transform((images[row] * 255).round().to(torch.uint8))
        assert torch.equal((found[row] * 255).round().to(torch.uint8), expected)


def test_a_sample_is_bit_identical_in_any_batch_and_the_generator_is_left_alone(images: Tensor) -> None:
    torch.manual_seed(5)
    whole = rand_augment(images, 10, 0, 1, IDS)
    after = torch.rand(3)
    assert torch.equal(rand_augment(images[4:7], 10, 0, 1, IDS[4:7]), whole[4:7])
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_gpus_keep_their_random_numbers(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(seed: int) -> None:
        raise AssertionError(seed)

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refused)
    monkeypatch.setattr(torch.cuda, "manual_seed", refused)
    rand_augment(images, 10, 0, 1, IDS)


def test_epochs_and_seeds_differ_and_values_stay_in_range(images: Tensor) -> None:
    first = rand_augment(images, 30, 0, 0, IDS)
    assert not torch.equal(first, rand_augment(images, 30, 0, 1, IDS))
    assert not torch.equal(first, rand_augment(images, 30, 1, 0, IDS))
    assert first.min() >= 0
    assert first.max() <= 1


def test_an_online_student_trains_with_it(prepared: Layout, fabric: Fabric, experiment_of: Tiny) -> None:
    student: dict[str, Any] = {"mode": "online", "rand_augment": 10, "explanation_weight": 5}
    experiment = experiment_of(students={"e2kd": student, "plain": {**student, "rand_augment": None}})
    results = [distill(Workspace(experiment, prepared, fabric), name, 0) for name in ("e2kd", "plain")]
    assert results[0]["splits"] != results[1]["splits"]


def test_stored_answers_do_not_follow_it(experiment_of: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"rand_augment moves and recolours .* set mode to online"):
        experiment_of(students={"kd": {"mode": "frozen", "rand_augment": 10}})
