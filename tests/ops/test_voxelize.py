from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.ops.voxelize import voxelize, voxelize_grid

seeds = st.integers(0, 2**32 - 1)


def cloud(seed: int, count: int, reach: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-reach, reach, (count, 3))


@pytest.mark.parametrize("cylindrical", [True, False])
def test_voxels_of_the_real_cloud_are_the_originals(golden: Path, real_cloud: np.ndarray, cylindrical: bool) -> None:
    name = "cylindrical" if cylindrical else "cartesian"
    expected = np.load(golden / f"voxels_{name}.npz")
    voxels = voxelize(real_cloud[:, :3], cylindrical=cylindrical)
    assert voxels.coordinates.dtype == np.int32
    np.testing.assert_array_equal(voxels.coordinates, np.unique(expected["coords"], axis=0))
    if cylindrical:
        assert len(real_cloud) == expected["n_points"]
        np.testing.assert_array_equal(voxels.coordinates[voxels.voxel_of_point], expected["point_voxel_coords"])


@given(seeds, st.integers(0, 200), st.booleans())
def test_voxels_are_a_dictionarys(seed: int, count: int, cylindrical: bool) -> None:
    points = cloud(seed, count)
    members: dict[tuple[int, ...], list[int]] = {}
    for index, (x, y, z) in enumerate(points.tolist()):
        if cylindrical:
            cell = (math.hypot(x, y) / 0.5, math.degrees(math.atan2(y, x)) / 10.0, z / 0.25)
        else:
            cell = (x / 0.5, y / 10.0, z / 0.25)
        members.setdefault(tuple(math.floor(c) for c in cell), []).append(index)
    voxels = voxelize(points, (0.5, 10.0, 0.25), cylindrical)
    assert [tuple(c) for c in voxels.coordinates.tolist()] == sorted(members)
    for cell, first, number in zip(voxels.coordinates.tolist(), voxels.point_of_voxel, range(len(voxels)), strict=True):
        assert first == members[tuple(cell)][0]
        np.testing.assert_array_equal(np.flatnonzero(voxels.voxel_of_point == number), members[tuple(cell)])


@given(seeds, st.booleans())
def test_the_order_of_points_changes_no_voxel(seed: int, cylindrical: bool) -> None:
    points = cloud(seed, 100)
    order = np.random.default_rng(seed + 1).permutation(100)
    straight, shuffled = voxelize(points, 0.5, cylindrical), voxelize(points[order], 0.5, cylindrical)
    np.testing.assert_array_equal(straight.coordinates, shuffled.coordinates)
    np.testing.assert_array_equal(straight.voxel_of_point[order], shuffled.voxel_of_point)


def test_a_scalar_size_means_one_degree_of_azimuth() -> None:
    points = cloud(0, 500, 20.0)
    np.testing.assert_array_equal(voxelize(points, 0.2).coordinates, voxelize(points, (0.2, 1.0, 0.2)).coordinates)
    np.testing.assert_array_equal(
        voxelize(points, 0.2, cylindrical=False).coordinates,
        voxelize(points, (0.2, 0.2, 0.2), cylindrical=False).coordinates,
    )


@pytest.mark.parametrize("cylindrical", [True, False])
def test_points_of_integers_are_lengths_too(cylindrical: bool) -> None:
    points = np.array([[3, 4, -1], [30, -40, 2]])
    as_floats = voxelize(points.astype(np.float64), 0.5, cylindrical)
    np.testing.assert_array_equal(voxelize(points, 0.5, cylindrical).coordinates, as_floats.coordinates)


def test_the_seam_is_faithful_by_default_and_wraps_on_request() -> None:
    behind = np.array([[-5.0, 0.0, 0.0], [-5.0, -0.0, 0.0], [-5.0, 1e-3, 0.0], [-5.0, -1e-3, 0.0]])
    default = voxelize(behind)
    azimuth = default.coordinates[default.voxel_of_point, 1]
    assert azimuth.tolist() == [180, -180, 179, -180]
    wrapped = voxelize(behind, azimuth_wrap=True)
    azimuth = wrapped.coordinates[wrapped.voxel_of_point, 1]
    assert azimuth.tolist() == [-180, -180, 179, -180]
    assert wrapped.voxel_of_point[0] == wrapped.voxel_of_point[1]


