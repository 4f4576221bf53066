"""Sweeps with values that no lidar gives, or of another data set, are refused by path and value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from slidr.config import DataConfig, DatasetName
from slidr.data.samples import read_cloud
from slidr.data.storage import DataError
from slidr.data.sweeps import FORMATS, read_points
from slidr.types import Frame


def _sweep(dataset: DatasetName, points: int = 40) -> np.ndarray:
    """A made-up sweep: x, y, z, intensity and, for nuScenes, the beam."""
    rng = np.random.default_rng(points)
    rows = FORMATS[dataset]
    sweep = np.zeros((points, rows.columns), np.float32)
    sweep[:, :3] = rng.normal(0, 20, (points, 3))
    sweep[:, 3] = np.round(rng.uniform(0, rows.brightest, points), 2)
    if rows.columns == 5:
        sweep[:, 3:] = np.round(sweep[:, 3:])
        sweep[:, 4] = np.arange(points) % 32
    return sweep


def _written(path: Path, sweep: np.ndarray) -> str:
    path.write_bytes(sweep.astype(np.float32).tobytes())
    return str(path)


def test_every_data_set_has_a_format() -> None:
    assert set(FORMATS) == set(get_args(DatasetName))


@pytest.mark.parametrize("dataset", ["nuscenes", "semantic_kitti"])
def test_points_and_intensity_come_back(tmp_path: Path, dataset: DatasetName) -> None:
    sweep = _sweep(dataset)
    points, intensity = read_points(_written(tmp_path / "s.bin", sweep), dataset)
    np.testing.assert_array_equal(points, sweep[:, :3])
    np.testing.assert_array_equal(intensity, sweep[:, 3] + np.float32(dataset == "semantic_kitti"))
    assert (points.dtype, intensity.dtype) == (np.float32, np.float32)
    assert points.flags.writeable
    one = read_points(_written(tmp_path / "one.bin", sweep[:1]), dataset)[0]
    assert (one.shape, one.flags.writeable) == ((1, 3), True)


@pytest.mark.parametrize(
    ("dataset", "column", "value", "message"),
    [
        ("nuscenes", 0, 1e30, r"1 of 40 points are farther than 10000 m: point 7 has x = 1e\+30"),
        ("nuscenes", 1, -2e4, r"1 of 40 points are farther than 10000 m: point 7 has y = -20000"),
        ("nuscenes", 2, np.nan, "1 of 40 points are not finite"),
        ("nuscenes", 3, np.inf, "1 of 40 points are not finite"),
        ("nuscenes", 3, 1e30, r"1 of 40 points have intensity outside 0 to 255: point 7 has 1e\+30"),
        ("nuscenes", 3, -1, "1 of 40 points have intensity outside 0 to 255: point 7 has -1"),
        ("nuscenes", 3, 256, "1 of 40 points have intensity outside 0 to 255: point 7 has 256"),
        ("semantic_kitti", 2, 1e30, r"1 of 40 points are farther than 10000 m: point 7 has z = 1e\+30"),
        ("semantic_kitti", 3, 1.5, "1 of 40 points have remission outside 0 to 1: point 7 has 1.5"),
        ("semantic_kitti", 3, -0.5, "1 of 40 points have remission outside 0 to 1: point 7 has -0.5"),
    ],
)
def test_values_that_no_lidar_gives_are_refused(
    tmp_path: Path, dataset: DatasetName, column: int, value: float, message: str
) -> None:
    sweep = _sweep(dataset)
    sweep[7, column] = value
    path = _written(tmp_path / "s.bin", sweep)
    with pytest.raises(DataError, match=rf"s\.bin: {message}; is it a sweep of {dataset}\? Else copy the file again"):
        read_points(path, dataset)


def test_a_flipped_exponent_bit_of_a_real_sweep_is_refused(
    real_frame: Frame, real_nuscenes: Path, tmp_path: Path
) -> None:
    data = bytearray((real_nuscenes / real_frame.lidar_path).read_bytes())
    x = np.frombuffer(bytes(data), np.float32)[::5]
    data[20 * int(np.flatnonzero(np.abs(x) < 1)[0]) + 3] ^= 0x40  # the highest bit of the exponent of a small x
    frame = replace(real_frame, lidar_path="s.bin")
    (tmp_path / "s.bin").write_bytes(data)
    with pytest.raises(DataError, match=r"s\.bin: 1 of 34688 points are (farther|not finite).* sweep of nuscenes"):
        read_cloud(frame, DataConfig(root=str(tmp_path)))


@pytest.mark.parametrize("points", [40, 41, 42, 43, 44, 45])
def test_four_and_five_columns_are_told_apart_whatever_the_size(tmp_path: Path, points: int) -> None:
    five = _written(tmp_path / "five.bin", _sweep("nuscenes", points))
    four = _written(tmp_path / "four.bin", _sweep("semantic_kitti", points))
    with pytest.raises(DataError, match=r"five\.bin: is not a sweep of semantic_kitti: its \d+ bytes fit 5 float32"):
        read_points(five, "semantic_kitti")
    with pytest.raises(DataError, match=r"four\.bin: is not a sweep of nuscenes: its \d+ bytes fit 4 float32 a point"):
        read_points(four, "nuscenes")


def test_real_sweeps_read_with_the_columns_of_another_data_set_are_refused(
    real_frame: Frame, real_nuscenes: Path, real_semantic_kitti: Path
) -> None:
    nuscenes = real_nuscenes / real_frame.lidar_path
    scans = sorted((real_semantic_kitti / "sequences/00/velodyne").glob("*.bin"))
    assert nuscenes.stat().st_size % 16 == 0  # both fit the size
    assert any(scan.stat().st_size % 20 == 0 for scan in scans)
    assert len(read_points(nuscenes, "nuscenes")[0]) == 34_688
    with pytest.raises(DataError, match="is not a sweep of semantic_kitti: its 693760 bytes fit 5 float32 a point"):
        read_points(nuscenes, "semantic_kitti")
    for scan in scans:
        assert len(read_points(scan, "semantic_kitti")[0]) > 120_000
        with pytest.raises(DataError, match=r"is not a sweep of nuscenes: its \d+ bytes fit 4 float32 a point"):
            read_points(scan, "nuscenes")


def test_a_fifth_column_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    sweep = _sweep("nuscenes")
    sweep[:, 4] = np.linspace(0, 0.1, len(sweep))  # seconds
    assert len(read_points(_written(tmp_path / "s.bin", sweep), "nuscenes")[0]) == len(sweep)


def test_a_cut_sweep_is_truncated_and_an_empty_one_empty(tmp_path: Path) -> None:
    cut = tmp_path / "cut.bin"
    cut.write_bytes(_sweep("nuscenes").tobytes()[:-3])
    with pytest.raises(DataError, match=r"cut\.bin: truncated: 797 bytes are not a whole number of points of 20 bytes"):
        read_points(cut, "nuscenes")
    cut.write_bytes(b"")
    with pytest.raises(DataError, match=r"cut\.bin: is empty, a sweep of no points"):
        read_points(cut, "nuscenes")
