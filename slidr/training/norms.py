"""Whether batch norm's running statistics still describe the data, and statistics taken again where they do not.

Running statistics follow the batches with a rate of `student.bn_momentum` a step: after n steps a share of
(1 - momentum)^n of them is what the weights came with. After few steps from another data set's weights they describe
neither data set, and a network that trained well scores badly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slidr.config import OptimConfig
from slidr.shapes import Float
from slidr.training.loop import Loader

WARN_ABOVE = 1 / 3  # see docs/downstream.md for what was measured
LOOKED_AT = 8  # training batches that the running statistics are compared with


@dataclass(frozen=True)
class NormLag:
    """How far running statistics are off those of batches, in the layer where they are farthest off.

    Both numbers are means over a layer's channels: `shift` of |running mean - batch mean| in standard deviations of
    the batches, `scale` of |ln(running standard deviation / that of the batches)|.
    """

    layer: str
    shift: float
    scale: float
    batches: int

    @property
    def worst(self) -> float:
        """The larger of both numbers."""
        return max(self.shift, self.scale)


class Statistics:
    """Mean and variance of a norm's input, by channel."""

    def __init__(self, mean: Float[Tensor, " C"], variance: Float[Tensor, " C"]) -> None:
        self.mean, self.variance = mean.detach().clone(), variance.detach().clone()


def some_batches(loader: Loader, count: int, optim: OptimConfig) -> Iterator[Any]:
    """This worker's first `count` training micro-batches of the run: the same ones whenever it is asked."""
    return itertools.islice(loader.train(0, -(-count // optim.accumulate)), count)


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Any], device: torch.device) -> int:
    """Replaces every norm's running statistics by their plain average over training batches; returns how many.

    Each batch counts alike (the cumulative average of PyTorch's `momentum=None`), and what was there counts nothing, so
    the same weights and batches always give the same statistics. Between workers the norms take their statistics over
    all of them, as in training: every worker must call it with as many batches. Weights stay as they are.
    """
    norms = [norm for _, norm in _norms(model)]
    momenta, training = [norm.momentum for norm in norms], model.training
    count = 0
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        model.train()
        for batch in batches:
            model(batch.to(device))
            count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.train(training)
    return count


@torch.no_grad()
def lag(model: nn.Module, batches: Iterable[Any], device: torch.device) -> NormLag | None:
    """How far the running statistics are off those of training batches; the model is left as it was.

    None for a model without norms that have running statistics. Every worker must call it with as many batches.
    """
    norms = list(_norms(model))
    if not norms:
        return None
    kept = {name: {key: value.clone() for key, value in norm._buffers.items()} for name, norm in norms}  # type: ignore[union-attr]
    try:
        count = reestimate(model, batches, device)
        fresh = {name: _statistics(norm) for name, norm in norms}
    finally:
        for name, norm in norms:
            for key, value in kept[name].items():
                norm._buffers[key].copy_(value)  # type: ignore[union-attr]
    return max(
        (_lag_of(name, _statistics(norm), fresh[name], norm.eps, count) for name, norm in norms),
        key=lambda found: found.worst,
    )


def advice(found: NormLag, momentum: float, student: str) -> str:
    """The warning for a lag above `WARN_ABOVE`."""
    return (
        f"batch norm's running statistics lag behind the weights: in {found.layer} the means are off by "
        f"{found.shift:.2f} standard deviations and the deviations by a factor of {math.exp(found.scale):.2f} "
        f"(mean over channels, {found.batches} training batches). Scores with them can be far too low; train for more "
        f"steps, raise student.bn_momentum (now {momentum:g}), or score with statistics taken again: slidr evaluate "
        f"CONFIG --checkpoint {student} --evaluation.reestimate_norms 100"
    )


def _norms(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield name, module


def _statistics(norm: _BatchNorm) -> Statistics:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return Statistics(norm.running_mean, norm.running_var)


def _lag_of(name: str, running: Statistics, fresh: Statistics, eps: float, batches: int) -> NormLag:
    deviation, of_running = (fresh.variance + eps).sqrt(), (running.variance + eps).sqrt()
    shift = ((running.mean - fresh.mean).abs() / deviation).mean()
    scale = (of_running / deviation).log().abs().mean()
    return NormLag(name, float(shift), float(scale), batches)
