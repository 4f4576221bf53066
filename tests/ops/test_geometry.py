from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from slidr.ops.geometry import camera_from_lidar, invert, pose, transform

seeds = st.integers(0, 2**32 - 1)


def random_pose(rng: np.random.Generator, reach: float = 3000.0) -> np.ndarray:
    return pose(rng.standard_normal(4), rng.uniform(-reach, reach, 3))


@given(seeds)
def test_pose_rotates_as_scipy_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    quaternion, translation = rng.standard_normal(4), rng.uniform(-10, 10, 3)
    points = rng.uniform(-50, 50, (20, 3))
    w, x, y, z = quaternion
    expected = Rotation.from_quat([x, y, z, w]).apply(points) + translation
    np.testing.assert_allclose(transform(pose(quaternion, translation), points), expected, atol=1e-10)


def test_a_quarter_turn_about_z_takes_x_to_y() -> None:
    half = np.sqrt(0.5)
    np.testing.assert_allclose(
        transform(pose([half, 0, 0, half], [1, 2, 3]), np.array([[1.0, 0, 0]])), [[1, 3, 3]], atol=1e-12
    )


@given(seeds)
def test_inverting_undoes_a_transform_at_global_coordinates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target_from_source = random_pose(rng)
    points = rng.uniform(-100, 100, (10, 3))
    back = transform(invert(target_from_source), transform(target_from_source, points))
    np.testing.assert_allclose(back, points, atol=1e-9)
    np.testing.assert_array_equal(invert(target_from_source)[3], [0, 0, 0, 1])


@given(seeds)
def test_camera_from_lidar_is_the_chain_walked_step_by_step(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ego_from_camera, ego_from_lidar = random_pose(rng, 2), random_pose(rng, 2)
    global_from_camera_ego, global_from_lidar_ego = random_pose(rng), random_pose(rng)
    points = rng.uniform(-60, 60, (10, 3))
    in_global = transform(global_from_lidar_ego, transform(ego_from_lidar, points))
    in_ego = transform(np.linalg.inv(global_from_camera_ego), in_global)
    expected = transform(np.linalg.inv(ego_from_camera), in_ego)
    chained = camera_from_lidar(ego_from_camera, global_from_camera_ego, ego_from_lidar, global_from_lidar_ego)
    np.testing.assert_allclose(transform(chained, points), expected, atol=1e-8)


@pytest.mark.parametrize(
    ("rotation", "translation", "message"),
    [
        ([1, 0, 0], [0, 0, 0], r"shape \(3,\)"),
        ([1, 0, 0, 0], [0, 0], r"shape \(2,\)"),
        ([0, 0, 0, 0], [0, 0, 0], "no rotation"),
        ([np.nan, 0, 0, 1], [0, 0, 0], "no rotation"),
    ],
)
def test_a_pose_without_meaning_is_refused(rotation: list, translation: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pose(rotation, translation)
