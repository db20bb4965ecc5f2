"""Devices, precision and processes, through Lightning Fabric: one process, `torchrun` or SLURM (`srun`)."""

from __future__ import annotations

import os
import warnings
from typing import Literal

from lightning_fabric import Fabric
from torch import Tensor

_PRECISION: dict[str, Literal["32-true", "bf16-mixed"]] = {"fp32": "32-true", "bf16": "bf16-mixed"}


def start(precision: str = "fp32") -> Fabric:
    """A launched Fabric. Under torchrun or srun it joins the other processes, else it is one process.

    The process takes one accelerator where there is one, else the CPU (gloo).
    """
    local, world = _processes()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*srun.*")  # one process inside an allocation is meant
        fabric = Fabric(
            accelerator="auto",
            devices=local,
            num_nodes=world // local,
            strategy="ddp" if world > 1 else "auto",
            precision=_PRECISION[precision],
        )
        fabric.launch()
    return fabric


def reduced(fabric: Fabric, values: Tensor, how: Literal["mean", "sum"]) -> Tensor:
    """A tensor's mean or sum over the processes."""
    result = fabric.all_reduce(values.clone(), reduce_op=how)  # torch reduces in place
    assert isinstance(result, Tensor)
    return result


def _processes() -> tuple[int, int]:
    """(processes on this node, processes in all) as torchrun or SLURM announce them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and "SLURM_NTASKS_PER_NODE" in os.environ:
        local = int(os.environ["SLURM_NTASKS_PER_NODE"])
        return local, local * int(os.environ.get("SLURM_NNODES", "1"))
    return 1, 1
