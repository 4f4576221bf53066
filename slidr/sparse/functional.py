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


class _Gather:
    """Hands out the rows of `x` that each offset pairs, one offset at a time.

    One small buffer serves all offsets, so that a block is still in cache when it is multiplied. An offset that pairs
    every row with itself gets `x`, not a copy.
    """

    def __init__(self, x: Tensor, rows: Tensor, kernel_map: KernelMap) -> None:
        self.x, self.rows, self.identity = x.contiguous(), rows, kernel_map.identity
        most = max((n for k, n in enumerate(kernel_map.counts) if k != self.identity), default=0)
        self.buffer = x.new_empty(most, x.shape[1])

    def __call__(self, k: int, first: int, last: int) -> Tensor:
        if k == self.identity:
            return self.x
        block = self.buffer[: last - first]
        torch.index_select(self.x, 0, self.rows[first:last], out=block)
        return block


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernel_map = kernel_map
        x_of = _Gather(x, kernel_map.input_rows, kernel_map)
        products = x.new_empty(kernel_map.num_pairs, weight.shape[2])
        for k, first, last in kernel_map.slices:
            torch.mm(x_of(k, first, last), weight[k], out=products[first:last])
        return _segment_sum(products, kernel_map)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        x_wanted, weight_wanted, _ = ctx.needs_input_grad
        grad_of = _Gather(grad, kernel_map.output_rows, kernel_map)
        x_of = _Gather(x, kernel_map.input_rows, kernel_map) if weight_wanted else None
        grad_weight = torch.zeros_like(weight) if weight_wanted else None
        products = x.new_empty(kernel_map.num_pairs, weight.shape[1]) if x_wanted else None
        for k, first, last in kernel_map.slices:
            grad_block = grad_of(k, first, last)
            if x_of is not None and grad_weight is not None:
                torch.mm(x_of(k, first, last).t(), grad_block, out=grad_weight[k])
            if products is not None:
                torch.mm(grad_block, weight[k].t(), out=products[first:last])
        grad_x = _segment_sum(products, kernel_map.transposed()) if products is not None else None
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
