"""Features at voxels: `SparseTensor` and the operations that need no kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slidr.shapes import Float, Int32, Int64
from slidr.sparse.coordinates import CoordinateManager, CoordinateSet, Triple


class SparseTensor:
    """Features (V, C) at distinct voxels ``coordinates`` (V, 4) int32 [batch, x, y, z].

    Rows keep the order they are given in. Tensors of one forward pass share a `CoordinateManager`, which
    caches their kernel maps. With `around`, y is an azimuth of that many cells: it counts modulo `around`, and kernels
    reach across the seam. Raises `CoordinateError` for repeated voxels and for coordinates beyond +-2^15.
    """

    def __init__(
        self, features: Float[Tensor, "V C"], coordinates: Int32[Tensor, "V 4"], around: int | None = None
    ) -> None:
        if features.ndim != 2 or len(features) != len(coordinates):
            raise ValueError(
                f"SparseTensor: got features {tuple(features.shape)} for {len(coordinates)} coordinates, "
                "expected one row of features per coordinate"
            )
        self.features = features
        self.manager = CoordinateManager(coordinates, around)
        self.stride: Triple = (1, 1, 1)
        self._coordinates: Tensor | None = coordinates

    @classmethod
    def on(cls, manager: CoordinateManager, stride: Triple, features: Float[Tensor, "V C"]) -> SparseTensor:
        """Features at the voxels that `manager` holds for `stride`."""
        tensor = cls.__new__(cls)
        tensor.features, tensor.manager, tensor.stride, tensor._coordinates = features, manager, stride, None
        return tensor

    @property
    def coordinates(self) -> Int32[Tensor, "V 4"]:
        """[batch, x, y, z] of every row, in units of the input's voxels."""
        if self._coordinates is None:
            self._coordinates = self.manager.coordinates(self.stride)
        return self._coordinates

    def replace(self, features: Float[Tensor, "V D"]) -> SparseTensor:
        """The same voxels with other features, e.g. those of a dense module run on ``.features``."""
        return SparseTensor.on(self.manager, self.stride, features)

    def __repr__(self) -> str:
        return f"SparseTensor({tuple(self.features.shape)} {self.features.dtype}, stride {self.stride})"


@dataclass(frozen=True)
class Sorted:
    """A tensor with rows in lexicographic order and the way back: ``given = sorted[back]``."""

    tensor: SparseTensor
    back: Int64[Tensor, " V"] | None


def sort_rows(x: SparseTensor) -> Sorted:
    """`x` with rows in lexicographic order, so that neighbours lie close in memory; stride-1 tensors only."""
    base = x.manager.sets[1, 1, 1]
    if base.order is None:
        return Sorted(x, None)
    back = torch.empty_like(base.order)
    back[base.order] = torch.arange(len(back), device=back.device)
    manager = CoordinateManager.of_set(CoordinateSet.from_sorted_keys(base.sorted_keys), x.manager.around)
    return Sorted(SparseTensor.on(manager, (1, 1, 1), x.features[base.order]), back)


def concatenate(a: SparseTensor, b: SparseTensor) -> SparseTensor:
    """Channels of `a`, then of `b`, at the voxels they share."""
    if a.manager is not b.manager or a.stride != b.stride:
        raise ValueError(f"concatenate: got {a} and {b}, expected tensors on the same coordinates")
    return a.replace(torch.cat([a.features, b.features], dim=1))


def global_mean(x: SparseTensor, batch_size: int) -> Float[Tensor, "B C"]:
    """Mean of every cloud's features; zero for clouds without voxels."""
    batch = x.manager.batch_column(x.stride)
    total = x.features.new_zeros(batch_size, x.features.shape[1]).index_add(0, batch, x.features)
    counts = torch.bincount(batch, minlength=batch_size)
    return total / counts.clamp(min=1).to(total.dtype)[:, None]


def global_max(x: SparseTensor, batch_size: int) -> Float[Tensor, "B C"]:
    """Maximum of every cloud's features per channel; zero for clouds without voxels."""
    batch = x.manager.batch_column(x.stride)
    zeros = x.features.new_zeros(batch_size, x.features.shape[1])
    return zeros.index_reduce(0, batch, x.features, "amax", include_self=False)
