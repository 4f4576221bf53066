"""How many operations and bytes each part of a step cannot do without: counted from shapes, nothing is computed.

A floor is the larger of operations over the measured matrix rate and bytes over the measured copy rate, where every
tensor between two convolutions is written once and read once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.bench import Bench, Mode
from slidr.models.students import build_student, student_rows
from slidr.models.teachers import build_teacher
from slidr.sparse import modules
from slidr.types import PairBatch

LABEL, INDEX, WHOLE = 8, 8, 4  # bytes of a superpixel's label, of a row number, of a float32


@dataclass(frozen=True)
class Work:
    """Operations, and values read and written (of the precision's size)."""

    flop: float = 0.0
    values: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.values + other.values)

    def floor(self, bench: Bench, mode: Mode, extra_bytes: float = 0.0) -> float:
        """ms."""
        size = 2 if mode in ("bfloat16", "float16") else 4
        return bench.ceilings.floor(self.flop, size * self.values + extra_bytes, mode)


def teacher_work(bench: Bench, images: int) -> Work:
    """The forward pass of the teacher and its head; norms, sums and ReLUs count as part of convolutions."""
    total = Work()

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        weight: Any = layer.weight
        total += Work(2.0 * out.numel() * weight[0].numel(), float(inputs[0].numel() + out.numel() + weight.numel()))

    with torch.device("meta"):
        teacher = build_teacher(bench.size.teacher)
        for layer in teacher.modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(count)
        with torch.no_grad():
            teacher.coarse(torch.empty(images, 3, *bench.size.image))
    return total


def student_work(bench: Bench, batch: PairBatch) -> tuple[Work, Work]:
    """The forward and the backward pass of the student."""
    forward = backward = Work()

    def count(x: Tensor, weight: Tensor, pairs: int, rows: int) -> Tensor:
        nonlocal forward, backward
        weight = weight if weight.ndim == 3 else weight[None]
        flop, c_in, c_out = 2.0 * pairs * weight.shape[1] * weight.shape[2], x.numel(), rows * weight.shape[2]
        forward += Work(flop, c_in + c_out + weight.numel())
        backward += Work(2 * flop, 2.0 * c_in + c_out + 2 * weight.numel())
        return x.new_zeros(rows, weight.shape[2])

    with _counting(count), torch.no_grad():
        student = build_student(bench.config().student).to(batch.features.device).eval()
        student_rows(student, batch)
    return forward, backward


@contextmanager
def _counting(count: Callable[[Tensor, Tensor, int, int], Tensor]) -> Iterator[None]:
    """Replaces a MinkUNet's convolutions by `count(x, weight, pairs, output rows)`."""
    names = ("sparse_conv", "norm_relu_conv", "pointwise_conv")
    real = {name: getattr(modules, name) for name in names}
    replaced = {
        "sparse_conv": lambda x, weight, made: count(x, weight, made.num_pairs, made.num_outputs),
        "norm_relu_conv": lambda x, bn, weight, made: count(x, weight, made.num_pairs, made.num_outputs),
        "pointwise_conv": lambda x, weight, made: count(x, weight, len(x), len(x)),
    }
    try:
        for name in names:
            setattr(modules, name, replaced[name])
        yield
    finally:
        for name, function in real.items():
            setattr(modules, name, function)


def loss_bytes(bench: Bench, batch: PairBatch, channels: int = 64) -> float:
    """Labels read twice; coarse maps and paired rows read forward, read and their gradients written backward."""
    cells = len(batch.images) * bench.size.pixels / 16
    rows = len(batch.features)
    return float(2 * LABEL * batch.superpixels.numel() + 3 * WHOLE * channels * (cells + rows) + 2 * INDEX * rows)


def batch_bytes(batch: PairBatch) -> float:
    """What travels to the device."""
    tensors = (value for value in vars(batch).values() if isinstance(value, Tensor))
    return float(sum(value.numel() * value.element_size() for value in tensors))


def optimizer_bytes(parameters: int) -> float:
    """SGD with momentum reads weight, gradient and momentum, and writes weight and momentum."""
    return 5.0 * WHOLE * parameters


def step_floor(bench: Bench, mode: Mode) -> float:
    """The sum of the parts' floors, ms."""
    batch = bench.batch()
    forward, backward = student_work(bench, batch)
    parameters = sum(p.numel() for p in build_student(bench.config().student).parameters())
    parts = [
        forward.floor(bench, mode),
        backward.floor(bench, mode),
        teacher_work(bench, len(batch.images)).floor(bench, mode),
        bench.ceilings.floor(0, loss_bytes(bench, batch), mode),
        bench.ceilings.floor(0, optimizer_bytes(parameters), mode),
    ]
    if bench.gpu:
        parts.append(batch_bytes(batch) / bench.ceilings.pinned / 1e6)
    return sum(parts)
