"""The `bcos` package's layers, with weights that are constant in the inner backward pass and nowhere else.

A B-cos layer is y = s(x) * (w x), a linear map whose strength s depends on the input (Böhle et al. 2022, Eq.
3; 2024 for norms and attention). The explanation W(x) = d logit / d x takes every s as a constant. To *train*
through W(x), one more derivative must see s(x) as the function that it is: d W / d parameter runs through s.
The package detaches s in its forward pass, which gives the right W(x), but a wrong gradient of it (and, where
the same forward pass gives the logits, a wrong gradient of those).

Here the forward pass is the ordinary one, and s goes through `hold`: an identity whose backward pass gives
nothing while `constant_in_backward` is active. What the inner backward pass computes is then W(x), and its
own graph still leads to s(x), for the final backward pass to follow.

The flags are plain globals, because CUDA runs backward passes in threads of its own; so one thread at a time
may explain. A compiled backward pass would bake a flag's value in, silently, so `hold` refuses to be
compiled: `torch.compile` then leaves it to eager mode, or raises with `fullgraph=True`. They are two, so that
a checkpointed forward pass, run again inside the inner backward pass, is the ordinary one.

For `torch.compile` there is `logits_and_pull`, the same without a flag: what layers held in one forward pass is
given back to them in a second, whose transpose is W(x).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from bcos.models.vit import Attention
from bcos.modules import (
    BcosConv2d,
    BcosLinear,
    DetachableGNLayerNorm2d,
    DetachableGroupNorm2d,
    DetachableLayerNorm,
)
from bcos.modules.norms import BatchNormUncentered2d
from torch import Tensor, nn

from artifacts.errors import ModelError

N = TypeVar("N", bound=nn.Module)

_constant_in_backward = False
_constant_in_forward = False
_recorded: list[Tensor] | None = None
_replayed: list[Tensor] | None = None


@contextmanager
def constant_in_backward() -> Iterator[None]:
    """Backward passes inside take every held tensor as a constant; whatever happens, no longer outside."""
    global _constant_in_backward
    _refuse_traced_autograd()
    before, _constant_in_backward = _constant_in_backward, True
    try:
        yield
    finally:
        _constant_in_backward = before


@contextmanager
def constant_in_forward() -> Iterator[None]:
    """Forward passes inside detach every held tensor: the same W(x), cheaper, if nothing is trained."""
    global _constant_in_forward
    before, _constant_in_forward = _constant_in_forward, True
    try:
        yield
    finally:
        _constant_in_forward = before


def logits_and_pull(net: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """(net(x), the map from d / d logits to d / d x with every held tensor constant), without a flag.

    The forward pass records the held tensors. The network that is given them is linear in x, and `torch.func.vjp`
    transposes it. What the map returns depends on the parameters through the recorded tensors too, and autograd
    follows both ways. Made for `torch.compile`, which drops the second forward pass; eagerly it is right, but slower
    than `constant_in_backward`. Norms track their statistics once.
    """
    global _replayed
    logits, held = _recording(net, x)
    _replayed = held
    try:
        _, pull = torch.func.vjp(net, x)  # type: ignore[misc]  # two: no aux
    finally:
        _replayed = None
    return logits, lambda cotangent: pull(cotangent)[0]


def compilable(net: nn.Module, x: Tensor) -> Tensor:
    """net(x) for `torch.compile`, if nobody asks for W(x): held tensors are ordinary ones."""
    return _recording(net, x)[0]


def _recording(net: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """net(x), and what its layers held, in their order."""
    global _recorded
    held: list[Tensor] = []
    _recorded = held
    try:
        return net(x), held
    finally:
        _recorded = None


def _refuse_traced_autograd() -> None:
    """With it `torch.compile` may trace an inner backward pass and the flag's value: silently wrong gradients."""
    dynamo = sys.modules.get("torch._dynamo.config")
    if dynamo is not None and getattr(dynamo, "trace_autograd_ops", False):
        raise ModelError(
            "B-cos explanations by a flag can be silently wrong under torch._dynamo.config.trace_autograd_ops = True; "
            "set it to False, or compile the explainer itself, which then uses no flag (train.compile: true)"
        )


class _Hold(torch.autograd.Function):
    """Identity; no gradient in a `constant_in_backward` pass, the gradient itself in any other."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
        return None if _constant_in_backward else gradient


def hold(tensor: Tensor, detach: bool = False) -> Tensor:
    """The same tensor, as a part of the weights; `detach`: the package's own explanation mode is on."""
    if _recorded is not None:
        _recorded.append(tensor)
        return tensor
    if _replayed is not None:
        return _replayed.pop(0)
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "B-cos explanations cannot be compiled: their inner backward pass differs; run eager"
        )
    return tensor.detach() if detach or _constant_in_forward else _Hold.apply(tensor)


