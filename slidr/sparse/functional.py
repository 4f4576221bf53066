"""Sparse convolution as a differentiable function.

Forward:   out[o] = sum over pairs (i, o, k) of x[i] @ W[k]
Backward:  dx[i] = sum of dout[o] @ W[k]^T;   dW[k] = sum of x[i]^T dout[o]
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from slidr.shapes import Float
from slidr.sparse import cpu_kernels, gather
from slidr.sparse.choice import Algorithm, by_cpu_kernels, choose
from slidr.sparse.kernel_map import KernelMap

Candidates = dict[Algorithm, Callable[[], Any]]
NARROW = 8  # inputs with fewer channels take the dense-neighbourhood path: alone their products are too thin


def sparse_conv(x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], kernel_map: KernelMap) -> Float[Tensor, "W D"]:
    """Sum over the pairs of `kernel_map` of input features times the weight of their offset.

    Runs in autocast's dtype where autocast is on. Differentiable in `x` and `weight`. Raises `ValueError` for another
    number of offsets or channels, or another dtype, than the kernel's.
    """
    if len(weight) != len(kernel_map.counts):
        raise ValueError(f"sparse_conv: got {len(weight)} kernel offsets for a map of {len(kernel_map.counts)}")
    require_fit(x, weight)
    x, weight = in_autocast(x, weight)
    if x.shape[1] < NARROW:
        return _narrow_conv(x, weight, kernel_map)
    return _SparseConv.apply(x, weight, kernel_map)


def pointwise_conv(
    x: Float[Tensor, "V C"], weight: Float[Tensor, "C D"], every_row: Callable[[], KernelMap]
) -> Float[Tensor, "V D"]:
    """``x @ weight``; on the CPU by its kernels (docs/performance.md). `every_row` pairs every row with itself.

    Raises `ValueError` as `sparse_conv` does.
    """
    require_fit(x, weight)
    if by_cpu_kernels(x, weight[None]) and not torch.is_autocast_enabled(x.device.type):
        return _SparseConv.apply(x, weight[None], every_row())
    return x @ weight


def require_fit(x: Tensor, weight: Tensor) -> None:
    """Raises `ValueError` for other channels than the kernel's, or another dtype that autocast does not convert."""
    if x.shape[1] != weight.shape[-2]:
        raise ValueError(
            f"sparse convolution: got features of {x.shape[1]} channels for a kernel of {weight.shape[-2]}; of a "
            "network's first layer those are its in_channels"
        )
    converted = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    if x.dtype != weight.dtype and not converted:
        raise ValueError(
            f"sparse convolution: got {x.dtype} features for a {weight.dtype} kernel; convert one of them (autocast "
            "does, but not float64)"
        )


def in_autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on and they are not float64; else as they are."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype)


def _narrow_conv(x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
    """All K neighbours of a voxel side by side, missing ones as zeros, then one product."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    neighbours = torch.nn.functional.embedding(kernel_map.table, padded).flatten(1)
    return neighbours @ weight.flatten(0, 1)


def _triton() -> ModuleType:
    from slidr.sparse import triton_kernels  # absent on most machines without a GPU

    return triton_kernels


def convolve(x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], kernel_map: KernelMap) -> Float[Tensor, "W D"]:
    """The forward pass alone, by the algorithm that `choice.choose` names."""
    candidates: Candidates = {
        "gather": lambda: gather.convolve(x, weight, kernel_map),
        "cpu": lambda: cpu_kernels.convolve(x, weight, kernel_map),
        "triton": lambda: _triton().convolve(x, weight, kernel_map),
    }
    return candidates[choose("forward", x, weight, kernel_map, candidates)]()


def gradients(
    x: Float[Tensor, "V C"],
    weight: Float[Tensor, "K C D"],
    grad: Float[Tensor, "W D"],
    kernel_map: KernelMap,
    x_wanted: bool,
    weight_wanted: bool,
) -> tuple[Float[Tensor, "V C"] | None, Float[Tensor, "K C D"] | None]:
    """The gradients of `x` and of `weight`, each where wanted, for the gradient `grad` of the output."""
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
        return gather.gradients(x, weight, grad, kernel_map, True, True)
    return of_x[x_by]() if x_by else None, of_weight[weight_by]() if weight_by else None


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kernel_map: KernelMap) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernel_map = kernel_map
        return convolve(x, weight, kernel_map)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        x_wanted, weight_wanted, _ = ctx.needs_input_grad
        return *gradients(x, weight, grad, ctx.kernel_map, x_wanted, weight_wanted), None
