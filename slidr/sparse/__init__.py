"""Sparse convolution on voxels in plain PyTorch: CPU and CUDA, no compiler needed."""

from slidr.sparse.coordinates import CoordinateError, CoordinateManager
from slidr.sparse.functional import sparse_conv
from slidr.sparse.kernel_map import KernelMap
from slidr.sparse.modules import BatchNorm, Convolution, TransposedConvolution
from slidr.sparse.tensor import SparseTensor, concatenate, global_max, global_mean, sort_rows

__all__ = [
    "BatchNorm",
    "Convolution",
    "CoordinateError",
    "CoordinateManager",
    "KernelMap",
    "SparseTensor",
    "TransposedConvolution",
    "concatenate",
    "global_max",
    "global_mean",
    "sort_rows",
    "sparse_conv",
]
