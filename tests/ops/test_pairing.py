from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidr.ops.pairing import pair_points
from slidr.types import Camera


def camera(camera_from_lidar: np.ndarray | None = None, width: int = 40, height: int = 30) -> Camera:
    """A camera that looks along z with focal length 10 pixels and its principal point at (20, 15)."""
    return Camera(
        channel="CAM_FRONT",
        token="token",
        image_path="image.jpg",
        width=width,
        height=height,
        timestamp=0,
        intrinsics=np.array([[10.0, 0, 20], [0, 10, 15], [0, 0, 1]]),
        ego_from_camera=np.eye(4),
        global_from_ego=np.eye(4),
        camera_from_lidar=np.eye(4) if camera_from_lidar is None else camera_from_lidar,
    )


def at(u: float, v: float, depth: float = 2.0) -> list[float]:
    """The point that `camera()` sees at (u, v); exact in binary for halves and quarters."""
    return [(u - 20) * depth / 10, (v - 15) * depth / 10, depth]


def test_pairs_of_the_real_keyframe_are_the_originals(
    golden: Path, real_cloud: np.ndarray, real_cameras: tuple[Camera, ...]
) -> None:
    expected = np.load(golden / "projection.npz")
    pairing = pair_points(real_cloud[:, :3], real_cameras)
    np.testing.assert_array_equal(pairing.point_index, expected["pairing_points"])
    np.testing.assert_array_equal(pairing.camera_index, expected["pairing_images"][:, 0])
    # The original rounds to float32 at every step of the chain. Its pixels differ from float64's for 72 of
    # 22,115 pairs (0.33 %), by one pixel, and only where the exact projection lies between two pixels.
    off = pairing.pixel != expected["pairing_images"][:, 1:]
    assert off.any(1).mean() < 0.004
    assert np.abs(pairing.pixel - expected["pairing_images"][:, 1:]).max() == 1
    for index, axis in np.argwhere(off):
        view = real_cameras[pairing.camera_index[index]]
        point = np.append(real_cloud[pairing.point_index[index], :3].astype(np.float64), 1)
        x, y, depth = view.intrinsics @ (view.camera_from_lidar @ point)[:3]
        exact = (y / depth, x / depth)[axis]
        assert abs(exact - np.floor(exact) - 0.5) < 0.02


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_pairs_are_a_plain_loops(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.uniform([-8, -8, -2], [8, 8, 6], (count, 3)).astype(np.float32)
    turned = np.eye(4)
    turned[:3, :3], _ = np.linalg.qr(rng.standard_normal((3, 3)))
    turned[:3, 3] = rng.uniform(-1, 1, 3)
    cameras = [camera(), camera(turned, width=25)]
    expected = []
    for index, view in enumerate(cameras):
        for n, point in enumerate(points.astype(np.float64)):
            x, y, depth = (view.camera_from_lidar @ np.append(point, 1))[:3]
            if depth <= 1.0:
                continue
            u, v = 10 * x / depth + 20, 10 * y / depth + 15
            if 0 < u < view.width - 1 and 0 < v < view.height - 1:
                expected.append((n, index, round(v), round(u)))
    pairing = pair_points(points, cameras)
    got = np.column_stack([pairing.point_index, pairing.camera_index, pairing.pixel])
    assert [tuple(row) for row in got.tolist()] == expected


@pytest.mark.parametrize(
    ("point", "seen"),
    [
        (at(20, 15), True),
        (at(20, 15, depth=1.0), False),
        (at(20, 15, depth=1.0625), True),
        (at(20, 15, depth=-2.0), False),
        (at(0, 15), False),
        (at(0.25, 15), True),
        (at(39, 15), False),
        (at(38.75, 15), True),
        (at(20, 0), False),
        (at(20, 0.25), True),
        (at(20, 29), False),
        (at(20, 28.75), True),
    ],
)
def test_the_border_and_the_least_depth_themselves_see_nothing(point: list[float], seen: bool) -> None:
    assert len(pair_points(np.array([point]), [camera()])) == int(seen)


def test_pixels_round_half_to_even() -> None:
    points = np.array([at(20.5, 15.5), at(21.5, 16.5), at(22.5, 14.5)])
    assert pair_points(points, [camera()]).pixel.tolist() == [[16, 20], [16, 22], [14, 22]]


def test_a_point_that_two_cameras_see_makes_two_pairs() -> None:
    pairing = pair_points(np.array([at(20, 15), at(1000, 15)]), [camera(), camera()])
    assert pairing.point_index.tolist() == [0, 0]
    assert pairing.camera_index.tolist() == [0, 1]


def test_nothing_to_see_makes_no_pairs_of_the_right_types() -> None:
    for points, cameras in ((np.zeros((0, 3)), [camera()]), (np.ones((4, 3)), [])):
        pairing = pair_points(points, cameras)
        assert len(pairing) == 0
        assert pairing.pixel.shape == (0, 2)
        assert pairing.point_index.dtype == pairing.camera_index.dtype == pairing.pixel.dtype == np.int64


def test_a_cloud_with_intensities_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\), expected \(N, 3\)"):
        pair_points(np.zeros((5, 4)), [camera()])
