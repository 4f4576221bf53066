"""Are the losses and the teacher right on the GPU? Values and gradients against the CPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from gpu_parts.bench import Bench, relative
from gpu_parts.rows import NO_GPU, Cell, Row, judged
from slidr.losses import ImageFeatures, point_pixel_info_nce, superpixel_info_nce
from slidr.models.teachers import build_teacher
from slidr.ops.upsampled import UpsampledMap
from slidr.types import PairBatch

LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-2}
Results = dict[str, Tensor]


def losses(bench: Bench) -> Iterator[Row]:
    """Both losses and their gradients. Inputs are rounded to bfloat16 for its rows, on both devices alike."""
    batch = bench.batch(1)
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(len(batch.features), 64), dim=1)
    height, width = (side // 4 for side in bench.size.image)
    coarse = torch.randn(len(batch.images), 64, height, width)
    for kind, loss in (("superpixel", _superpixel), ("point-pixel", _point_pixel)):
        for dtype, limit in LIMITS.items():

            def run(device: torch.device, exact: bool, loss: Loss = loss, dtype: torch.dtype = dtype) -> Results:
                return _differentiated(loss, rows.to(dtype), coarse.to(dtype), batch.to(device), device, exact)

            yield _compared(bench, "losses", f"{kind} loss, {_name(dtype)}", run, limit)


Loss = Callable[[Tensor, ImageFeatures, PairBatch], Tensor]


def _superpixel(rows: Tensor, maps: ImageFeatures, batch: PairBatch) -> Tensor:
    return superpixel_info_nce(rows, maps, batch.superpixels, batch.point_index, batch.pixel_index)


def _point_pixel(rows: Tensor, maps: ImageFeatures, batch: PairBatch) -> Tensor:
    generator = torch.Generator().manual_seed(3)  # on the CPU: the same pairs for both devices
    return point_pixel_info_nce(rows, maps, batch.point_index, batch.pixel_index, pairs=4096, generator=generator)


def _differentiated(
    loss: Loss, rows: Tensor, coarse: Tensor, batch: PairBatch, device: torch.device, exact: bool
) -> Results:
    """Value and gradients; `exact`: of the same values in float32, from full-size maps instead of coarse ones."""
    dtype = torch.float32 if exact else rows.dtype
    rows, coarse = (value.detach().to(device, dtype).requires_grad_() for value in (rows, coarse))
    size = (batch.images.shape[-2], batch.images.shape[-1])
    maps = UpsampledMap(coarse, size, size)
    value = loss(rows, maps.dense() if exact else maps, batch)
    value.backward()
    assert rows.grad is not None
    assert coarse.grad is not None
    return {"value": value, "student's gradient": rows.grad, "teacher's gradient": coarse.grad}


def teacher(bench: Bench) -> Iterator[Row]:
    """The teacher's coarse maps, and what the losses ask of them."""
    batch = bench.batch(1)
    images, labels = batch.images[:2], batch.superpixels[:2]
    pixels = batch.pixel_index[batch.pixel_index[:, 0] < 2]
    torch.manual_seed(0)
    network = build_teacher(bench.size.teacher)

    for dtype, limit in LIMITS.items():

        def run(device: torch.device, exact: bool, dtype: torch.dtype = dtype) -> Results:
            half = dtype == torch.bfloat16 and not exact
            whole = torch.float64 if dtype == torch.float32 and exact else torch.float32
            network.to(device, whole)
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, half):
                maps = network.coarse(images.to(device, whole))
            means, _ = maps.segment_means(labels.to(device), int(labels.max()) + 1)
            return {
                "coarse maps": maps.features,
                "superpixels' means": means,
                "pixels": maps.at(pixels.to(device)),
            }

        yield _compared(bench, "teacher", f"{bench.size.teacher}, {_name(dtype)}", run, limit)


def _compared(bench: Bench, section: str, name: str, run: Callable[[torch.device, bool], Results], limit: float) -> Row:
    """A row of the worst result: the CPU's off a more exact way to it, the GPU's off the CPU's."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    cpu = torch.device("cpu")
    reference = run(cpu, False)
    own, _ = _worst(reference, run(bench.device, True))
    gpu: Cell = NO_GPU
    where = ""
    if bench.gpu:
        gpu, where = _worst(run(bench.device, False), reference)
    allowed = max(limit, 2 * own)
    notes = [f"worst: {where}" if where else "", "limit: twice the CPU's own" if allowed > limit else ""]
    return judged(section, name, own, gpu, allowed, "; ".join(filter(None, notes)))


def _worst(got: Results, reference: Results) -> tuple[float, str]:
    found = {name: relative(got[name], reference[name]) for name in reference}
    name = max(found, key=lambda name: (found[name] != found[name], found[name]))
    return found[name], name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
