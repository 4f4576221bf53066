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


def _blocks(x: Tensor, rows: Tensor, kernel_map: KernelMap) -> list[Tensor]:
    """The rows of `x` that each offset with pairs asks for; `x` itself, not a copy, where that is all in order."""
    whole = [(first, last) for k, first, last in kernel_map.slices if k == kernel_map.identity]
    if not whole:
        gathered = x.index_select(0, rows)
        return [gathered[first:last] for _, first, last in kernel_map.slices]
    start, stop = whole[0]
    low, high = x.index_select(0, rows[:start]), x.index_select(0, rows[stop:])
    return [
        low[first:last] if last <= start else x if first == start else high[first - stop : last - stop]
        for _, first, last in kernel_map.slices
    ]


def _multiply(blocks: list[Tensor], weight: Tensor, kernel_map: KernelMap) -> Tensor:
    products = weight.new_empty(kernel_map.num_pairs, weight.shape[2])
    for block, (k, first, last) in zip(blocks, kernel_map.slices, strict=True):
        torch.mm(block, weight[k], out=products[first:last])
    return products


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernel_map = kernel_map
        blocks = _blocks(x, kernel_map.input_rows, kernel_map)
        return _segment_sum(_multiply(blocks, weight, kernel_map), kernel_map)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        grad_blocks = _blocks(grad.contiguous(), kernel_map.output_rows, kernel_map)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            x_blocks = _blocks(x, kernel_map.input_rows, kernel_map)
            for x_block, grad_block, (k, _, _) in zip(x_blocks, grad_blocks, kernel_map.slices, strict=True):
                torch.mm(x_block.t(), grad_block, out=grad_weight[k])
            del x_blocks  # before the products below need room
        if ctx.needs_input_grad[0]:
            products = _multiply(grad_blocks, weight.transpose(1, 2), kernel_map)
            grad_x = _segment_sum(products, kernel_map.transposed())
        return grad_x, grad_weight, None


def norm_relu(
    x: Float[Tensor, "V C"], bn: torch.nn.BatchNorm1d, residual: Float[Tensor, "V C"] | None, relu: bool
) -> Float[Tensor, "V C"]:
    """Batch norm, plus `residual`, then ReLU, in one pass over memory: only its input and its output are kept.

    Updates the running statistics of `bn` in training mode, as its own forward does.
    """
    if bn.training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    return _NormReLU.apply(x, bn.weight, bn.bias, residual, bn, relu)


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        bn: torch.nn.BatchNorm1d,
        relu: bool,
    ) -> Tensor:
        out, mean, inverse = torch.native_batch_norm(
            x, weight, bias, bn.running_mean, bn.running_var, bn.training, bn.momentum or 0.0, bn.eps
        )
        if residual is not None:
            out = out.add_(residual)
        if relu:
            out = out.relu_()
        # The running statistics are inputs of the backward pass in eval mode only, where nothing changes them.
        ctx.save_for_backward(x, weight, mean, inverse, out if relu else None)
        ctx.bn, ctx.training = bn, bn.training
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse, out = ctx.saved_tensors
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad.contiguous(), out, 0)
        grads = torch.ops.aten.native_batch_norm_backward(
            grad.contiguous(),
            x,
            weight,
            ctx.bn.running_mean,
            ctx.bn.running_var,
            mean,
            inverse,
            ctx.training,
            ctx.bn.eps,
            [True, True, True],
        )
        return (*grads, grad if ctx.needs_input_grad[3] else None, None, None)
