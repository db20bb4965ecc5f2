"""A teacher that starts from published weights: all but a head for other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from artifacts.errors import ModelError
from pipeline.config import ModelConfig
from pipeline.models import build, save_weights, start_from


@pytest.mark.parametrize("name", ["toy/resnet", "bcos/small"])
def test_everything_but_the_head_is_taken(tmp_path: Path, name: str) -> None:
    config = ModelConfig(model=name, width=4)
    donor = build(config, 7)
    save_weights(donor, tmp_path / "donor.safetensors")
    model = build(config, 3)
    before = {key: tensor.clone() for key, tensor in model.net.state_dict().items()}
    start_from(model, config, str(tmp_path / "donor.safetensors"))
    theirs = donor.net.state_dict()
    kept = [key for key, tensor in model.net.state_dict().items() if tensor.shape != theirs[key].shape]
    assert 1 <= len(kept) <= 2
    for key, tensor in model.net.state_dict().items():
        assert torch.equal(tensor, before[key] if key in kept else theirs[key])
    assert model(torch.rand(1, 3, 24, 24)).shape == (1, 3)


def test_another_width_is_another_network(tmp_path: Path) -> None:
    save_weights(build(ModelConfig(model="toy/resnet", width=8), 7), tmp_path / "donor.safetensors")
    config = ModelConfig(model="toy/resnet", width=4)
    with pytest.raises(ModelError, match=r"donor\.safetensors are of another toy/resnet: \d+ shapes differ"):
        start_from(build(config, 3), config, str(tmp_path / "donor.safetensors"))


def test_another_network_is_a_short_diff(tmp_path: Path) -> None:
    save_weights(build(ModelConfig(model="bcos/small", width=4), 7), tmp_path / "donor.safetensors")
    config = ModelConfig(model="toy/resnet", width=4)
    with pytest.raises(ModelError, match="unknown to the model"):
        start_from(build(config, 3), config, str(tmp_path / "donor.safetensors"))
