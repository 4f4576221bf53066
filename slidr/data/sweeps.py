"""Lidar sweeps as training reads them: points and intensity, checked. Every job and the doctor read sweeps here."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from slidr.config import DatasetName
from slidr.data import images as files
from slidr.data import storage
from slidr.data.storage import DataError
from slidr.shapes import Float32

# No lidar on a car reaches 1 km. Ten times that is damage, a wrong unit or global coordinates, and still far from where
# a voxel's number would not fit 32 bits.
FARTHEST = 1e4  # m
RINGS = 1024  # more beams than any lidar has
_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class SweepFormat:
    """The rows of a data set's sweeps: x, y, z (m), then the intensity, then perhaps the number of the beam."""

    columns: int
    intensity: str  # the data set's name for it
    brightest: float  # the largest intensity
    added: float = 0.0  # to the intensity, for the student


# The real samples have intensities of 0 to 255 (whole numbers) and remissions of 0 to 0.99.
FORMATS: dict[DatasetName, SweepFormat] = {
    "nuscenes": SweepFormat(files.NUSCENES_COLUMNS, "intensity", 255.0),
    "semantic_kitti": SweepFormat(files.KITTI_COLUMNS, "remission", 1.0, added=1.0),
}


def read_points(
    path: str | os.PathLike[str], dataset: DatasetName
) -> tuple[Float32[np.ndarray, "N 3"], Float32[np.ndarray, " N"]]:
    """A sweep's points (m, lidar frame) and their intensity: nuScenes' as stored, SemanticKITTI's remission + 1.

    Raises `DataError` where the file is missing or damaged, or holds points that no such sweep has: not finite, farther
    than `FARTHEST`, brighter than the data set's range. The message says so where the file fits the rows of another
    data set.
    """
    rows, name = FORMATS[dataset], os.fspath(path)
    data = storage.read_bytes(path, storage.SENSOR_BYTES)
    sweep = _decoded(data, rows)
    problem = "" if sweep is None else _problem(sweep, rows)
    if sweep is not None and problem is None and _has_rings(sweep):
        return np.array(sweep[:, :3]), sweep[:, 3] + np.float32(rows.added)
    other = next((each for each in FORMATS if each != dataset and _fits(data, FORMATS[each])), None)
    if other is not None:
        raise DataError(
            f"{name}: is not a sweep of {dataset}: its {len(data)} bytes fit {FORMATS[other].columns} float32 a point, "
            f"as {other} has, and not {rows.columns}; check data.dataset, or write sweeps of {rows.columns} columns"
        )
    sweep = files.decode_sweep(data, name, rows.columns)  # says what is wrong with the size
    if problem:
        raise DataError(f"{name}: {problem}; is it a sweep of {dataset}? Else copy the file again")
    return np.array(sweep[:, :3]), sweep[:, 3] + np.float32(rows.added)  # a fifth column of the user's own


def _problem(sweep: Float32[np.ndarray, "N C"], rows: SweepFormat) -> str | None:
    """Which values no sweep of these rows has, or None."""
    finite = np.isfinite(sweep[:, :4])
    if not finite.all():
        return f"{int((~finite.all(1)).sum())} of {len(sweep)} points are not finite"
    if np.abs(sweep[:, :3]).max() > FARTHEST:
        far = np.abs(sweep[:, :3]).max(1) > FARTHEST
        i = int(np.argmax(far))
        axis = int(np.abs(sweep[i, :3]).argmax())
        return (
            f"{int(far.sum())} of {len(sweep)} points are farther than {FARTHEST:g} m: point {i} has "
            f"{_AXES[axis]} = {sweep[i, axis]:g}"
        )
    strange = (sweep[:, 3] < 0) | (sweep[:, 3] > rows.brightest)
    if strange.any():
        i = int(np.argmax(strange))
        return (
            f"{int(strange.sum())} of {len(sweep)} points have {rows.intensity} outside 0 to {rows.brightest:g}: point "
            f"{i} has {sweep[i, 3]:g}"
        )
    return None


def _decoded(data: bytes, rows: SweepFormat) -> Float32[np.ndarray, "N C"] | None:
    """The rows of a sweep; None where the size does not fit them."""
    if not data or len(data) % (4 * rows.columns):
        return None
    return np.frombuffer(data, np.float32).reshape(-1, rows.columns)


def _fits(data: bytes, rows: SweepFormat) -> bool:
    """Whether a file can be a sweep of these rows: 4 and 5 columns may both divide its size, so its values decide."""
    sweep = _decoded(data, rows)
    return sweep is not None and _problem(sweep, rows) is None and _has_rings(sweep)


def _has_rings(sweep: Float32[np.ndarray, "N C"]) -> bool:
    """Whether the fifth column, if there is one, holds the beams' numbers."""
    if sweep.shape[1] < 5:
        return True
    rings = sweep[:, 4]
    return bool(((rings == np.round(rings)) & (rings >= 0) & (rings < RINGS)).all())
