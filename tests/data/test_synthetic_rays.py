"""The ray caster against solids described another way: by which points lie inside them."""

from __future__ import annotations

import numpy as np
import pytest

from slidr.data.synthetic.raycast import NEAR, RayGrid, cast, pinhole, spinning
from slidr.data.synthetic.sensors import cast_shadows
from slidr.data.synthetic.shapes import PART, Kind, Parts, place, turn
from slidr.data.synthetic.street import build_street, draw_look

STEP = 0.02  # of t, in the marching reference
FARTHEST = 12.0
GREY = np.full(3, 0.5, np.float32)


def _inside(part: np.void, points: np.ndarray) -> np.ndarray:
    """Whether points (street frame) lie within a part, by the solid's definition."""
    x, y, z = ((points - part["centre"]) @ part["rotation"]).T
    hx, hy, hz = part["half"]
    if part["kind"] == Kind.ELLIPSOID:
        return (x / hx) ** 2 + (y / hy) ** 2 + (z / hz) ** 2 <= 1
    level = np.abs(z) <= hz
    if part["kind"] == Kind.CYLINDER:
        radius = (x / hx) ** 2 + (y / hy) ** 2
        return level & (radius <= 1)
    share = (z + hz) / (2 * hz)  # 0 at the bottom, 1 at the top
    wide_x, wide_y = hx * (1 + (part["taper"][0] - 1) * share), hy * (1 + (part["taper"][1] - 1) * share)
    return level & (np.abs(x - part["taper"][2] * share) <= wide_x) & (np.abs(y) <= wide_y)


def _march(parts: np.ndarray, grid: RayGrid) -> tuple[np.ndarray, np.ndarray]:
    """The first part along each ray and t there, found by walking in small steps."""
    t = np.arange(NEAR, FARTHEST, STEP)
    height, width = grid.shape
    index, meet = np.full((height, width), -1), np.full((height, width), np.inf)
    for row in range(height):
        for column in range(width):
            points = grid.origin + t[:, None] * (grid.down[row] + grid.across[column]).astype(float)
            for i, part in enumerate(parts):
                inside = np.flatnonzero(_inside(part, points))
                if len(inside) and t[inside[0]] < meet[row, column]:
                    index[row, column], meet[row, column] = i, t[inside[0]]
    return index, meet


def _random_parts(rng: np.random.Generator, count: int, kinds: tuple[Kind, ...]) -> np.ndarray:
    parts = Parts()
    for i in range(count):
        angle, distance = rng.uniform(-np.pi, np.pi), rng.uniform(3, 9)
        centre = (distance * np.cos(angle), distance * np.sin(angle), rng.uniform(-1.5, 1.5))
        tilt = turn("z", rng.uniform(0, 6)) @ turn("x", rng.uniform(-1, 1)) @ turn("y", rng.uniform(-1, 1))
        kind = kinds[i % len(kinds)]
        taper = (
            (rng.uniform(0.2, 1.4), rng.uniform(0.2, 1.4), rng.uniform(-0.5, 0.5)) if kind == Kind.TAPER else (1, 1, 0)
        )
        parts.add(kind, centre, tuple(rng.uniform(0.4, 2.4, 3)), GREY, rotation=tilt, taper=taper)
    return parts.table()


def _agree(parts: np.ndarray, grid: RayGrid) -> None:
    index, t = cast(parts, grid)
    expected_index, expected_t = _march(parts, grid)
    same = index == expected_index
    assert (expected_index >= 0).mean() > 0.05
    assert same.mean() > 0.985  # grazed rims fall between two steps
    both = same & (index >= 0)
    np.testing.assert_allclose(t[both], expected_t[both], atol=1.5 * STEP)


