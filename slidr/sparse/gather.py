"""Sparse convolution by gather, one matrix product per kernel offset, and a segment sum. Runs on every device.

Pairs lie offset after offset, so a gathered slice meets one W[k]; the products of an output row are then
added by one segment sum that writes every row once, in a fixed order (no atomics: results repeat).
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from slidr.shapes import Float
from slidr.sparse.kernel_map import KernelMap


def convolve(x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], kernel_map: KernelMap) -> Float[Tensor, "W D"]:
    """out[o] = sum over the pairs (i, o, k) of x[i] @ weight[k]."""
    x_of = _Gather("inputs", x, kernel_map.input_rows, kernel_map)
    products = scratch("products", x, kernel_map.num_pairs, weight.shape[2])
    for k, first, last in kernel_map.slices:
        torch.mm(x_of(k, first, last), weight[k], out=products[first:last])
    return _segment_sum(products, kernel_map)


def gradients(
    x: Float[Tensor, "V C"],
    weight: Float[Tensor, "K C D"],
    grad: Float[Tensor, "W D"],
    kernel_map: KernelMap,
    x_wanted: bool,
    weight_wanted: bool,
) -> tuple[Float[Tensor, "V C"] | None, Float[Tensor, "K C D"] | None]:
    """dx[i] = sum of grad[o] @ weight[k]^T and dweight[k] = sum of x[i]^T grad[o], each where wanted.

    The gathered gradient serves both.
    """
    grad_of = _Gather("gradients", grad, kernel_map.output_rows, kernel_map)
    x_of = _Gather("inputs", x, kernel_map.input_rows, kernel_map) if weight_wanted else None
    grad_weight = torch.zeros_like(weight) if weight_wanted else None
    products = scratch("products", x, kernel_map.num_pairs, weight.shape[1]) if x_wanted else None
    for k, first, last in kernel_map.slices:
        grad_block = grad_of(k, first, last)
        if x_of is not None and grad_weight is not None:
            torch.mm(x_of(k, first, last).t(), grad_block, out=grad_weight[k])
        if products is not None:
            torch.mm(grad_block, weight[k].t(), out=products[first:last])
    grad_x = _segment_sum(products, kernel_map.transposed()) if products is not None else None
    return grad_x, grad_weight


_LEAST = 2**26  # bytes; the C library takes blocks beyond 2**25 from the system, never from the heap


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.of: dict[tuple[str, torch.dtype], Tensor] = {}


_buffers = _Buffers()


def scratch(use: str, like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory for (rows, columns) values that nothing outlives; `use` tells apart what is needed at once.

    On the CPU it is kept and used again: large blocks that come and go leave holes in the heap between what stays. It
    is asked for in pieces so large that they never come from the heap; pages that are not used take no memory. CUDA's
    allocator has pools of its own.
    """
    if like.device.type != "cpu":
        return like.new_empty(rows, columns)
    kept = _buffers.of.get((use, like.dtype))
    if kept is None or kept.numel() < rows * columns:
        _buffers.of.pop((use, like.dtype), None)
        size = max(_LEAST // like.element_size(), 2 * rows * columns)
        with torch.inference_mode(False):  # it serves training too
            kept = _buffers.of[use, like.dtype] = torch.empty(size, dtype=like.dtype)
    return kept[: rows * columns].view(rows, columns)


def _segment_sum(products: Tensor, kernel_map: KernelMap) -> Tensor:
    if kernel_map.num_pairs == 0:
        return products.new_zeros(kernel_map.num_outputs, products.shape[1])
    bags = kernel_map.bags
    return torch.embedding_bag(products, bags.pair, bags.start, mode=0, include_last_offset=True)[0]


class _Gather:
    """Hands out the rows of `x` that each offset pairs, one offset at a time.

    One small buffer serves all offsets, so that a block is still in cache when it is multiplied. An offset that pairs
    every row with itself gets `x`, not a copy.
    """

    def __init__(self, use: str, x: Tensor, rows: Tensor, kernel_map: KernelMap) -> None:
        self.x, self.rows, self.identity = x.contiguous(), rows, kernel_map.identity
        most = max((n for k, n in enumerate(kernel_map.counts) if k != self.identity), default=0)
        self.buffer = scratch(use, x, most, x.shape[1])

    def __call__(self, k: int, first: int, last: int) -> Tensor:
        if k == self.identity:
            return self.x
        block = self.buffer[: last - first]
        torch.index_select(self.x, 0, self.rows[first:last], out=block)
        return block
