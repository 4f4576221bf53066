"""Triton's kernels against gathering, on the network's own maps."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gpu_parts.bench import Bench, relative
from gpu_parts.rows import NO_GPU, Row, judged
from slidr.sparse import SparseTensor, gather
from slidr.sparse.kernel_map import KernelMap

DIRECTIONS = ("forward", "input gradient", "weight gradient")
# Triton 3.6's interpreter turns arrays of one element into loop bounds, which numpy refuses from 2.4 on.
INTERPRETER_FAULT = "only 0-dimensional arrays can be converted"
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Channels in and out of one convolution a map of MinkUNet34C; the last two halve the grid, and double it again.
SAME = ((1, 96, 96), (2, 96, 96), (4, 64, 128), (8, 128, 256))


def triton_against_gathering(bench: Bench) -> Iterator[Row]:
    if importlib.util.find_spec("triton") is None:
        yield Row("triton", "kernels against gathering", note="Triton is not installed", state="skipped")
        return
    if not bench.gpu and os.environ.get("TRITON_INTERPRET") != "1":
        yield Row("triton", "kernels against gathering", gpu=NO_GPU, note="TRITON_INTERPRET is not 1", state="skipped")
        return
    try:
        yield from _judged(bench)
    except Exception as error:
        if bench.gpu or INTERPRETER_FAULT not in str(error):
            raise
        note = f"Triton {version('triton')}'s interpreter does not run with numpy {version('numpy')}"
        yield Row("triton", "kernels against gathering", gpu=NO_GPU, note=note, state="skipped")


def _judged(bench: Bench) -> Iterator[Row]:
    """The worst layer of every direction and type."""
    note = "" if bench.gpu else "in Triton's interpreter, one small map"
    for dtype, limit in LIMITS.items():
        found: dict[str, tuple[float, str]] = dict.fromkeys(DIRECTIONS, (-1.0, ""))
        for name, kernel_map, c_in, c_out in layers(bench):
            for direction, error in errors(kernel_map, c_in, c_out, dtype, bench.device).items():
                if not error <= found[direction][0]:  # not a number is worst
                    found[direction] = (error, name)
        for direction, (error, name) in found.items():
            text = "; ".join(filter(None, [f"worst: {name}", note]))
            cells = bench.cells(error)
            what = f"{direction}, {str(dtype).removeprefix('torch.')}"
            yield judged("triton", what, cells.get("cpu"), cells["gpu"], limit, text)


def layers(bench: Bench) -> Iterator[tuple[str, KernelMap, int, int]]:
    """Maps of one cloud with the channels of a layer that uses them; without a GPU one small map."""
    if not bench.gpu:
        grid = torch.stack(torch.meshgrid(*[torch.arange(5)] * 3, indexing="ij"), 3).reshape(-1, 3)
        cells = torch.cat([torch.zeros(len(grid), 1, dtype=torch.long), grid], dim=1)[::2].int()
        manager = SparseTensor(torch.zeros(len(cells), 1), cells).manager
        yield "16 to 32", manager.submanifold((1, 1, 1), (3, 3, 3)), 16, 32
        return
    batch = bench.batch(1).to(bench.device)
    manager = SparseTensor(batch.features, batch.coordinates).manager
    for stride, c_in, c_out in SAME:
        at = (stride,) * 3
        yield f"{c_in} to {c_out} at stride {stride}", manager.submanifold(at, (3, 3, 3)), c_in, c_out
        halved = manager.downsample(at, (2, 2, 2))
        yield f"{c_out} to {c_out}, stride {stride} to {2 * stride}", halved, c_out, c_out
        yield f"{c_out} to {c_in}, stride {2 * stride} to {stride}", halved.transposed(), c_out, c_in


def errors(kernel_map: KernelMap, c_in: int, c_out: int, dtype: torch.dtype, device: Any) -> dict[str, float]:
    """Relative errors of Triton's three kernels against gathering in float32 on the same rounded values."""
    from slidr.sparse import triton_kernels

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    kernels = len(kernel_map.counts)
    x, grad = draw(kernel_map.num_inputs, c_in), draw(kernel_map.num_outputs, c_out)
    weight = draw(kernels, c_in, c_out)
    wide = [value.float() for value in (x, weight, grad)]
    got = (
        triton_kernels.convolve(x, weight, kernel_map),
        triton_kernels.input_gradient(weight, grad, kernel_map),
        triton_kernels.weight_gradient(x, weight, grad, kernel_map),
    )
    expected = (
        gather.convolve(wide[0], wide[1], kernel_map),
        *gather.gradients(*wide, kernel_map, True, True),  # type: ignore[arg-type]
    )
    pairs = zip(DIRECTIONS, got, expected, strict=True)
    return {name: relative(mine, right) for name, mine, right in pairs if right is not None}
