"""What happens to the weights in a step: the optimizer, its rate, and clipped gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.config import Schedule


def build_optimizer(module: nn.Module, settings: Schedule) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    match settings.optimizer:
        case "adamw":
            return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        case "adam":
            return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
        case "sgd":
            return torch.optim.SGD(
                parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
            )


def learning_rate(settings: Schedule, step: int, total: int) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a half cosine to 0; or, by `schedule: step`, the
    rate times gamma from each milestone on, a share of all steps."""
    warm = settings.warmup * total
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    if settings.schedule == "step":
        passed = sum(step >= round(share * total) for share in settings.milestones)
        return settings.lr * settings.gamma**passed
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(total - warm, 1)))


def clip_gradients(module: nn.Module, settings: Schedule) -> Tensor:
    """Clip the gradients as the settings say; returns their norm before that."""
    parameters = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if settings.agc:
        # timm takes a second to import
        from timm.utils.agc import adaptive_clip_grad

        adaptive_clip_grad(parameters, settings.agc, eps=1e-3)
    if settings.clip_norm:
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
    return norm
