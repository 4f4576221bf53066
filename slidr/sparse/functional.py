"""Sparse convolution by gather, one matrix product per kernel offset, and a segment sum.

Forward:   out[o] = sum over pairs (i, o, k) of x[i] @ W[k]
Backward:  dx[i] = sum of dout[o] @ W[k]^T;   dW[k] = sum of x[i]^T dout[o]
Pairs lie offset after offset, so a gathered slice meets one W[k]; the products of an output row are then
added by one segment sum that writes every row once, in a fixed order (no atomics: results repeat).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from slidr.sparse.kernel_map import KernelMap

NARROW = 8  # inputs with fewer channels take the dense-neighbourhood path: alone their products are too thin


def sparse_conv(x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], kernel_map: KernelMap) -> Float[Tensor, "W D"]:
    """Sum over the pairs of `kernel_map` of input features times the weight of their offset.

    Runs in autocast's dtype where autocast is on. Differentiable in `x` and `weight`.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.shape[1] < NARROW:
        return _narrow_conv(x, weight, kernel_map)
    return _SparseConv.apply(x, weight, kernel_map)


def _narrow_conv(x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
    """All K neighbours of a voxel side by side, missing ones as zeros, then one product."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    neighbours = torch.nn.functional.embedding(kernel_map.table, padded).flatten(1)
    return neighbours @ weight.flatten(0, 1)


def _segment_sum(products: Tensor, kernel_map: KernelMap) -> Tensor:
    if kernel_map.num_pairs == 0:
        return products.new_zeros(kernel_map.num_outputs, products.shape[1])
    bags = kernel_map.bags
    return torch.embedding_bag(products, bags.pair, bags.start, mode=0, include_last_offset=True)[0]


def _multiply(gathered: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
    products = gathered.new_empty(kernel_map.num_pairs, weight.shape[2])
    for k, first, last in kernel_map.slices:
        torch.mm(gathered[first:last], weight[k], out=products[first:last])
    return products


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernel_map = kernel_map
        return _segment_sum(_multiply(x.index_select(0, kernel_map.input_rows), weight, kernel_map), kernel_map)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        grad_of_pair = grad.contiguous().index_select(0, kernel_map.output_rows)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            x_of_pair = x.index_select(0, kernel_map.input_rows)
            grad_weight = torch.zeros_like(weight)
            for k, first, last in kernel_map.slices:
                torch.mm(x_of_pair[first:last].t(), grad_of_pair[first:last], out=grad_weight[k])
            del x_of_pair
        if ctx.needs_input_grad[0]:
            products = _multiply(grad_of_pair, weight.transpose(1, 2), kernel_map)
            grad_x = _segment_sum(products, kernel_map.transposed())
        return grad_x, grad_weight, None
