"""From points to voxels: cylindrical or Cartesian, and the bounded grid of a bird's-eye-view student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from slidr.shapes import Float, Float32, Int32, Int64


@dataclass(frozen=True)
class Voxels:
    """The occupied cells of a cloud, sorted by coordinate, and how points and voxels know each other."""

    coordinates: Int32[np.ndarray, "V 3"]  # cells
    point_of_voxel: Int64[np.ndarray, " V"]  # the voxel's first point in cloud order speaks for it
    voxel_of_point: Int64[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.coordinates)


@dataclass(frozen=True)
class GridVoxels:
    """The occupied cells of a bounded grid, sorted by index."""

    features: Float32[np.ndarray, "V 4"]  # mean x, y, z (metres) and intensity of the voxel's first points
    indices: Int32[np.ndarray, "V 3"]  # z, y, x cell
    voxel_of_point: Int64[np.ndarray, " N"]  # -1: outside the grid, or in a voxel beyond the limit

    def __len__(self) -> int:
        return len(self.indices)


def voxelize(
    points: Float[np.ndarray, "N 3"],
    voxel_size: float | Sequence[float] = 0.1,
    cylindrical: bool = True,
    azimuth_wrap: bool = False,
) -> Voxels:
    """The occupied voxels of a cloud (metres): floor((rho, phi, z) / size), or floor((x, y, z) / size).

    phi is the azimuth in degrees in (-180, 180]. A scalar size s means (s m, 1 degree, s m), Cartesian (s, s, s) m.

    The azimuth has a seam: cells at -180 and +180 degrees are neighbours in the world but not in the grid. With
    `azimuth_wrap` the azimuth cell is taken modulo the n = 360 / size cells of the circle, as one of the n cells
    from floor(-180 / size) on, so that phi = +180 exactly shares the cell of -180; the size must divide 360.
    A network told the number of cells (`MinkUNet(azimuth_cells=n)`) then reaches from the last one to the first.

    Raises `ValueError` for shapes, sizes or coordinates that make no voxels.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"voxelize: got points of shape {points.shape}, expected (N, 3): pass x, y, z only")
    points = points.astype(np.result_type(points, np.float32), copy=False)
    size = _size(voxel_size, cylindrical)
    if cylindrical:
        x, y, z = points.T
        points = np.stack([np.hypot(x, y), np.degrees(np.arctan2(y, x)), z], axis=1)
    cells = _floor(points / size.astype(points.dtype))
    if azimuth_wrap:
        if not cylindrical:
            raise ValueError("voxelize: azimuth_wrap needs cylindrical voxels; a Cartesian grid has no seam")
        cells = _wrap(cells, size[1])
    point_of_voxel, voxel_of_point = _unique(cells)
    return Voxels(cells[point_of_voxel].astype(np.int32), point_of_voxel, voxel_of_point)


def voxelize_grid(
    points: Float[np.ndarray, "N 4"],
    range: Sequence[float] = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0),
    voxel_size: Sequence[float] = (0.1, 0.1, 0.2),
    max_points: int = 10,
    max_voxels: int = 60000,
    radius: float = 51.2,
) -> GridVoxels:
    """Voxels of x, y, z (metres), intensity points in a box `range` = (x, y, z lowest, x, y, z highest).

    Points count where x^2 + y^2 <= radius^2 and their cell lies in the box. A voxel's feature is the mean of
    its first `max_points` points; voxels first entered after `max_voxels` others are left out with their
    points.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 4:
        raise ValueError(f"voxelize_grid: got points of shape {points.shape}, expected (N, 4): x, y, z, intensity")
    size = _size(voxel_size, cylindrical=False)
    lowest, highest = np.asarray(range[:3], np.float64), np.asarray(range[3:], np.float64)
    cells_per_axis = np.rint((highest - lowest) / size).astype(np.int64)
    xyz = points[:, :3].astype(np.float64)
    cells = _floor((xyz - lowest) / size)
    near = (xyz[:, :2] ** 2).sum(1) <= radius**2
    inside = np.flatnonzero(near & ((cells >= 0) & (cells < cells_per_axis)).all(1))

    indices = cells[inside, ::-1]
    first, voxel_of_inside = _unique(indices)
    chosen = np.sort(np.argsort(first)[:max_voxels])  # the earliest entered
    number = np.full(len(first), -1, np.int64)
    number[chosen] = np.arange(len(chosen))
    voxel_of_point = np.full(len(points), -1, np.int64)
    voxel_of_point[inside] = number[voxel_of_inside]
    kept = np.flatnonzero(voxel_of_point >= 0)
    return GridVoxels(
        features=_mean_of_first(points[kept], voxel_of_point[kept], len(chosen), max_points),
        indices=indices[first[chosen]].astype(np.int32),
        voxel_of_point=voxel_of_point,
    )


def _mean_of_first(values: np.ndarray, group: np.ndarray, groups: int, limit: int) -> Float32[np.ndarray, "G C"]:
    """Mean of the first `limit` rows of each group."""
    by_group = np.argsort(group, kind="stable")
    counts = np.bincount(group, minlength=groups)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(group)) - np.repeat(starts, counts)
    chosen = by_group[place < limit]
    sums = np.stack([np.bincount(group[chosen], weights=column, minlength=groups) for column in values[chosen].T], 1)
    return (sums / np.minimum(counts, limit)[:, None]).astype(np.float32)


def _size(voxel_size: float | Sequence[float], cylindrical: bool) -> Float[np.ndarray, " 3"]:
    size = np.asarray(voxel_size, dtype=np.float64)
    if size.ndim == 0:
        size = np.array([size, 1.0 if cylindrical else size, size])
    if size.shape != (3,) or not (np.isfinite(size).all() and (size > 0).all()):
        raise ValueError(f"voxelize: got a voxel size of {voxel_size}, expected one or three positive lengths")
    return size


def _floor(cells: np.ndarray) -> Int64[np.ndarray, "N 3"]:
    cells = np.floor(cells)
    if not (np.abs(cells) < 2**31).all():  # false for nan, too
        bad = np.flatnonzero(~(np.abs(cells) < 2**31).all(1))
        raise ValueError(f"voxelize: {len(bad)} points are not finite or too far, the first is row {bad[0]}; drop them")
    return cells.astype(np.int64)


def _wrap(cells: Int64[np.ndarray, "N 3"], degrees: float) -> Int64[np.ndarray, "N 3"]:
    around = round(360 / degrees)
    if abs(around * degrees - 360) > 1e-6:
        raise ValueError(f"voxelize: azimuth_wrap needs a size that divides 360 degrees, got {degrees}")
    lowest = int(np.floor(-180 / degrees))
    wrapped = cells.copy()
    wrapped[:, 1] = (cells[:, 1] - lowest) % around + lowest
    return wrapped


def _unique(cells: Int64[np.ndarray, "N 3"]) -> tuple[Int64[np.ndarray, " V"], Int64[np.ndarray, " N"]]:
    """The first row of each distinct cell, sorted by cell, and the distinct cell of each row."""
    if len(cells) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    lowest = cells.min(0)
    spans = cells.max(0) - lowest + 1
    if float(spans[0]) * float(spans[1]) * float(spans[2]) >= 2**63:
        raise ValueError(f"voxelize: the cloud spans {spans.tolist()} cells; drop its outliers or enlarge the voxels")
    shifted = cells - lowest
    keys = (shifted[:, 0] * spans[1] + shifted[:, 1]) * spans[2] + shifted[:, 2]
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first.astype(np.int64), inverse.reshape(-1).astype(np.int64)
