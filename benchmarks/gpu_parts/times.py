"""How long each part of a step takes, beside the least time that it could take on this machine."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_parts.bench import Bench
from gpu_parts.floors import INDEX, batch_bytes, loss_bytes, optimizer_bytes, student_work
from gpu_parts.rows import NO_GPU, Row
from slidr.losses import superpixel_info_nce
from slidr.models.students import build_student, student_rows
from slidr.ops.upsampled import UpsampledMap
from slidr.sparse import SparseTensor, choice, sort_rows
from slidr.sparse.coordinates import CoordinateManager
from slidr.sparse.tiles import tiles_of
from slidr.training.optim import build_optimizer
from slidr.types import PairBatch


def rates(bench: Bench) -> Iterator[Row]:
    """What the machine can do: the floors' ceilings."""
    found = bench.ceilings
    for mode, rate in found.matrix.items():
        yield Row("rates", f"matrix product, {mode}", "TFLOP/s", **bench.cells(rate))
    yield Row("rates", "copy, read and written", "GB/s", **bench.cells(found.copy))
    if bench.gpu:
        yield Row("rates", "host to device, page-locked memory", "GB/s", gpu=found.pinned)
        yield Row("rates", "host to device, ordinary memory", "GB/s", gpu=found.pageable)


def host_to_device(bench: Bench) -> Iterator[Row]:
    """A batch's way to the GPU, from memory as a loader leaves it and from page-locked memory."""
    batch = bench.batch()
    size = batch_bytes(batch)
    what, note = f"batch of {bench.size.clouds} to the device", f"{size / 1e6:.0f} MB"
    if not bench.gpu:
        yield Row("copy", what, "ms", gpu=NO_GPU, note=note, state="skipped")
        return
    floor = size / bench.ceilings.pinned / 1e6
    locked = _page_locked(batch)
    plain = bench.milliseconds(lambda: batch.to(bench.device, non_blocking=True))
    fast = bench.milliseconds(lambda: locked.to(bench.device, non_blocking=True))
    yield Row("copy", what, "ms", gpu=plain, floor=floor, note=note)
    yield Row("copy", f"{what}, page-locked", "ms", gpu=fast, floor=floor, note=note)


def _page_locked(batch: PairBatch) -> PairBatch:
    values = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in vars(batch).items()}
    return type(batch)(**values)


def kernel_maps(bench: Bench) -> Iterator[Row]:
    """Sorting a batch's voxels and finding all neighbours, for every level of a MinkUNet."""
    batch = bench.batch().to(bench.device)
    made = _maps(batch)
    pairs = sum(kernel_map.num_pairs for kernel_map in made.maps.values())
    floor = bench.ceilings.floor(0, 2.0 * INDEX * (pairs + len(batch.features)), "float32")
    what = f"kernel maps, {len(batch.features):,} voxels"
    took = bench.milliseconds(lambda: _maps(batch))
    yield Row("maps", what, "ms", floor=floor, note=f"{pairs:,} pairs", **bench.cells(took))
    if bench.gpu:

        def tiled() -> None:
            for kernel_map in _maps(batch).maps.values():
                tiles_of(kernel_map)
                tiles_of(kernel_map.transposed())

        yield Row("maps", f"{what}, cut into tiles", "ms", gpu=bench.milliseconds(tiled))


def _maps(batch: PairBatch) -> CoordinateManager:
    manager = sort_rows(SparseTensor(batch.features, batch.coordinates)).tensor.manager
    for level in range(5):
        stride = (2**level,) * 3
        manager.submanifold(stride, (3, 3, 3))
        if level < 4:
            manager.downsample(stride, (2, 2, 2))
    return manager


def student(bench: Bench) -> Iterator[Row]:
    """Forward and backward pass of the student, kernel maps included."""
    batch = bench.batch().to(bench.device)
    torch.manual_seed(0)
    model = build_student(bench.config().student).to(bench.device).train()
    work = student_work(bench, batch)
    direction = torch.randn(len(batch.features), 64, device=bench.device)
    for mode in bench.modes:

        def forward(mode: str = mode) -> Tensor:
            with bench.arithmetic(mode):  # type: ignore[arg-type]
                return student_rows(model, batch)

        def both(mode: str = mode) -> None:
            with bench.arithmetic("tf32" if mode == "tf32" else "float32"):
                model.zero_grad(set_to_none=True)
                (forward(mode).float() * direction).sum().backward()

        alone, together = bench.milliseconds(forward), bench.milliseconds(both)
        peak = bench.peak_bytes(both)
        memory = "" if peak is None else f"{peak / 1e9:.1f} GB"
        for what, took, part in (("forward", alone, work[0]), ("backward", together - alone, work[1])):
            note = f"{part.flop / 1e9:.0f} GFLOP" + (f", {memory}" if memory else "")
            name = f"student {what}, {mode}"
            yield Row("student", name, "ms", floor=part.floor(bench, mode), note=note, **bench.cells(took))
    if bench.gpu:
        yield _algorithms()


def _algorithms() -> Row:
    """Which algorithm the engine chose, by its own measurements."""
    chosen = choice.chosen()
    triton = sum(algorithm == "triton" for algorithm in chosen.values())
    return Row(
        "student",
        "convolutions that Triton's kernels compute",
        gpu=f"{triton} of {len(chosen)}",
        note="the others gather; chosen by the engine's own timing",
        values={"chosen": {str(key): algorithm for key, algorithm in chosen.items()}},
    )


def loss(bench: Bench) -> Iterator[Row]:
    """Pooling and the superpixel loss, forward and backward, from given features."""
    batch = bench.batch().to(bench.device)
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(len(batch.features), 64, device=bench.device), dim=1)
    height, width = (side // 4 for side in bench.size.image)
    coarse = torch.randn(len(batch.images), 64, height, width, device=bench.device)
    rows.requires_grad_()
    coarse.requires_grad_()

    def both() -> None:
        rows.grad = coarse.grad = None
        maps = UpsampledMap(coarse, bench.size.image, bench.size.image)
        superpixel_info_nce(rows, maps, batch.superpixels, batch.point_index, batch.pixel_index).backward()

    floor = bench.ceilings.floor(0, loss_bytes(bench, batch), "float32")
    took, peak = bench.milliseconds(both), bench.peak_bytes(both)
    note = "" if peak is None else f"{peak / 1e9:.1f} GB"
    yield Row("loss", "pooling and loss, both ways", "ms", floor=floor, note=note, **bench.cells(took))


def optimizer(bench: Bench) -> Iterator[Row]:
    """An SGD step over the student's parameters."""
    config = bench.config()
    parameters = [p.to(bench.device).detach() for p in build_student(config.student).parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    sgd = build_optimizer([{"params": parameters}], config.optim)
    count = sum(parameter.numel() for parameter in parameters)
    floor = bench.ceilings.floor(0, optimizer_bytes(count), "float32")
    what = f"SGD step, {count / 1e6:.1f} M parameters"
    yield Row("optimizer", what, "ms", floor=floor, **bench.cells(bench.milliseconds(sgd.step)))
