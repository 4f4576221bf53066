"""Batch norm, ReLU and the convolution after it as differentiable functions that keep little for the backward pass.

    y = relu(x * scale + shift),   scale = weight / sqrt(var + eps),   shift = bias - mean * scale

is one pass over memory, so y is computed again in the backward pass rather than kept beside x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slidr.shapes import Float
from slidr.sparse import functional
from slidr.sparse.gather import scratch
from slidr.sparse.kernel_map import KernelMap


def norm_relu(
    x: Float[Tensor, "V C"], bn: torch.nn.BatchNorm1d, residual: Float[Tensor, "V C"] | None, relu: bool
) -> Float[Tensor, "V C"]:
    """Batch norm, plus `residual`, then ReLU. Only `x` is kept; with a `residual` and ReLU the output, too.

    Updates the running statistics of `bn` in training mode, as its own forward does. A single voxel has no variance:
    the running statistics serve it, and stay as they are.
    """
    return _NormReLU.apply(x, bn.weight, bn.bias, residual, bn, relu, _begin(x, bn))


def norm_relu_conv(
    x: Float[Tensor, "V C"], bn: torch.nn.BatchNorm1d, weight: Float[Tensor, "K C D"], kernel_map: KernelMap
) -> Float[Tensor, "W D"]:
    """``sparse_conv(norm_relu(x, bn, None, True), weight, kernel_map)``, of which only `x` is kept."""
    functional.require_fit(x, weight)
    as_computed, weight = functional.in_autocast(x, weight)
    if as_computed.dtype != x.dtype or x.shape[1] < functional.NARROW:
        return functional.sparse_conv(norm_relu(x, bn, None, True), weight, kernel_map)
    return _NormReLUConv.apply(x, bn.weight, bn.bias, weight, bn, kernel_map, _begin(x, bn))


def _begin(x: Tensor, bn: torch.nn.BatchNorm1d) -> bool:
    """Whether the batch's own statistics are taken."""
    training = (bn.training and len(x) > 1) or bn.running_mean is None
    if training and bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
    return training


@dataclass(frozen=True)
class _Statistics:
    """The running mean and variance that a backward pass needs: as they were, for a later batch may move them."""

    mean: Tensor | None
    var: Tensor | None
    training: bool
    eps: float

    @classmethod
    def of(cls, bn: torch.nn.BatchNorm1d, training: bool) -> _Statistics:
        if training:
            return cls(None, None, True, bn.eps)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        return cls(bn.running_mean.clone(), bn.running_var.clone(), False, bn.eps)


def _normed(
    x: Tensor, bn: torch.nn.BatchNorm1d, training: bool, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of `x`, in the memory of `into` where given, and the mean and 1 / sqrt(var + eps) that it took."""
    momentum = bn.momentum
    if momentum is None:  # a plain average over the batches
        momentum = 1 / int(bn.num_batches_tracked) if training and bn.num_batches_tracked is not None else 0.0
    statistics = (bn.running_mean, bn.running_var, training, momentum, bn.eps)
    if into is None:
        return torch.native_batch_norm(x, bn.weight, bn.bias, *statistics)
    nothing = {name: bn.weight.new_empty(0) for name in ("save_mean", "save_invstd")}
    return torch.ops.aten.native_batch_norm.out(x, bn.weight, bn.bias, *statistics, out=into, **nothing)


def _normed_again(saved: Sequence[Tensor], running: _Statistics) -> Tensor:
    """relu(norm(x)) from what the forward pass kept, in memory that nothing outlives."""
    x, weight, bias, mean, inverse = saved
    if running.mean is not None and running.var is not None:
        mean, inverse = running.mean, (running.var + running.eps).rsqrt()
    scale = inverse.to(torch.promote_types(inverse.dtype, torch.float32)) * weight
    out = scratch("normed", x, *x.shape)
    return torch.addcmul(bias - mean * scale, x, scale, out=out).relu_()


def _norm_gradients(grad: Tensor, saved: Sequence[Tensor], running: _Statistics) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the norm's input, weight and bias."""
    x, weight, _, mean, inverse = saved
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, running.mean, running.var, mean, inverse, running.training, running.eps, [True, True, True]
    )


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
        training: bool,
    ) -> Tensor:
        out, mean, inverse = _normed(x, bn, training)
        if residual is not None:
            out = out.add_(residual)
        if relu:
            out = out.relu_()
        ctx.save_for_backward(x, weight, bias, mean, inverse, out if relu and residual is not None else None)
        ctx.running, ctx.relu = _Statistics.of(bn, training), relu
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, out = ctx.saved_tensors
        grad, residual_wanted = grad.contiguous(), ctx.needs_input_grad[3]
        if ctx.relu:
            out = _normed_again(saved, ctx.running) if out is None else out
            # Only a residual's gradient outlives this call.
            masked = torch.empty_like(grad) if residual_wanted else scratch("masked", grad, *grad.shape)
            grad = torch.ops.aten.threshold_backward(grad, out, 0, grad_input=masked)
        grads = _norm_gradients(grad, saved, ctx.running)
        return *grads, grad if residual_wanted else None, None, None, None


class _NormReLUConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        weight: Tensor,
        bn: torch.nn.BatchNorm1d,
        kernel_map: KernelMap,
        training: bool,
    ) -> Tensor:
        into = scratch("normed", x, *x.shape) if x.device.type == "cpu" else None
        out, mean, inverse = _normed(x, bn, training, into)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, inverse, weight)
        ctx.running, ctx.kernel_map = _Statistics.of(bn, training), kernel_map
        return functional.convolve(out.relu_(), weight, kernel_map)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        normed_wanted = any(ctx.needs_input_grad[:3])
        out = _normed_again(saved, ctx.running)
        of_out, of_weight = functional.gradients(
            out, weight, grad, ctx.kernel_map, normed_wanted, ctx.needs_input_grad[3]
        )
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if of_out is not None:
            of_out = torch.ops.aten.threshold_backward(of_out, out, 0, grad_input=of_out)
            grads = _norm_gradients(of_out, saved, ctx.running)
        return *grads, of_weight, None, None, None
