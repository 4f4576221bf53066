"""Where the voxels of a batch are: packed keys, coordinate sets, and the maps between them.

A voxel (batch, x, y, z) becomes one 64-bit key whose order is lexicographic, so that a neighbour is an
addition and a lookup is a binary search. Sets of a coarser stride hold lattice indices:
coordinate = index * stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slidr.shapes import Int32, Int64
from slidr.sparse.kernel_map import KernelMap, strided_map, submanifold_map, window_map
from slidr.urls import RedactedError

LIMIT = 2**15  # coordinates lie in [-LIMIT, LIMIT)
MAX_BATCH = 2**12
_BITS = 17  # one more than a coordinate needs: stepping to a neighbour never carries into the next axis
_BIAS = 2 ** (_BITS - 1)

Triple = tuple[int, int, int]


class CoordinateError(RedactedError, ValueError):
    """Coordinates that the engine cannot hold; the message says which and why."""


def pack(index: Int64[Tensor, "V 4"]) -> Int64[Tensor, " V"]:
    """One key per row of [batch, x, y, z]; keys sort as the rows do."""
    key = index[:, 0]
    for axis in (1, 2, 3):
        key = (key << _BITS) + (index[:, axis] + _BIAS)
    return key


def unpack(key: Int64[Tensor, " V"]) -> Int64[Tensor, "V 4"]:
    """The rows that `pack` made into keys."""
    mask = 2**_BITS - 1
    axes = [((key >> (_BITS * place)) & mask) - _BIAS for place in (2, 1, 0)]
    return torch.stack([key >> (3 * _BITS), *axes], dim=1)


def key_step(offset: Sequence[int]) -> int:
    """What to add to a key to move it by (dx, dy, dz) lattice steps."""
    dx, dy, dz = offset
    return (dx << (2 * _BITS)) + (dy << _BITS) + dz


def moved_keys(keys: Int64[Tensor, " V"], offsets: Sequence[Triple], around: int | None) -> Int64[Tensor, "O V"]:
    """The keys moved by each offset; with `around`, y counts modulo that number of cells."""
    steps = torch.tensor([key_step(offset) for offset in offsets], dtype=torch.int64, device=keys.device)
    moved = keys[None, :] + steps[:, None]
    if around is not None:
        y = ((moved >> _BITS) & (2**_BITS - 1)) - _BIAS
        moved += (y % around - y) << _BITS
    return moved


def check_coordinates(coordinates: Tensor) -> None:
    """Raises `CoordinateError` unless coordinates are integer (V, 4) rows [batch, x, y, z] within range."""
    if coordinates.ndim != 2 or coordinates.shape[1] != 4:
        raise CoordinateError(f"coordinates: got shape {tuple(coordinates.shape)}, expected (V, 4) [batch, x, y, z]")
    if coordinates.dtype.is_floating_point or coordinates.dtype == torch.bool:
        raise CoordinateError(f"coordinates: got {coordinates.dtype}, expected integers; voxelize the points first")
    if len(coordinates) == 0:
        return
    low, high = torch.aminmax(coordinates, dim=0)
    low_list, high_list = low.tolist(), high.tolist()
    if low_list[0] < 0 or high_list[0] >= MAX_BATCH:
        raise CoordinateError(
            f"coordinates: batch column spans [{low_list[0]}, {high_list[0]}], expected [0, {MAX_BATCH - 1}]"
        )
    if min(low_list[1:]) < -LIMIT or max(high_list[1:]) >= LIMIT:
        raise CoordinateError(
            f"coordinates: x, y, z span {low_list[1:]} to {high_list[1:]}, expected [-{LIMIT}, {LIMIT - 1}]; "
            "crop the cloud or use larger voxels"
        )


@dataclass(frozen=True)
class CoordinateSet:
    """The distinct voxels of one stride. ``order`` lists rows by rising key; None where they are sorted."""

    keys: Int64[Tensor, " V"]  # in row order
    sorted_keys: Int64[Tensor, " V"]
    order: Int64[Tensor, " V"] | None

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Int64[Tensor, ...]) -> tuple[Int64[Tensor, ...], Tensor]:
        """For every key the row that holds it, and whether there is one."""
        if len(self) == 0:
            return torch.zeros_like(keys), torch.zeros_like(keys, dtype=torch.bool)
        place = torch.searchsorted(self.sorted_keys, keys).clamp_(max=len(self) - 1)
        found = self.sorted_keys[place] == keys
        return (place if self.order is None else self.order[place]), found

    @staticmethod
    def from_index(index: Int64[Tensor, "V 4"]) -> CoordinateSet:
        """The set of these lattice rows. Raises `CoordinateError` with the count if any occurs twice."""
        keys = pack(index)
        sorted_keys, order = torch.sort(keys)
        twice = int((sorted_keys[1:] == sorted_keys[:-1]).sum())
        if twice > 0:
            raise CoordinateError(
                f"coordinates: {twice} of {len(keys)} rows repeat an earlier voxel, expected distinct rows; "
                "keep one point per voxel (slidr.ops.voxelize.voxelize does)"
            )
        in_order = bool((order[1:] > order[:-1]).all())
        return CoordinateSet(keys, sorted_keys, None if in_order else order)

    @staticmethod
    def from_sorted_keys(keys: Int64[Tensor, " V"]) -> CoordinateSet:
        return CoordinateSet(keys, keys, None)


class CoordinateManager:
    """Coordinate sets and kernel maps of one batch, each made once and shared by every layer that asks.

    Sets are known by their stride (sx, sy, sz) against the input, maps by (kind, stride, kernel). Where the second
    axis is an azimuth of `around` cells, it is kept modulo `around`, and the last cell and the first are neighbours.
    """

    def __init__(self, coordinates: Int32[Tensor, "V 4"], around: int | None = None) -> None:
        check_coordinates(coordinates)
        index = coordinates.long()
        if around is not None:
            if not 1 <= around <= LIMIT:
                raise CoordinateError(f"around: got {around} azimuth cells, expected 1 to {LIMIT}")
            index = torch.cat([index[:, :2], index[:, 2:3] % around, index[:, 3:]], dim=1)
        self.around = around
        self.sets: dict[Triple, CoordinateSet] = {(1, 1, 1): CoordinateSet.from_index(index)}
        self.maps: dict[tuple, KernelMap] = {}
        self.shapes: dict[Triple, Triple] = {}  # grid shapes of window convolutions, where given

    @classmethod
    def of_set(cls, base: CoordinateSet, around: int | None = None) -> CoordinateManager:
        """A manager over coordinates already checked."""
        manager = cls.__new__(cls)
        manager.around = around
        manager.sets, manager.maps, manager.shapes = {(1, 1, 1): base}, {}, {}
        return manager

    def coordinates(self, stride: Triple) -> Int32[Tensor, "V 4"]:
        """[batch, x, y, z] of the set at `stride`, in units of the input's voxels."""
        index = unpack(self.sets[stride].keys)
        return (index * index.new_tensor((1, *stride))).int()

    def batch_column(self, stride: Triple) -> Int64[Tensor, " V"]:
        return self.sets[stride].keys >> (3 * _BITS)

    def submanifold(self, stride: Triple, kernel: Triple) -> KernelMap:
        """Pairs of a stride-1 convolution that keeps the coordinates; `kernel` sizes are odd."""
        name = ("submanifold", stride, kernel)
        if name not in self.maps:
            voxels, around = self.sets[stride], self._around(stride)
            self.maps[name] = submanifold_map(voxels, kernel, lambda offsets: moved_keys(voxels.keys, offsets, around))
        return self.maps[name]

    def downsample(self, stride: Triple, factor: Triple) -> KernelMap:
        """Pairs of a convolution with kernel = stride = `factor`; outputs at floor(index / factor)."""
        name = ("strided", stride, factor)
        if name not in self.maps:
            coarse = _times(stride, factor)
            self._around(coarse)  # refuses a circle that does not divide
            index = unpack(self.sets[stride].keys)
            step = index.new_tensor((1, *factor))
            parent = torch.div(index, step, rounding_mode="floor")
            keys, parent_of_row = torch.unique(pack(parent), return_inverse=True)
            self.sets.setdefault(coarse, CoordinateSet.from_sorted_keys(keys))
            self.maps[name] = strided_map((index - parent * step)[:, 1:], parent_of_row, len(keys), factor)
        return self.maps[name]

    def upsample(self, stride: Triple, factor: Triple) -> KernelMap:
        """Pairs of the transposed convolution that undoes `downsample`: back to the finer coordinates."""
        fine: Triple = (stride[0] // factor[0], stride[1] // factor[1], stride[2] // factor[2])
        if ("strided", fine, factor) not in self.maps:
            raise CoordinateError(
                f"transposed convolution from stride {stride} by {factor}: no coordinates at stride {fine}; "
                "it returns to coordinates that a strided convolution came from"
            )
        return self.maps["strided", fine, factor].transposed()

    def window(
        self, stride: Triple, kernel: Triple, factor: Triple, padding: Triple, shape: Triple
    ) -> tuple[KernelMap, Triple]:
        """Pairs of a convolution with an output wherever its window meets an input, and its output shape.

        Lattice index convention: output o reads inputs o * factor - padding + k, as dense convolution does.
        """
        if self.around is not None:
            raise CoordinateError("window convolution: a bounded grid has no azimuth; leave `around` unset")
        name = ("window", stride, kernel, factor, padding)
        coarse = _times(stride, factor)
        if name not in self.maps:
            keys, made, out_shape = window_map(unpack(self.sets[stride].keys), kernel, factor, padding, shape, pack)
            if coarse in self.sets:
                raise CoordinateError(f"window convolution: coordinates at stride {coarse} exist already")
            self.sets[coarse] = CoordinateSet.from_sorted_keys(keys)
            self.maps[name], self.shapes[coarse] = made, out_shape
        return self.maps[name], self.shapes[coarse]

    def _around(self, stride: Triple) -> int | None:
        """Azimuth cells of the whole circle at `stride`."""
        if self.around is None:
            return None
        if self.around % stride[1] != 0:
            raise CoordinateError(
                f"around: {self.around} azimuth cells do not divide by stride {stride[1]}, so that coarse cells would "
                "not close the circle; choose a voxel size of which a multiple of the total stride makes 360 degrees"
            )
        return self.around // stride[1]


def _times(a: Triple, b: Triple) -> Triple:
    return (a[0] * b[0], a[1] * b[1], a[2] * b[2])