@given(seeds, st.sampled_from([0.5, 1.0, 1.6, 8.0, 360 / 7]))
def test_wrapped_azimuths_are_the_cells_of_one_turn(seed: int, degrees: float) -> None:
    around = round(360 / degrees)
    points = np.vstack([cloud(seed, 300), [[-1.0, 0.0, 0.0]]])
    plain = voxelize(points, (0.1, degrees, 0.1))
    wrapped = voxelize(points, (0.1, degrees, 0.1), azimuth_wrap=True)
    before = plain.coordinates[plain.voxel_of_point].astype(np.int64)
    after = wrapped.coordinates[wrapped.voxel_of_point].astype(np.int64)
    np.testing.assert_array_equal(before[:, [0, 2]], after[:, [0, 2]])
    np.testing.assert_array_equal(before[:, 1] % around, after[:, 1] % around)
    assert len(np.unique(after[:, 1])) <= around
    assert np.ptp(after[:, 1]) < around


def test_an_empty_cloud_has_no_voxels() -> None:
    voxels = voxelize(np.zeros((0, 3), np.float32))
    assert len(voxels) == 0
    assert voxels.coordinates.shape == (0, 3)
    assert voxels.point_of_voxel.dtype == voxels.voxel_of_point.dtype == np.int64


@pytest.mark.parametrize(
    ("points", "arguments", "message"),
    [
        (np.zeros((2, 4)), {}, r"expected \(N, 3\)"),
        (np.array([[0, 0, 0], [np.nan, 0, 0]]), {}, "1 points are not finite.*row 1"),
        (np.array([[0, 0, np.inf]]), {}, "not finite"),
        (np.array([[-1e8, -1e8, -1e8], [1e8, 1e8, 1e8]]), {"cylindrical": False}, "spans"),
        (np.zeros((1, 3)), {"voxel_size": 0.0}, "positive lengths"),
        (np.zeros((1, 3)), {"voxel_size": (0.1, 0.1)}, "positive lengths"),
        (np.zeros((1, 3)), {"voxel_size": (0.1, 0.7, 0.1), "azimuth_wrap": True}, "divides 360"),
        (np.zeros((1, 3)), {"cylindrical": False, "azimuth_wrap": True}, "needs cylindrical"),
    ],
)
def test_what_makes_no_voxels_is_refused(points: np.ndarray, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        voxelize(points, **arguments)


def test_grid_indices_of_the_real_cloud_are_the_originals(golden: Path, real_cloud: np.ndarray) -> None:
    # The original's indices hold the whole box, corners beyond the radius included.
    grid = voxelize_grid(real_cloud, radius=math.inf)
    assert grid.indices.dtype == np.int32
    np.testing.assert_array_equal(grid.indices, np.load(golden / "voxelnet.npz")["indices"])


@given(seeds, st.integers(0, 300), st.integers(1, 4), st.integers(1, 40))
def test_grid_voxels_are_a_plain_loops(seed: int, count: int, max_points: int, max_voxels: int) -> None:
    points = np.random.default_rng(seed).uniform(-1.5, 1.5, (count, 4))
    members: dict[tuple[int, ...], list[int]] = {}
    place = np.full(count, None)
    for index, (x, y, z, _) in enumerate(points.tolist()):
        cell = (math.floor((z + 1) / 0.5), math.floor((y + 1) / 0.25), math.floor((x + 1) / 0.25))
        inside = 0 <= cell[0] < 4 and 0 <= cell[1] < 8 and 0 <= cell[2] < 8
        if not inside or x * x + y * y > 1.2**2:
            continue
        if cell in members or len(members) < max_voxels:
            members.setdefault(cell, []).append(index)
            place[index] = cell
    grid = voxelize_grid(points, (-1, -1, -1, 1, 1, 1), (0.25, 0.25, 0.5), max_points, max_voxels, radius=1.2)
    cells = sorted(members)
    assert [tuple(row) for row in grid.indices.tolist()] == cells
    means = [points[members[cell][:max_points]].mean(0) for cell in cells]
    np.testing.assert_allclose(grid.features, np.reshape(means, (-1, 4)), atol=1e-6)
    expected = [-1 if cell is None else cells.index(cell) for cell in place]
    assert grid.voxel_of_point.tolist() == expected


def test_a_grid_that_sees_nothing_is_empty() -> None:
    grid = voxelize_grid(np.array([[100.0, 0, 0, 7]], np.float32))
    assert grid.features.shape == (0, 4)
    assert grid.indices.shape == (0, 3)
    assert grid.voxel_of_point.tolist() == [-1]
    assert len(voxelize_grid(np.zeros((0, 4), np.float32))) == 0


def test_a_grid_needs_intensities() -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 4\)"):
        voxelize_grid(np.zeros((2, 3)))
