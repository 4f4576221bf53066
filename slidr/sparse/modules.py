"""Layers over `SparseTensor`, with MinkowskiEngine's parameter names and shapes (kernel, bias, bn.*)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from slidr.sparse.functional import pointwise_conv, sparse_conv
from slidr.sparse.kernel_map import KernelMap
from slidr.sparse.norm import norm_relu, norm_relu_conv
from slidr.sparse.tensor import SparseTensor, concatenate


def cube(size: int) -> tuple[int, int, int]:
    return (size, size, size)


class _Kernel(nn.Module):
    """Holds ``kernel`` [K, C_in, C_out] ([C_in, C_out] for K = 1) and an optional ``bias`` [1, C_out].

    Both start as U(-b, b) with b = 1 / sqrt(n K), n = C_in (C_out for transposed convolutions).
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, bias: bool, fan: int) -> None:
        super().__init__()
        volume = kernel_size**3
        bound = 1 / math.sqrt(fan * volume)
        shape = (volume, c_in, c_out) if volume > 1 else (c_in, c_out)
        self.kernel = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(1, c_out).uniform_(-bound, bound)) if bias else None

    def extra_repr(self) -> str:
        return f"kernel={tuple(self.kernel.shape)}, bias={self.bias is not None}"


class Convolution(_Kernel):
    """Convolution with an odd kernel that keeps the coordinates, or with kernel = stride that halves them."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int = 3, stride: int = 1, bias: bool = False) -> None:
        if not (stride == 1 and kernel_size % 2 == 1) and stride != kernel_size:
            raise ValueError(
                f"Convolution: got kernel_size {kernel_size}, stride {stride}; "
                "expected an odd kernel with stride 1, or a stride equal to the kernel size"
            )
        super().__init__(c_in, c_out, kernel_size, bias, fan=c_in)
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: SparseTensor, norm: BatchNorm | None = None) -> SparseTensor:
        """The convolution of `x`, or of ``norm(x, relu=True)``, which is then not kept for the backward pass."""
        if norm is not None and (self.stride > 1 or self.kernel_size == 1 or not norm.is_plain(x) or _hooked(norm)):
            x, norm = norm(x, relu=True), None
        kernel_map = self._kernel_map(x)
        if norm is not None:
            features = norm_relu_conv(x.features, norm.bn, self.kernel, kernel_map())
        elif self.kernel_size == 1:
            features = pointwise_conv(x.features, self.kernel, kernel_map)
        else:
            features = sparse_conv(x.features, self.kernel, kernel_map())
        if self.bias is not None:
            features = features + self.bias
        sx, sy, sz = x.stride
        return SparseTensor.on(x.manager, (sx * self.stride, sy * self.stride, sz * self.stride), features)

    def _kernel_map(self, x: SparseTensor) -> Callable[[], KernelMap]:
        if self.stride == 1:
            return lambda: x.manager.submanifold(x.stride, cube(self.kernel_size))
        return lambda: x.manager.downsample(x.stride, cube(self.stride))


class TransposedConvolution(_Kernel):
    """Transposed convolution with kernel = stride, back to the coordinates that a `Convolution` came from."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int = 2) -> None:
        super().__init__(c_in, c_out, kernel_size, bias=False, fan=c_out)
        self.stride = kernel_size

    def forward(self, x: SparseTensor) -> SparseTensor:
        features = sparse_conv(x.features, self.kernel, x.manager.upsample(x.stride, cube(self.stride)))
        sx, sy, sz = x.stride
        return SparseTensor.on(x.manager, (sx // self.stride, sy // self.stride, sz // self.stride), features)


class BatchNorm(nn.Module):
    """Batch norm over all voxels of the batch, then `residual` added and ReLU taken where asked.

    ``bn`` is a plain `torch.nn.BatchNorm1d`, so `torch.nn.SyncBatchNorm.convert_sync_batchnorm` works on it.
    """

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, momentum=momentum)

    def forward(self, x: SparseTensor, residual: SparseTensor | None = None, relu: bool = False) -> SparseTensor:
        other = residual.features if residual is not None else None
        if self.is_plain(x):
            return x.replace(norm_relu(x.features, self.bn, other, relu))
        if len(x.features) == 0 and type(self.bn) is nn.BatchNorm1d:
            return x  # a norm over all workers must be entered even by one whose cloud is empty
        features = self.bn(x.features)
        if other is not None:
            features = features + other
        return x.replace(torch.relu(features) if relu else features)

    def is_plain(self, x: SparseTensor) -> bool:
        """Whether this process alone normalises `x`, there is something in it, and nobody watches ``bn`` at work."""
        return type(self.bn) is nn.BatchNorm1d and self.bn.affine and len(x.features) > 0 and not _hooked(self.bn)


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


__all__ = ["BatchNorm", "Convolution", "TransposedConvolution", "concatenate"]