@pytest.mark.parametrize("kind", list(Kind))
def test_a_camera_sees_what_marching_along_its_rays_finds(kind: Kind) -> None:
    rng = np.random.default_rng(int(kind))
    parts = _random_parts(rng, 24, (kind,))
    pose = np.eye(4)
    pose[:3, :3] = turn("z", rng.uniform(0, 6)) @ turn("y", np.pi / 2) @ turn("z", 0.1)
    intrinsics = np.array([[14, 0, 11.5], [0, 14, 7.5], [0, 0, 1.0]])
    _agree(parts, pinhole(intrinsics, pose, 16, 24))


def test_a_lidar_sees_what_marching_along_its_rays_finds_all_round_the_seam() -> None:
    rng = np.random.default_rng(7)
    parts = _random_parts(rng, 40, tuple(Kind))
    pose = np.eye(4)
    pose[:3, :3] = turn("z", 1.0) @ turn("x", 0.03)
    azimuth = -np.pi + 2 * np.pi * np.arange(60) / 60
    _agree(parts, spinning(azimuth, np.radians(np.linspace(-20, 20, 9)), pose))


def test_a_lidar_inside_the_outline_of_a_slab_sees_it_all_round() -> None:
    parts = Parts()
    parts.add(Kind.BOX, (3.0, -1.0, -2.5), (40.0, 40.0, 1.0), GREY)
    azimuth = -np.pi + 2 * np.pi * np.arange(72) / 72
    index, t = cast(parts.table(), spinning(azimuth, np.radians([-30.0, -20.0, 5.0]), np.eye(4)))
    assert (index[:2] == 0).all()
    assert (index[2] == -1).all()
    np.testing.assert_allclose(t[0], 2.0 / np.tan(np.radians(30)), rtol=1e-4)


def test_rays_pass_through_the_hole_of_a_ring() -> None:
    parts = Parts()
    parts.add(Kind.CYLINDER, (0, 0, 5), (2.0, 2.0, 0.02), GREY, inner=0.8)
    intrinsics = np.array([[50, 0, 20], [0, 50, 20], [0, 0, 1.0]])
    index, _ = cast(parts.table(), pinhole(intrinsics, np.eye(4), 41, 41))
    assert index[20, 20] == -1  # the middle
    assert index[20, 20 + 9] == 0  # 0.9 m off: the rim
    assert index[20, 20 + 12] == -1  # outside


def test_parts_turn_and_move_with_their_owner() -> None:
    parts = Parts()
    parts.owner = 1
    parts.add(Kind.BOX, (2.0, 0.0, 0.5), (1, 1, 1), GREY)
    position = np.array([[9.0, 9.0, 9.0], [10.0, 20.0, 0.0]])
    placed = place(parts.table(), position, np.array([0.0, np.pi / 2]))
    assert placed.dtype == PART
    np.testing.assert_allclose(placed["centre"][0], [10.0, 22.0, 0.5], atol=1e-12)


def test_a_box_between_the_sun_and_the_ground_casts_a_shadow_as_long_as_the_sun_says() -> None:
    rng = np.random.default_rng(0)
    look = draw_look(rng)
    parts = Parts()
    parts.add(Kind.BOX, (0, 0, 5.0), (2, 2, 0.2), GREY)
    shadows = cast_shadows(parts.table(), look, np.zeros(3))
    under = -look.sun[:2] / look.sun[2] * 5.0  # where the sun's ray through the box's middle meets the ground
    points = np.array([[*under, 0.0], [*(under + 6.0), 0.0], [0.0, 0.0, 6.0], [500.0, 0.0, 0.0]])
    np.testing.assert_array_equal(shadows.lit(points), [0, 1, 1, 1])


def test_objects_keep_their_speed_and_the_ego_car_its_lane() -> None:
    street = build_street(np.random.default_rng([0, 1]), 4.0)
    moved = street.positions(3.0) - street.positions(1.0)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 2 * np.abs(street.speed), atol=1e-9)
    assert (street.speed > 0).any()
    way = np.array([street.ego(s)[0] for s in np.linspace(0, 4, 9)])
    assert np.ptp(way[:, 1]) < 1.0
    assert (np.diff(way[:, 0]) > 1.0).all()
