"""Sparse convolution and fused batch norm as differentiable functions.

Forward:   out[o] = sum over pairs (i, o, k) of x[i] @ W[k]
Backward:  dx[i] = sum of dout[o] @ W[k]^T;   dW[k] = sum of x[i]^T dout[o]
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from slidr.sparse import cpu_kernels, gather
from slidr.sparse.choice import Algorithm, by_cpu_kernels, choose
from slidr.sparse.kernel_map import KernelMap

Candidates = dict[Algorithm, Callable[[], Any]]
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


def pointwise_conv(
    x: Float[Tensor, "V C"], weight: Float[Tensor, "C D"], every_row: Callable[[], KernelMap]
) -> Float[Tensor, "V D"]:
    """``x @ weight``; on the CPU by its kernels (docs/performance.md). `every_row` pairs every row with itself."""
    if by_cpu_kernels(x, weight[None]) and not torch.is_autocast_enabled(x.device.type):
        return _SparseConv.apply(x, weight[None], every_row())
    return x @ weight


def _narrow_conv(x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
    """All K neighbours of a voxel side by side, missing ones as zeros, then one product."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    neighbours = torch.nn.functional.embedding(kernel_map.table, padded).flatten(1)
    return neighbours @ weight.flatten(0, 1)


def _triton() -> ModuleType:
    from slidr.sparse import triton_kernels  # absent on most machines without a GPU

    return triton_kernels


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernel_map = kernel_map
        candidates: Candidates = {
            "gather": lambda: gather.convolve(x, weight, kernel_map),
            "cpu": lambda: cpu_kernels.convolve(x, weight, kernel_map),
            "triton": lambda: _triton().convolve(x, weight, kernel_map),
        }
        return candidates[choose("forward", x, weight, kernel_map, candidates)]()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        kernel_map: KernelMap = ctx.kernel_map
        x_wanted, weight_wanted, _ = ctx.needs_input_grad
        of_x: Candidates = {
            "gather": lambda: gather.gradients(x, weight, grad, kernel_map, True, False)[0],
            "cpu": lambda: cpu_kernels.input_gradient(weight, grad, kernel_map),
            "triton": lambda: _triton().input_gradient(weight, grad, kernel_map),
        }
        of_weight: Candidates = {
            "gather": lambda: gather.gradients(x, weight, grad, kernel_map, False, True)[1],
            "cpu": lambda: cpu_kernels.weight_gradient(x, weight, grad, kernel_map),
            "triton": lambda: _triton().weight_gradient(x, weight, grad, kernel_map),
        }
        x_by = choose("input gradient", x, weight, kernel_map, of_x) if x_wanted else None
        weight_by = choose("weight gradient", x, weight, kernel_map, of_weight) if weight_wanted else None
        if x_by == weight_by == "gather":  # one gather for both
            return *gather.gradients(x, weight, grad, kernel_map, True, True), None
        return of_x[x_by]() if x_by else None, of_weight[weight_by]() if weight_by else None, None


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
            # Only a residual's gradient outlives this call.
            masked = torch.empty_like(out) if ctx.needs_input_grad[3] else gather.scratch("masked", out, *out.shape)
            grad = torch.ops.aten.threshold_backward(grad.contiguous(), out, 0, grad_input=masked)
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
