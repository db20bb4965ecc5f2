"""Batch normalisation over the global batch, on any backend and to any order of derivative.

`torch.nn.SyncBatchNorm` refuses the CPU and has no second derivative, which explanation losses need. Here the
statistics are summed by an all-reduce whose derivative is itself an all-reduce, so several processes compute
exactly what one process would on the joined batch.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from artifacts.errors import ModelError
from pipeline.models.bcos_layers import HeldBatchNorm2d

M = TypeVar("M", bound=nn.Module)


class _SumOverProcesses(torch.autograd.Function):
    """Sum of a tensor over all processes; gradients of any order are summed over them likewise.

    A backward pass that brings no gradient here (`bcos_layers.hold`) has no traffic. Whether it brings one
    must not depend on the process.
    """

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """Nothing of the forward pass is needed."""
        ctx.set_materialize_grads(False)  # else no gradient arrives as zeros, which would be sent around

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else _SumOverProcesses.apply(gradient)


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d (same state dict) whose training statistics span all processes; alone it is BatchNorm2d.

    Statistics of half-precision inputs are taken in fp32. Processes may hold batches of different sizes.
    Children (the `drop` and `act` of timm's BatchNormAct2d) follow the normalisation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x float [B,D,H,W] -> the same shape and dtype."""
        y = self._normalised_globally(x) if self.training and _several_processes() else super().forward(x)
        for after in self.children():
            y = after(y)
        return y

    def _normalised_globally(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, variance, count = _global_moments(wide)
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach(), count.detach())
        y = (wide - _spread(mean)) * _spread(torch.rsqrt(variance + self.eps))
        if self.affine:
            y = y * _spread(self.weight) + _spread(self.bias)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        unbiased = variance * (count / (count - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)


class SyncedHeldBatchNorm2d(HeldBatchNorm2d):
    """HeldBatchNorm2d of B-cos networks (same state dict) whose training variance spans all processes.

    It is held as any B-cos weight: an inner backward pass takes it as a constant, and needs no other process.
    """

    def _batch_variance(self, input: Tensor) -> Tensor:
        if not (self.training and _several_processes()):
            return super()._batch_variance(input)
        _, variance, _ = _global_moments(input.to(torch.promote_types(input.dtype, torch.float32)))
        return variance.to(input.dtype)


def convert(module: M) -> M:
    """Synchronise every BatchNorm layer inside `module` (SyncedBatchNorm2d, SyncedHeldBatchNorm2d), in place;
    parameters stay the same objects.

    Do it before the optimiser and the distributed wrapper are made, and after a BCosClassifier is: its layers
    are held by then. Raises ModelError for a normalisation over the batch that is none of BatchNorm2d, timm's
    BatchNormAct2d and `bcos_layers.HeldBatchNorm2d`.
    """
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SyncedBatchNorm2d | SyncedHeldBatchNorm2d):
            setattr(module, name, _synced(child))
        else:
            convert(child)
    return module


def _synced(layer: _BatchNorm) -> SyncedBatchNorm2d | SyncedHeldBatchNorm2d:
    if type(layer) is HeldBatchNorm2d:
        layer.__class__ = SyncedHeldBatchNorm2d  # as `hold_layers` does: it keeps the package's own state
        return layer
    if type(layer).__name__ not in ("BatchNorm2d", "BatchNormAct2d"):
        raise ModelError(
            f"{type(layer).__name__} cannot be synchronised over processes, only BatchNorm2d can; "
            "run in one process"
        )
    synced = SyncedBatchNorm2d(
        layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats
    )
    synced._parameters, synced._buffers = layer._parameters, layer._buffers
    for name, child in layer.named_children():  # BatchNormAct2d: drop, act
        setattr(synced, name, child)
    return synced.train(layer.training)


def _several_processes() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [D], biased variance [D] and count [] of x [B,D,H,W] over all processes, in two passes."""
    count = x.new_tensor([x.numel() // x.shape[1]])
    totals = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), count]))
    mean, count = totals[:-1] / totals[-1].detach(), totals[-1]
    squares = _SumOverProcesses.apply((x - _spread(mean)).square().sum((0, 2, 3)))
    return mean, squares / count.detach(), count


def _spread(values: Tensor) -> Tensor:
    return values[:, None, None]
