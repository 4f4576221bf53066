"""A closed azimuth: kernels reach across the seam, so that turning a cloud turns its features."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidr.config import ConfigError, check, decode
from slidr.models.minkunet import MinkUNet14
from slidr.models.students import build_student
from slidr.ops.voxelize import voxelize
from slidr.sparse import Convolution, CoordinateError, CoordinateManager, SparseTensor

CELLS = 48


def ring(seed: int = 0, cells: int = CELLS, voxels: int = 300, clouds: int = 2) -> torch.Tensor:
    """Distinct voxels [batch, rho, azimuth, z] with azimuths in [-cells / 2, cells / 2)."""
    low, high = (0, 0, -(cells // 2), -4), (clouds, 6, cells - cells // 2, 4)
    drawn = np.random.default_rng(seed).integers(low, high, (voxels, 4))
    return torch.from_numpy(np.unique(drawn, axis=0).astype(np.int32))


def turned(coordinates: torch.Tensor, by: int, cells: int = CELLS) -> torch.Tensor:
    azimuth = (coordinates[:, 2] + by + cells // 2) % cells - cells // 2
    return torch.stack([coordinates[:, 0], coordinates[:, 1], azimuth, coordinates[:, 3]], dim=1)


@pytest.fixture(scope="module")
def unet() -> MinkUNet14:
    torch.manual_seed(0)
    return MinkUNet14(2, 6, width=0.25, azimuth_cells=CELLS).double().eval()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([1, 2, 3, 8]), st.sampled_from([(3, 3, 3), (1, 5, 3)]))
def test_a_closed_map_equals_a_dictionary_lookup_modulo_the_circle(seed: int, cells: int, kernel: Any) -> None:
    cloud = ring(seed, cells, voxels=60)
    found = CoordinateManager(cloud, around=cells).submanifold((1, 1, 1), kernel)
    row_of = {(b, r, a % cells, z): row for row, (b, r, a, z) in enumerate(cloud.tolist())}
    reach = [range(-(k // 2), k // 2 + 1) for k in kernel]
    offsets = [(x, y, z) for z in reach[2] for y in reach[1] for x in reach[0]]
    expected = {
        (k, row_of[b, r + x, (a + y) % cells, h + z], o)
        for o, (b, r, a, h) in enumerate(cloud.tolist())
        for k, (x, y, z) in enumerate(offsets)
        if (b, r + x, (a + y) % cells, h + z) in row_of
    }
    offset = np.repeat(np.arange(len(found.counts)), found.counts).tolist()
    pairs = list(zip(offset, found.input_rows.tolist(), found.output_rows.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == expected


@torch.no_grad()
@pytest.mark.parametrize("by", [1, 7, 24, 47])
def test_turning_by_whole_cells_leaves_a_stride_1_layer_unchanged(by: int) -> None:
    coordinates, layer = ring(), Convolution(9, 5).double()
    features = torch.randn(len(coordinates), 9, dtype=torch.float64)
    plain = layer(SparseTensor(features, coordinates, CELLS)).features
    torch.testing.assert_close(layer(SparseTensor(features, turned(coordinates, by), CELLS)).features, plain)
    open_ended = layer(SparseTensor(features, turned(coordinates, by))).features
    assert not torch.allclose(open_ended, layer(SparseTensor(features, coordinates)).features), (
        "without it there is a seam"
    )


@torch.no_grad()
@pytest.mark.parametrize("turns", [1, 2])
def test_turning_by_the_total_stride_leaves_the_whole_network_unchanged(unet: MinkUNet14, turns: int) -> None:
    coordinates = ring()
    features = torch.randn(len(coordinates), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = unet(SparseTensor(features, coordinates))
    moved = unet(SparseTensor(features, turned(coordinates, 16 * turns)))
    torch.testing.assert_close(moved.features, plain.features)
    assert torch.equal(plain.coordinates.int(), coordinates), "rows and coordinates stay as given"


@torch.no_grad()
def test_a_turned_point_cloud_gets_the_same_features_point_by_point(unet: MinkUNet14) -> None:
    degrees = 360 / CELLS
    cells = ring(clouds=1)[:, 1:].numpy() + 0.5  # points at the cells' centres
    features = []
    for turn in (0.0, 16 * degrees):
        angle = np.radians(cells[:, 1] * degrees + turn)
        points = np.stack([cells[:, 0] * np.cos(angle), cells[:, 0] * np.sin(angle), cells[:, 2]], axis=1)
        voxels = voxelize(points, (1.0, degrees, 1.0), azimuth_wrap=True)
        rows = np.insert(voxels.coordinates, 0, 0, axis=1)
        intensity = torch.linspace(0, 1, len(points), dtype=torch.float64)[:, None].repeat(1, 2)
        out = unet(SparseTensor(intensity[voxels.point_of_voxel], torch.from_numpy(rows))).features
        features.append(out[voxels.voxel_of_point])
    torch.testing.assert_close(*features)


def test_cells_that_coincide_on_the_circle_are_refused_with_their_count() -> None:
    coordinates = torch.tensor([[0, 1, -24, 1], [0, 1, 24, 1]], dtype=torch.int32)
    with pytest.raises(CoordinateError, match="1 of 2 rows repeat"):
        SparseTensor(torch.zeros(2, 1), coordinates, around=CELLS)


def test_a_circle_that_the_stride_does_not_divide_is_refused() -> None:
    for cells in (360, 0, -16):
        with pytest.raises(ValueError, match=f"azimuth_cells {cells}, expected a multiple of its stride, 16"):
            MinkUNet14(1, 4, width=0.25, azimuth_cells=cells)
    manager = CoordinateManager(ring(), 360)
    with pytest.raises(CoordinateError, match="360 azimuth cells do not divide by stride 16"):
        manager.downsample((1, 1, 1), (16, 16, 16))


def test_window_convolutions_have_no_azimuth() -> None:
    with pytest.raises(CoordinateError, match="has no azimuth"):
        CoordinateManager(ring(), CELLS).window((1, 1, 1), (3, 3, 3), (2, 2, 2), (1, 1, 1), (64, 64, 64))


@pytest.mark.skipif(importlib.util.find_spec("MinkowskiEngine") is None, reason="MinkowskiEngine is not installed")
def test_minkowski_refuses_a_closed_azimuth() -> None:
    coordinates = ring()
    model = MinkUNet14(1, 4, width=0.25, engine="minkowski", azimuth_cells=CELLS)
    with pytest.raises(ValueError, match="across the azimuth's seam; use engine='torch'"):
        model(SparseTensor(torch.zeros(len(coordinates), 1), coordinates))


def test_the_config_closes_the_students_azimuth() -> None:
    config = decode({"data": {"voxel": {"azimuth_wrap": True, "size": [0.1, 1.125, 0.1]}}})
    student = build_student(
        replace(config.student, name="minkunet14", width=0.25), azimuth_cells=config.data.voxel.azimuth_cells
    )
    assert student.azimuth_cells == 320


@pytest.mark.parametrize(
    ("voxel", "student", "message"),
    [
        ({"size": [0.1, 1.0, 0.1]}, {}, "data.voxel.azimuth_wrap: needs a multiple of 16 .* set 1.125"),
        ({"size": [0.1, 1.1, 0.1]}, {}, "data.voxel.azimuth_wrap: needs a multiple of 16"),
        ({"size": [0.1, 1.125, 0.1]}, {"engine": "minkowski"}, "azimuth_wrap: .* set student.engine: torch"),
    ],
)
def test_a_config_whose_azimuth_cannot_close_is_refused(voxel: Any, student: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(decode({"data": {"voxel": {"azimuth_wrap": True, **voxel}}, "student": student}))
