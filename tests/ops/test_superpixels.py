from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slidr.config import SlicEngine
from slidr.ops import superpixels
from slidr.ops.superpixels import slic
from slidr.types import CAMERA_CHANNELS


@pytest.mark.parametrize("engine", ["compiled", "scikit-image"])
@pytest.mark.parametrize("channel", CAMERA_CHANNELS)
def test_labels_of_the_real_images_are_the_originals(
    golden: Path, real_nuscenes: Path, keyframe: dict[str, dict[str, Any]], channel: str, engine: SlicEngine
) -> None:
    labels = slic(np.array(Image.open(real_nuscenes / keyframe[channel]["filename"])), engine=engine)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, np.array(Image.open(golden / "slic" / f"{channel}.png")))


def test_more_than_255_superpixels_keep_apart() -> None:
    ramp = np.add.outer(np.arange(120), np.arange(160)) / 2
    labels = slic(np.stack([ramp, ramp, 255 - ramp], axis=2).astype(np.uint8), segments=400)
    used = np.unique(labels)
    assert len(used) > 256
    np.testing.assert_array_equal(used, np.arange(len(used)))


def test_an_image_of_one_colour_is_cut_too() -> None:
    labels = slic(np.full((60, 80, 3), 127, np.uint8), segments=12)
    assert 1 < len(np.unique(labels)) <= 12


def test_labels_beyond_uint16_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def many(image: np.ndarray, **_: Any) -> np.ndarray:
        return np.arange(image.shape[0] * image.shape[1]).reshape(image.shape[:2])

    monkeypatch.setattr(superpixels.segmentation, "slic", many)
    assert slic(np.zeros((256, 256, 3), np.uint8), engine="scikit-image").max() == 65535
    with pytest.raises(ValueError, match="65792 labels do not fit uint16"):
        slic(np.zeros((257, 256, 3), np.uint8), engine="scikit-image")


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((0, 8, 3), np.uint8)]
)
def test_anything_but_an_rgb_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected \(H, W, 3\) uint8"):
        slic(image)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 50), (3, 3)])
@pytest.mark.parametrize("segments", [1, 2, 3, 65535])
@pytest.mark.parametrize("sigma", [0.0, 3.0])
def test_the_smallest_images_and_counts_work(shape: tuple[int, int], segments: int, sigma: float) -> None:
    labels = slic(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8), segments, 6.0, sigma)
    assert labels.shape == shape
    assert labels.max() < shape[0] * shape[1]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("segments", (0, -1, 65536)),
        ("compactness", (0.0, -1.0, math.nan, math.inf)),
        ("sigma", (-1.0, math.nan, math.inf, 1e9)),
    ],
)
def test_parameters_that_slic_cannot_work_with_are_refused_by_name(name: str, values: tuple[float, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"slic: {name}: expected .*, got {value}"):
            slic(np.zeros((8, 8, 3), np.uint8), **{name: value})  # type: ignore[arg-type]


def test_the_compiled_engine_runs_here() -> None:
    assert superpixels.compiled_agrees()


@st.composite
def images(draw: st.DrawFn) -> np.ndarray:
    """Noise, one colour, two colours, grey, 16 colours, gradients; one pixel wide or high, too."""
    height, width = draw(st.integers(1, 48)), draw(st.integers(1, 48))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "constant", "two", "grey", "sixteen", "gradient"]))
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "grey":
        return np.repeat(rng.integers(0, 256, (height, width, 1), np.uint8), 3, axis=2)
    if kind == "gradient":
        rows, columns = np.mgrid[:height, :width]
        return np.stack([rows, columns, rows + columns], axis=2).astype(np.uint8)
    colours = rng.integers(0, 256, ({"constant": 1, "two": 2, "sixteen": 16}[kind], 3), np.uint8)
    return colours[rng.integers(0, len(colours), (height, width))]


@settings(max_examples=150)
@given(
    images(),
    st.one_of(st.integers(1, 300), st.integers(1, 60_000)),
    st.sampled_from([0.1, 1.0, 6.0, 10.0, 100.0]),
    st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 12.0]),
)
def test_compiled_labels_equal_scikit_images(
    image: np.ndarray, segments: int, compactness: float, sigma: float
) -> None:
    np.testing.assert_array_equal(
        slic(image, segments, compactness, sigma, "compiled"), slic(image, segments, compactness, sigma, "scikit-image")
    )


def test_compiled_labels_of_a_larger_image_with_many_segments_equal_scikit_images() -> None:
    noise = np.random.default_rng(3).integers(0, 256, (30, 40, 3), np.uint8)
    image = np.array(Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC))
    for segments in (1, 7, 900, 20_000):
        np.testing.assert_array_equal(
            slic(image, segments, engine="compiled"), slic(image, segments, engine="scikit-image")
        )


@pytest.mark.parametrize("differ", [True, False])
def test_scikit_image_is_used_where_the_compiled_engine_is_missing_or_differs(
    monkeypatch: pytest.MonkeyPatch, differ: bool
) -> None:
    image = np.random.default_rng(5).integers(0, 256, (40, 50, 3), np.uint8)
    expected = slic(image, 20, engine="scikit-image")
    if differ:
        monkeypatch.setattr(superpixels, "_compiled", lambda image, *_: np.zeros(image.shape[:2], np.int32))
    else:
        monkeypatch.setitem(sys.modules, "numba", None)
    superpixels.compiled_agrees.cache_clear()
    try:
        np.testing.assert_array_equal(slic(image, 20), expected)
        assert not superpixels.compiled_agrees()
    finally:
        superpixels.compiled_agrees.cache_clear()


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown engine 'gpu'; expected one of \['compiled', 'scikit-image'\]"):
        slic(np.zeros((8, 8, 3), np.uint8), engine="gpu")  # type: ignore[arg-type]
