"""Optimizers and learning-rate schedules.

A schedule is a pure function of the position in training, so resuming needs no scheduler state.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from slidr.config import OptimConfig

# PyTorch's OneCycleLR with its defaults: warm up over 30 % of the steps from lr/25, end at lr/25e4.
_ONE_CYCLE_WARMUP = 0.3
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = 1 / 25e4


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """The configured optimizer over parameter groups; a group may carry its own "lr".

    Each group remembers its peak rate as "peak_lr", which `set_learning_rate` scales.
    """
    for group in groups:
        group["peak_lr"] = group.setdefault("lr", config.lr)
    if config.name == "sgd":
        return torch.optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            dampening=config.dampening,
            weight_decay=config.weight_decay,
        )
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)


def learning_rate_factor(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """What the peak learning rate is multiplied by at optimizer step `step` (from 0).

    "cosine": 0.5 (1 + cos(pi e / E)), constant within an epoch e of E, as SLidR trains. "step": a tenth from 90 %
    of the epochs on. "one_cycle": cosine warm-up over 30 % of the steps, then cosine decay, per step.
    """
    epoch = step // steps_per_epoch
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
    if config.schedule == "step":
        return 1.0 if epoch < int(0.9 * config.epochs) else 0.1
    warmup = _ONE_CYCLE_WARMUP * total_steps - 1
    if step <= warmup:
        return _cosine_between(_ONE_CYCLE_START, 1.0, step / warmup)
    return _cosine_between(1.0, _ONE_CYCLE_END, (step - warmup) / max(total_steps - 1 - warmup, 1e-9))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets every group to `factor` times its peak rate; returns the first group's rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def total_steps(config: OptimConfig, steps_per_epoch: int) -> int:
    """Optimizer steps in the whole run."""
    steps = config.epochs * steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _cosine_between(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
