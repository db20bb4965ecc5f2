"""Weights in and out of files, never pickled, and their fingerprint."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from artifacts.durable import write_atomic
from artifacts.errors import ModelError
from pipeline.models.bcos import BCosClassifier
from pipeline.models.classifier import Classifier


def weights_sha256(model: nn.Module) -> str:
    """Hex SHA-256 over name, dtype, shape and bytes of all that the bare network saves, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_bare(model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the bare network's state dict as safetensors; the file appears whole or not at all."""
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in _bare(model).state_dict().items()
    }
    write_atomic(path, safetensors.torch.save(tensors))


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a .safetensors file, or a state dict saved by torch (weights only), into the bare network.

    Raises ModelError when the file is missing or unreadable, or its weights are not exactly the network's.
    """
    fill(_bare(model), read_weights(path), origin=str(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU; also one under `state_dict` or `model` in a checkpoint."""
    if not path.is_file():
        raise ModelError(f"no weights at {path}; set weights to a .safetensors, .pt or .pth file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(
            f"{path} is damaged or holds more than tensors ({_first_line(error)}); save the network's "
            "state_dict() as .safetensors or with torch.save"
        ) from error
    return _state_dict(stored, path)


def fill(net: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load `weights` into `net`. Raises ModelError with the differences in names and shapes, if any."""
    differences = _differences(net.state_dict(), weights)
    if differences:
        raise ModelError(
            f"the weights in {origin} do not fit {type(net).__name__}: {'; '.join(differences)}; set "
            "model (and width) and the number of classes to what the weights were trained with"
        )
    net.load_state_dict(dict(weights))


def _bare(model: nn.Module) -> nn.Module:
    return model.net if isinstance(model, Classifier | BCosClassifier) else model


def _state_dict(stored: object, path: Path) -> dict[str, Tensor]:
    if isinstance(stored, dict):
        inner = stored.get("state_dict", stored.get("model", stored))
        if isinstance(inner, dict) and all(isinstance(value, Tensor) for value in inner.values()):
            return inner
    raise ModelError(f"{path} holds no state dict; save the network's state_dict() with torch.save")


def _differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    shapes = (
        f"{name} is {list(given[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    )
    groups = {
        "missing": _first_five(name for name in expected if name not in given),
        "unexpected": _first_five(name for name in given if name not in expected),
        "other shape": _first_five(shapes),
    }
    return [f"{kind}: {names}" for kind, names in groups.items() if names]


def _first_five(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
