"""Batch norm, ReLU and the convolution after it as differentiable functions that keep little for the backward pass.

    y = relu(x * scale + shift),   scale = weight / sqrt(var + eps),   shift = bias - mean * scale

is one pass over memory, so y is computed again in the backward pass rather than kept beside x.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

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


def _normed(
    x: Tensor, bn: torch.nn.BatchNorm1d, training: bool, into: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of `x`, in the memory of `into` where given, and the mean and 1 / sqrt(var + eps) that it took."""
    statistics = (bn.running_mean, bn.running_var, training, bn.momentum or 0.0, bn.eps)
    if into is None:
        return torch.native_batch_norm(x, bn.weight, bn.bias, *statistics)
    nothing = {name: bn.weight.new_empty(0) for name in ("save_mean", "save_invstd")}
    return torch.ops.aten.native_batch_norm.out(x, bn.weight, bn.bias, *statistics, out=into, **nothing)


def _normed_again(saved: tuple[Tensor, ...], bn: torch.nn.BatchNorm1d, training: bool) -> Tensor:
    """relu(norm(x)) from what the forward pass kept, in memory that nothing outlives."""
    x, weight, bias, mean, inverse = saved
    if not training:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        mean, inverse = bn.running_mean, (bn.running_var + bn.eps).rsqrt()
    scale = inverse * weight
    out = scratch("normed", x, *x.shape)
    return torch.addcmul(bias - mean * scale, x, scale, out=out).relu_()


def _norm_gradients(
    grad: Tensor, saved: tuple[Tensor, ...], bn: torch.nn.BatchNorm1d, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the norm's input, weight and bias."""
    x, weight, _, mean, inverse = saved
    return torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, bn.running_mean, bn.running_var, mean, inverse, training, bn.eps, [True, True, True]
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
        # The running statistics are inputs of the backward pass in eval mode only, where nothing changes them.
        ctx.save_for_backward(x, weight, bias, mean, inverse, out if relu and residual is not None else None)
        ctx.bn, ctx.relu, ctx.training = bn, relu, training
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, out = ctx.saved_tensors
        grad, residual_wanted = grad.contiguous(), ctx.needs_input_grad[3]
        if ctx.relu:
            out = _normed_again(saved, ctx.bn, ctx.training) if out is None else out
            # Only a residual's gradient outlives this call.
            masked = torch.empty_like(grad) if residual_wanted else scratch("masked", grad, *grad.shape)
            grad = torch.ops.aten.threshold_backward(grad, out, 0, grad_input=masked)
        grads = _norm_gradients(grad, saved, ctx.bn, ctx.training)
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
        ctx.bn, ctx.kernel_map, ctx.training = bn, kernel_map, training
        return functional.convolve(out.relu_(), weight, kernel_map)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        normed_wanted = any(ctx.needs_input_grad[:3])
        out = _normed_again(saved, ctx.bn, ctx.training)
        of_out, of_weight = functional.gradients(
            out, weight, grad, ctx.kernel_map, normed_wanted, ctx.needs_input_grad[3]
        )
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if of_out is not None:
            of_out = torch.ops.aten.threshold_backward(of_out, out, 0, grad_input=of_out)
            grads = _norm_gradients(of_out, saved, ctx.bn, ctx.training)
        return *grads, of_weight, None, None, None
