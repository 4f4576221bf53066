"""Which lidar point is seen at which pixel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slidr.ops.geometry import transform
from slidr.shapes import Float
from slidr.types import Camera, Pairing


def pair_points(points: Float[np.ndarray, "N 3"], cameras: Sequence[Camera], min_depth: float = 1.0) -> Pairing:
    """Pairs of points (metres, lidar frame) and pixels, camera after camera, each in cloud order.

    A point is seen by a camera of W x H pixels where its depth exceeds `min_depth` metres and its projection
    (u, v) lies strictly inside 0 < u < W - 1, 0 < v < H - 1. Its pixel is (v, u) rounded half to even. There
    is no occlusion test, and a point that two cameras see makes two pairs. ``camera_index`` counts `cameras`.
    """
    points = np.asarray(points)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"pair_points: got points of shape {points.shape}, expected (N, 3): pass x, y, z only")
    point_index = [np.zeros(0, np.int64)]
    camera_index = [np.zeros(0, np.int64)]
    pixel = [np.zeros((0, 2), np.int64)]
    for index, camera in enumerate(cameras):
        seen, pixel_of_seen = _project(points, camera, min_depth)
        point_index.append(seen)
        camera_index.append(np.full(len(seen), index, np.int64))
        pixel.append(pixel_of_seen)
    return Pairing(np.concatenate(point_index), np.concatenate(camera_index), np.concatenate(pixel))


def _project(points: np.ndarray, camera: Camera, min_depth: float) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the points that one camera sees, and their pixels (row, column)."""
    in_camera = transform(camera.camera_from_lidar, points)
    in_front = np.flatnonzero(in_camera[:, 2] > min_depth)
    image = in_camera[in_front] @ np.asarray(camera.intrinsics, np.float64).T
    u = image[:, 0] / image[:, 2]
    v = image[:, 1] / image[:, 2]
    inside = (u > 0) & (u < camera.width - 1) & (v > 0) & (v < camera.height - 1)
    pixel = np.rint(np.stack([v[inside], u[inside]], axis=1)).astype(np.int64)
    return in_front[inside], pixel
