"""Devices, precision and processes, through Lightning Fabric: one process, `torchrun` or SLURM (`srun`)."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from torch import Tensor

from artifacts.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One of `world` independent processes that share a stage-1 job without knowing each other."""

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ConfigError(f"--rank {self.rank} --world {self.world}: rank must be 0 to world - 1")

    @classmethod
    def of(cls, rank: int | None, world: int | None) -> Part:
        """From the flags, else from SLURM (an array's tasks, or srun without --ntasks-per-node), else all of it.

        Raises ConfigError where only one flag is given or the rank is out of range.
        """
        if (rank is None) != (world is None):
            raise ConfigError("--rank and --world belong together: give both or neither")
        if rank is not None and world is not None:
            return cls(rank, world)
        slurm = {name: os.environ.get(f"SLURM_{name}", "") for name in _SLURM}
        try:
            if slurm["ARRAY_TASK_COUNT"]:
                first, step = int(slurm["ARRAY_TASK_MIN"] or 0), int(slurm["ARRAY_TASK_STEP"] or 1)
                return cls((int(slurm["ARRAY_TASK_ID"]) - first) // step, int(slurm["ARRAY_TASK_COUNT"]))
            by_srun = slurm["STEP_ID"] and not slurm["NTASKS_PER_NODE"]  # sbatch's own script has no step
            if by_srun and slurm["PROCID"] and slurm["NTASKS"]:
                return cls(int(slurm["PROCID"]), int(slurm["NTASKS"]))
        except ValueError:
            raise ConfigError("SLURM's variables name no part: give --rank and --world") from None
        return cls()

    def owns(self, shard: int) -> bool:
        return shard % self.world == self.rank


_SLURM = (
    "ARRAY_TASK_STEP",
    "ARRAY_TASK_COUNT",
    "ARRAY_TASK_MIN",
    "ARRAY_TASK_ID",
    "STEP_ID",
    "PROCID",
    "NTASKS",
    "NTASKS_PER_NODE",
)
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
            plugins=LightningEnvironment() if world == 1 else None,  # Fabric's own for SLURM refuses --ntasks
        )
        fabric.launch()
    return fabric


def reduced(fabric: Fabric, values: Tensor, how: Literal["mean", "sum"]) -> Tensor:
    """A tensor's mean or sum over the processes."""
    result = fabric.all_reduce(values.clone(), reduce_op=how)  # torch reduces in place
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


def _processes() -> tuple[int, int]:
    """(processes on this node, processes in all) as torchrun or SLURM announce them."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and "SLURM_NTASKS_PER_NODE" in os.environ:
        local = int(os.environ["SLURM_NTASKS_PER_NODE"])
        return local, local * int(os.environ.get("SLURM_NNODES", "1"))
    return 1, 1