def hold_layers(net: N) -> N:
    """Turn the package's layers inside `net` into those of this module, in place: same parameters, buffers,
    state dict and logits.

    Raises ModelError if `net` has no B-cos layer, or one with weights that depend on the input in a way
    that is not known here.
    """
    layers = [module for module in net.modules() if hasattr(module, "set_explanation_mode")]
    held = tuple(_HELD.values())
    foreign = {
        type(layer).__name__ for layer in layers if not (type(layer) in _HELD or isinstance(layer, held))
    }
    if foreign or not layers:
        raise ModelError(
            f"{type(net).__name__} "
            + (
                f"has layers without exact B-cos maps: {', '.join(sorted(foreign))}"
                if layers
                else "has no B-cos layers"
            )
            + "; B-cos explanations need a model named bcos/NAME, or one of the bcos package with its layers "
            + ", ".join(layer.__name__ for layer in _HELD)
        )
    for layer in layers:
        layer.__class__ = _HELD.get(type(layer), type(layer))
        # the package's NoBias leaves a closure, which no pickle can hold
        layer.__dict__.pop("_get_name", None)
    return net


class HeldConv2d(BcosConv2d):
    """|cos(x, w)|^(B-1) * (w x) over patches, |w| = 1: x [N,D,H,W] -> [N,O,h,w]; |cos|^(B-1) is held."""

    def forward_impl(self, in_tensor: Tensor) -> Tensor:
        out = self.linear(in_tensor)
        if self.max_out > 1:
            out = out.unflatten(1, (self.out_channels, self.max_out)).max(2).values
        return out if self.b == 1 else _scaled(out, self.calc_patch_norms(in_tensor), self)


class HeldLinear(BcosLinear):
    """|cos(x, w)|^(B-1) * (w x), |w| = 1: x [...,D] -> [...,O]; |cos|^(B-1) is held."""

    def forward(self, in_tensor: Tensor) -> Tensor:
        out = self.linear(in_tensor)
        if self.max_out > 1:
            out = out.unflatten(-1, (self.out_features, self.max_out)).max(-1).values
        if self.b == 1:
            return out
        return _scaled(out, torch.linalg.vector_norm(in_tensor, dim=-1, keepdim=True) + 1e-12, self)


def _scaled(out: Tensor, norm: Tensor, layer: HeldConv2d | HeldLinear) -> Tensor:
    scale = out.abs() / norm if layer.b == 2 else ((out / norm).abs() + 1e-6).pow(layer.b - 1)
    return hold(scale, layer.detach) * out


class HeldBatchNorm2d(BatchNormUncentered2d):
    """x / sqrt(var + eps) * weight, without subtracting the mean: [N,D,H,W]; the batch's variance is held."""

    def forward(self, input: Tensor) -> Tensor:
        variance = self.running_var
        if self.training or variance is None:
            variance = self._batch_variance(input)
            if self.training and self.track_running_stats and _replayed is None:
                self._track(variance.detach())
        return _affine(input / _spread(hold((variance + self.eps).sqrt(), self.detach)), self)

    def _batch_variance(self, input: Tensor) -> Tensor:
        """Of the batch around its mean, [D]; `sync_norm` puts the batch of all processes here."""
        return input.var((0, 2, 3), correction=0)

    def _track(self, variance: Tensor) -> None:
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class HeldGroupNorm2d(DetachableGroupNorm2d):
    """(x - mean) / std over groups of channels and space: [N,D,H,W]; std is held, mean is linear in x."""

    def forward(self, input: Tensor) -> Tensor:
        groups = input.unflatten(1, (self.num_groups, -1))
        y = _standardised(groups, (2, 3, 4), self.eps, self.detach).flatten(1, 2)
        return _affine(y, self)


class HeldGroupLayerNorm2d(HeldGroupNorm2d, DetachableGNLayerNorm2d):
    """The same, with one group."""


class HeldLayerNorm(DetachableLayerNorm):
    """(x - mean) / std over the last axes: [...,D]; std is held, mean is linear in x."""

    def forward(self, input: Tensor) -> Tensor:
        axes = tuple(range(-len(self.normalized_shape), 0))
        y = _standardised(input, axes, self.eps, self.detach)
        y = y if self.weight is None else self.weight * y
        return y if self.bias is None else y + self.bias


class HeldAttention(Attention):
    """softmax(q k / sqrt(d)) v by heads, with B-cos projection: x [N,n,D] -> [N,n,D]; the softmax is held.

    Written out, because fused attention has no second derivative.
    """

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        )
        weights = self.attend(query @ key.transpose(-1, -2) * self.scale)
        return self.to_out((hold(weights, self.detach) @ value).transpose(1, 2).flatten(2))


_HELD: dict[type[nn.Module], type[nn.Module]] = {
    BcosConv2d: HeldConv2d,
    BcosLinear: HeldLinear,
    BatchNormUncentered2d: HeldBatchNorm2d,
    DetachableGroupNorm2d: HeldGroupNorm2d,
    DetachableGNLayerNorm2d: HeldGroupLayerNorm2d,
    DetachableLayerNorm: HeldLayerNorm,
    Attention: HeldAttention,
}


def _standardised(x: Tensor, axes: tuple[int, ...], eps: float, detach: bool) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / hold((variance + eps).sqrt(), detach)


def _affine(x: Tensor, norm: HeldBatchNorm2d | HeldGroupNorm2d) -> Tensor:
    x = x if norm.weight is None else _spread(norm.weight) * x
    return x if norm.bias is None else x + _spread(norm.bias)


def _spread(values: Tensor) -> Tensor:
    return values[:, None, None]
