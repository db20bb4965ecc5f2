"""Devices, precision and processes, through Lightning Fabric: one process, `torchrun` or SLURM (`srun`)."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor, nn

from pipeline.sharing import Launch

_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def start(precision: str = "fp32") -> Fabric:
    """A launched Fabric. Under torchrun or srun it joins the other processes, else it is one process.

    The process takes one accelerator if there is one, else the CPU (gloo).
    """
    launch = Launch.here()
    with warnings.catch_warnings():
        # one process inside an allocation is meant
        warnings.filterwarnings("ignore", message=".*srun.*")
        fabric = Fabric(
            accelerator="auto",
            devices=launch.local,
            num_nodes=launch.world // launch.local,
            strategy="ddp" if launch.world > 1 else "auto",
            precision=_PRECISION[precision],
            # Fabric's own for SLURM refuses --ntasks
            plugins=LightningEnvironment() if launch.world == 1 else None,
        )
        fabric.launch()
    return fabric


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def reduced(fabric: Fabric, values: Tensor, how: Literal["mean", "sum"]) -> Tensor:
    """A tensor's mean or sum over the processes."""
    # torch reduces in place
    result = fabric.all_reduce(values.clone(), reduce_op=how)
    assert isinstance(result, Tensor)
    return result


def share_of_valid(fabric: Fabric, valid: Tensor) -> Tensor | float:
    """Makes the mean of the processes' means over their valid samples that over all valid ones of the global batch.

    `valid` is the share of this process's samples that are valid; multiply its mean by the result.
    """
    if fabric.world_size == 1:
        return 1.0
    mean = reduced(fabric, valid.detach().float(), "mean")
    return torch.where(mean > 0, valid / mean.clamp(min=1e-9), torch.zeros_like(mean))
