"""Sensors' files: what is damaged is an error that names the file and what it holds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from slidr.data import images
from slidr.data.storage import DataError


@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_label_map_survives_its_png(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("maps") / "map.png"
    path.write_bytes(images.encode_label_map(labels))
    read = images.read_label_map(path)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, labels)


@pytest.mark.parametrize(("highest", "mode"), [(255, "L"), (256, "I;16"), (65535, "I;16")])
def test_a_label_map_is_as_wide_as_its_labels_need(highest: int, mode: str) -> None:
    png = images.encode_label_map(np.array([[0, highest]], np.uint16))
    assert Image.open(io.BytesIO(png)).mode == mode


def test_an_image_of_colours_is_no_label_map(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: expected one channel"):
        images.read_label_map(tmp_path / "x.png")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -3])
def test_a_truncated_image_is_refused_by_name(tmp_path: Path, keep: float) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, format="JPEG")
    data = whole.getvalue()
    end = int(keep * len(data)) if isinstance(keep, float) else keep
    (tmp_path / "x.jpg").write_bytes(data[:end])
    reason = "the file is empty" if end == 0 else "(?i:.*truncated)"
    with pytest.raises(DataError, match=rf"x\.jpg: is no whole image \({reason}"):
        images.read_image(tmp_path / "x.jpg")


def test_a_file_that_is_no_image_is_refused_without_naming_a_buffer(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"x\.jpg: is no whole image \(6 bytes of no known format\)"):
        images.read_image(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"x\.jpg: is no image \(6 bytes of no known format\)"):
        images.image_size(b"<html>", "x.jpg")


def test_a_grey_image_is_read_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (3, 2), 7).save(tmp_path / "x.png")
    image = images.read_image(tmp_path / "x.png")
    assert image.shape == (2, 3, 3)
    assert image.dtype == np.uint8
    assert (image == 7).all()


@pytest.mark.parametrize(("columns", "size"), [(5, 20), (4, 16)])
def test_a_sweep_of_no_whole_number_of_points_is_refused(tmp_path: Path, columns: int, size: int) -> None:
    cloud = np.random.default_rng(0).normal(size=(7, columns)).astype(np.float32)
    path = tmp_path / "x.bin"
    path.write_bytes(cloud.tobytes())
    np.testing.assert_array_equal(images.read_sweep(path, columns), cloud)
    path.write_bytes(cloud.tobytes()[:-3])
    with pytest.raises(DataError, match=rf"x\.bin: truncated: {7 * size - 3} bytes .* {size} bytes"):
        images.read_sweep(path, columns)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.bin: is empty"):
        images.read_sweep(path, columns)


def test_labels_of_another_number_of_points_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(range(6)))
    assert images.read_point_labels(path, np.uint8, 6).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"x\.bin: holds 6 labels for a sweep of 7 points"):
        images.read_point_labels(path, np.uint8, 7)
    with pytest.raises(DataError, match=r"holds 1\.5 labels for a sweep of 6 points"):
        images.read_point_labels(path, np.uint32, 6)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read \(No such file"):
        images.read_image(tmp_path / "gone.jpg")
