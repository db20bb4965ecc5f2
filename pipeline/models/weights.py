"""Weights in and out of files, or from a URL, never pickled; and their fingerprint."""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from artifacts.access import FULL, reading_from, write_error
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
    try:
        with reading_from(path, ModelError):
            if not path.is_file():
                raise ModelError(
                    f"no weights at {path}; set weights to a .safetensors, .pt or .pth file", path=path
                )
            # safetensors says of every file that it may not open that there is none
            path.open("rb").close()
            if path.suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            stored = saved_by_torch(path)
    except (SafetensorError, NotSaved) as error:
        raise ModelError(
            f"{path} is damaged or holds more than tensors ({_first_line(error)}); save the network's "
            "state_dict() as .safetensors or with torch.save",
            path=path,
        ) from error
    return _state_dict(stored, str(path))


class NotSaved(Exception):
    """A file is none that torch.save wrote, or holds more than numbers."""


_GARBAGE = (
    *(
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        OverflowError,
        struct.error,
        AssertionError,
    ),
    *(LookupError, TypeError, AttributeError, MemoryError, zipfile.BadZipFile, NotImplementedError),
)
"""What torch's unpickler, which runs no code, raises for bytes that nobody saved."""
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80\x02"


def saved_by_torch(file: Path) -> Any:
    """What torch.save wrote, on the CPU, by torch's unpickler for weights. Raises NotSaved for any other file."""
    try:
        with file.open("rb") as opened:
            begins = opened.read(4)
        if begins == _ZIP:
            _check_stored(file)
        elif not begins.startswith(_PICKLE):
            raise NotSaved("no file of torch.save")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except _GARBAGE as error:
        raise NotSaved(_first_line(error)) from error


def _check_stored(file: Path) -> None:
    """torch.save compresses nothing: what does, or has entries over each other, is small on disk alone."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise NotSaved("compressed entries, which torch.save does not write")
    if sum(entry.file_size for entry in entries) > file.stat().st_size:
        raise NotSaved("entries that take more than the file")


def fetch(url: str) -> dict[str, Tensor]:
    """The state dict at `url` on the CPU, from torch's cache (TORCH_HOME) or downloaded into it.

    The hash in the file's name, if any, is checked on download. Raises ModelError when that fails, WriteError if the
    cache cannot be written.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    try:
        # torch says on stdout that it downloads
        with redirect_stdout(sys.stderr):
            stored = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", progress=False, check_hash=True, weights_only=True
            )
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        if isinstance(error, OSError) and _is_of_the_cache(error, cached):
            raise write_error(error, cached) from error
        raise ModelError(
            f"cannot get the weights {url} ({_first_line(error)}); try again, or download that file elsewhere and put "
            f"it at {cached}",
            path=url,
        ) from error
    return _state_dict(stored, url)


def _is_of_the_cache(error: OSError, cached: Path) -> bool:
    """Whether the system refuses to write the cache; an error of the network names no file of it."""
    if error.errno is None or error.filename is None:
        return error.errno in FULL
    named = Path(error.filename)
    return named in cached.parents or (named.parent == cached.parent and named != cached)


def fill(net: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load `weights` into `net`. Raises ModelError with the differences in names and shapes, if any."""
    own = net.state_dict()
    differences = _differences(own, weights)
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise ModelError(
            f"the weights in {origin} do not fit {type(net).__name__}; set model (and width) and the number of classes "
            f"to what the weights were trained with:\n{lines}",
            path=origin,
        )
    versioned = OrderedDict(weights)  # a file without its layers' versions (safetensors) has today's
    versioned._metadata = getattr(weights, "_metadata", None) or own._metadata  # type: ignore[attr-defined]
    net.load_state_dict(versioned)


def _bare(model: nn.Module) -> nn.Module:
    return model.net if isinstance(model, Classifier | BCosClassifier) else model


def _state_dict(stored: object, origin: str) -> dict[str, Tensor]:
    if isinstance(stored, dict):
        inner = stored.get("state_dict", stored.get("model", stored))
        if isinstance(inner, dict) and all(_is_weight(*item) for item in inner.items()):
            return inner
    raise ModelError(
        f"{origin} holds no state dict; save the network's state_dict() with torch.save", path=origin
    )


def _is_weight(name: object, value: object) -> bool:
    """A named array of numbers in memory: not sparse, not quantised, not without its bytes (`meta`)."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )


def _differences(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Three lines at most."""
    shapes = (
        f"{name}: file {list(given[name].shape)}, model {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    )
    groups = {
        "other shape": _first(3, shapes),
        "missing in the file": _first(5, (name for name in expected if name not in given)),
        "unknown to the model": _first(5, (name for name in given if name not in expected)),
    }
    return [f"{kind}: {names}" for kind, names in groups.items() if names]


def _first(most: int, names: Iterable[str]) -> str:
    found = list(names)
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return "; ".join([*found[:most], *more])


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
