"""MinkowskiEngine's door: the layers of `slidr.sparse.modules` on MinkowskiEngine 0.5.4, with the same names.

Nothing else imports MinkowskiEngine. Its last release predates Python 3.10, so the names it expects in
`collections` are put back for the time of its import only.
"""

from __future__ import annotations

import collections
import collections.abc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from slidr.shapes import Float
from slidr.sparse.tensor import SparseTensor

_MOVED_NAMES = ("Sequence", "Mapping", "Iterable", "Callable")


@contextmanager
def _names_of_old_python() -> Iterator[None]:
    missing = [name for name in _MOVED_NAMES if not hasattr(collections, name)]
    for name in missing:
        setattr(collections, name, getattr(collections.abc, name))
    try:
        yield
    finally:
        for name in missing:
            delattr(collections, name)


def _load() -> ModuleType:
    try:
        with _names_of_old_python(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on OMP_NUM_THREADS, numpy aliases
            import MinkowskiEngine
    except ImportError as error:
        raise ImportError(
            f"engine='minkowski': MinkowskiEngine cannot be imported ({error}); run "
            "`tools/build_minkowski.sh .venv/bin/python` to build and install version 0.5.4, or use engine='torch'"
        ) from error
    return MinkowskiEngine


ME: Any = _load()


class Convolution(ME.MinkowskiConvolution):
    """`slidr.sparse.modules.Convolution` on MinkowskiEngine."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int = 3, stride: int = 1, bias: bool = False) -> None:
        super().__init__(c_in, c_out, kernel_size=kernel_size, stride=stride, bias=bias, dimension=3)

    def forward(self, x: Any, norm: BatchNorm | None = None) -> Any:
        return super().forward(x if norm is None else norm(x, relu=True))


class TransposedConvolution(ME.MinkowskiConvolutionTranspose):
    """`slidr.sparse.modules.TransposedConvolution` on MinkowskiEngine."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int = 2) -> None:
        super().__init__(c_in, c_out, kernel_size=kernel_size, stride=kernel_size, bias=False, dimension=3)


class BatchNorm(nn.Module):
    """`slidr.sparse.modules.BatchNorm` on MinkowskiEngine's tensors."""

    def __init__(self, channels: int, momentum: float = 0.1) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(channels, momentum=momentum)

    def forward(self, x: Any, residual: Any | None = None, relu: bool = False) -> Any:
        features = self.bn(x.F)
        if residual is not None:
            features = features + residual.F
        return _with_features(x, torch.relu(features) if relu else features)


def concatenate(a: Any, b: Any) -> Any:
    """Channels of `a`, then of `b`, at the voxels they share."""
    return ME.cat(a, b)


def run(network: Callable[[Any], Any], x: SparseTensor) -> Float[Tensor, "V D"]:
    """Features that a network of these layers gives `x`, in the order of its rows."""
    if x.manager.around is not None:
        raise ValueError("engine='minkowski': kernels do not reach across the azimuth's seam; use engine='torch'")
    given = ME.SparseTensor(
        features=x.features,
        coordinates=x.coordinates.int().contiguous(),
        quantization_mode=ME.SparseTensorQuantizationMode.RANDOM_SUBSAMPLE,
        minkowski_algorithm=ME.MinkowskiAlgorithm.SPEED_OPTIMIZED,
    )
    return network(given).F


def _with_features(x: Any, features: Tensor) -> Any:
    return ME.SparseTensor(features, coordinate_map_key=x.coordinate_map_key, coordinate_manager=x.coordinate_manager)
