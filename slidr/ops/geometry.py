"""Rigid transforms as 4x4 matrices, float64 throughout.

A transform is named ``target_from_source``, so that products read left to right. Global coordinates are
thousands of metres: float32 would cost millimetres at each step of a chain, hence float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slidr.shapes import Float, Float64

Vector = Sequence[float] | Float[np.ndarray, " D"]


def pose(rotation_wxyz: Vector, translation: Vector) -> Float64[np.ndarray, "4 4"]:
    """The transform that rotates by a quaternion (w, x, y, z), then translates (metres).

    The quaternion is normalised first. Raises `ValueError` for wrong lengths or a quaternion without
    direction.
    """
    quaternion = np.asarray(rotation_wxyz, dtype=np.float64)
    offset = np.asarray(translation, dtype=np.float64)
    if quaternion.shape != (4,) or offset.shape != (3,):
        raise ValueError(
            f"pose: got a rotation of shape {quaternion.shape} and a translation of shape {offset.shape}; "
            "expected (4,), a quaternion w, x, y, z, and (3,)"
        )
    norm = np.linalg.norm(quaternion)
    if not (np.isfinite(norm) and norm > 1e-12):
        raise ValueError(f"pose: {quaternion.tolist()} is no rotation; expected a finite quaternion of length 1")
    w, x, y, z = quaternion / norm
    target_from_source = np.eye(4)
    target_from_source[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    target_from_source[:3, 3] = offset
    return target_from_source


def invert(target_from_source: Float[np.ndarray, "4 4"]) -> Float64[np.ndarray, "4 4"]:
    """``source_from_target``: the inverse, by blocks, which large translations do not make inexact."""
    matrix = np.asarray(target_from_source, dtype=np.float64)
    source_from_target = np.eye(4)
    source_from_target[:3, :3] = np.linalg.inv(matrix[:3, :3])
    source_from_target[:3, 3] = -source_from_target[:3, :3] @ matrix[:3, 3]
    return source_from_target


def transform(
    target_from_source: Float[np.ndarray, "4 4"], points: Float[np.ndarray, "N 3"]
) -> Float64[np.ndarray, "N 3"]:
    """The points (metres, source frame) in the target frame."""
    matrix = np.asarray(target_from_source, dtype=np.float64)
    return np.asarray(points, dtype=np.float64) @ matrix[:3, :3].T + matrix[:3, 3]


def camera_from_lidar(
    ego_from_camera: Float[np.ndarray, "4 4"],
    global_from_camera_ego: Float[np.ndarray, "4 4"],
    ego_from_lidar: Float[np.ndarray, "4 4"],
    global_from_lidar_ego: Float[np.ndarray, "4 4"],
) -> Float64[np.ndarray, "4 4"]:
    """The lidar frame at the sweep's time seen from the camera at the image's time, through the global frame.

    ``global_from_camera_ego`` and ``global_from_lidar_ego`` are the vehicle's poses at those two times.
    """
    global_from_camera = np.asarray(global_from_camera_ego, np.float64) @ np.asarray(ego_from_camera, np.float64)
    global_from_lidar = np.asarray(global_from_lidar_ego, np.float64) @ np.asarray(ego_from_lidar, np.float64)
    return invert(global_from_camera) @ global_from_lidar
