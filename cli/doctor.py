"""`e2kd doctor`: what a bug report should hold, and whether the kernels that training needs run here."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable

from cli.console import say

PACKAGES = (
    "e2kd",
    "torch",
    "torchvision",
    "kornia",
    "zarr",
    "numcodecs",
    "webdataset",
    "lightning-fabric",
    "timm",
    "bcos",
)


def examine() -> int:
    """Print the findings; 0 when training can run here, 2 when not."""
    import torch

    say(f"python      {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        say(f"{package:<11} {_version(package)}")
    say(f"cpu         {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        say(f"cuda:{index}      {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    say(f"free disk   {shutil.disk_usage('.').free / 2**30:.1f} GiB here")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    failures = [
        _run(f"{name} on {device}", check, device) for device in devices for name, check in CHECKS.items()
    ]
    broken = [failure for failure in failures if failure]
    say("all kernels run" if not broken else f"{len(broken)} kernels fail: reinstall with make clean setup")
    return 2 if broken else 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _run(name: str, check: Callable[[str], None], device: str) -> str | None:
    try:
        check(device)
    except (RuntimeError, AssertionError) as error:
        say(f"FAILS       {name}: {error}")
        return name
    say(f"runs        {name}")
    return None


def _explain(device: str) -> None:
    """A GradCAM student step: forward, map, loss, double use of the head's gradient, backward."""
    import torch

    from pipeline import explain as explainers
    from pipeline.config import ModelConfig
    from pipeline.distill import losses
    from pipeline.models import build

    explainer = explainers.build("gradcam", build(ModelConfig(model="toy/resnet", width=4), 3)).to(device)
    explained = explainer(torch.rand(2, 3, 48, 48, device=device), differentiable=True)
    loss, _ = losses.explanation_loss(explained.maps, torch.rand_like(explained.maps))
    torch.autograd.backward(loss)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in explainer.parameters())


def _augment(device: str) -> None:
    """A paired warp of images and maps."""
    import torch

    from pipeline.augment.paired import PairedAugment
    from pipeline.config import AugmentConfig

    images = torch.zeros(2, 3, 48, 48, dtype=torch.uint8, device=device)
    warped, maps, _ = PairedAugment(AugmentConfig())(
        images, torch.rand(2, 1, 7, 7, device=device), torch.arange(2), 0
    )
    assert maps is not None
    assert bool(warped.isfinite().all() & maps.isfinite().all())


CHECKS: dict[str, Callable[[str], None]] = {
    "GradCAM double backward": _explain,
    "paired augmentation": _augment,
}
