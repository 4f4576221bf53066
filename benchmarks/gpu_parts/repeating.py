"""Which parts of a step give other bits when they get the same input twice."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpu_parts.bench import Bench, Mode
from slidr.losses import info_nce
from slidr.models.students import student_rows
from slidr.ops.pooling import segment_mean
from slidr.ops.upsampled import UpsampledMap
from slidr.training.distill import DistillTask
from slidr.training.optim import build_optimizer

TRIES = 4

Part = Callable[[], list[Tensor]]


def parts_that_differ(bench: Bench, mode: Mode) -> list[str]:
    """The parts of a step whose results differ between `TRIES` runs on the same input, in the order of a step."""
    with bench.arithmetic("tf32" if mode == "tf32" else "float32"):
        return [name for name, part in parts_of_a_step(bench, mode).items() if not repeats(part)]


def repeats(part: Part) -> bool:
    """Whether a part gives the same bits every time."""
    first = [value.clone() for value in part()]
    for _ in range(TRIES - 1):
        again = part()
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return False
    return True


def parts_of_a_step(bench: Bench, mode: Mode) -> dict[str, Part]:
    """Each part of a pretraining step as a call on inputs of its own, forward and backward apart."""
    batch = bench.batch().to(bench.device)
    task = DistillTask(bench.config(mode))
    model = task.model.to(bench.device).train()
    half = mode in ("bfloat16", "float16")
    auto = torch.autocast(bench.device.type, getattr(torch, mode) if half else torch.bfloat16, half)

    def student() -> Tensor:
        with auto:
            return student_rows(model.student, batch)

    def teacher() -> UpsampledMap:
        with auto:
            return model.teacher.coarse(batch.images)

    rows, maps = student(), teacher()
    weights = [p for p in model.student.parameters() if p.requires_grad]
    head = list(model.teacher.head.parameters())
    torch.manual_seed(0)
    of_rows, of_maps = torch.randn_like(rows), torch.randn_like(maps.features)
    leaf_rows = rows.detach().float().requires_grad_()
    leaf = UpsampledMap(maps.features.detach().float().requires_grad_(), maps.grid, maps.size)
    images, segments = len(batch.superpixels), int(batch.superpixels.max()) + 1
    image, row, column = batch.pixel_index.unbind(1)
    segment = batch.superpixels[image, row, column] + image * segments

    def of_points() -> Tensor:
        return segment_mean(leaf_rows.index_select(0, batch.point_index), segment, images * segments)[0]

    def of_pixels() -> Tensor:
        return leaf.segment_means(batch.superpixels, segments)[0].flatten(0, 1)

    def contrast() -> tuple[list[Tensor], Tensor]:
        pair = [means.detach().requires_grad_() for means in (points, pixels)]
        return pair, info_nce(pair[0], pair[1], 0.07)

    points, pixels = of_points().detach(), of_pixels().detach()
    of_means = torch.randn_like(points)

    def gradient(result: Tensor, inputs: list[Tensor], given: Tensor) -> list[Tensor]:
        return [g for g in torch.autograd.grad(result, inputs, given, allow_unused=True) if g is not None]

    def updated() -> list[Tensor]:
        copies = [torch.nn.Parameter(p.detach().clone()) for p in weights]
        optimizer = build_optimizer([{"params": copies}], task.config.optim)
        for number, copy in enumerate(copies):
            copy.grad = torch.full_like(copy, 0.01 * (number % 7))
        optimizer.step()
        return [copy.detach() for copy in copies]

    return {
        "student forward": lambda: [student().detach()],
        "student backward": lambda: gradient(student(), weights, of_rows),
        "teacher forward": lambda: [teacher().features.detach()],
        "teacher head backward": lambda: gradient(teacher().features, head, of_maps),
        "means over points": lambda: [of_points().detach()],
        "means over points, backward": lambda: gradient(of_points(), [leaf_rows], of_means),
        "means over pixels": lambda: [of_pixels().detach()],
        "means over pixels, backward": lambda: gradient(of_pixels(), [leaf.features], of_means),
        "InfoNCE": lambda: [contrast()[1].detach()],
        "InfoNCE backward": lambda: (lambda pair, loss: list(torch.autograd.grad(loss, pair)))(*contrast()),
        "optimizer": updated,
    }
