"""The bound on a map's labels holds for every map that scikit-image makes."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.util import regular_grid

from slidr.ops.label_count import _grid_points, most_labels
from slidr.ops.superpixels import slic


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 500))
def test_the_grid_is_scikit_images(height: int, width: int, segments: int) -> None:
    grid = np.zeros((1, height, width))[regular_grid((1, height, width), segments)]
    assert _grid_points(height, width, segments) == grid.size


@pytest.mark.parametrize(("height", "width", "segments", "points"), [(900, 1600, 150, 144), (370, 1224, 200, 208)])
def test_the_grid_of_real_sizes(height: int, width: int, segments: int, points: int) -> None:
    assert _grid_points(height, width, segments) == points
    assert np.zeros((1, height, width))[regular_grid((1, height, width), segments)].size == points


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 300), st.sampled_from([0.01, 1.0, 6.0]), st.booleans(),
    st.integers(0, 9),
)  # fmt: skip
def test_no_image_gets_more_labels(h: int, w: int, segments: int, compactness: float, smooth: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (h, w, 3), np.uint8) // (64 if smooth else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = slic(image, segments, compactness, sigma=float(seed % 3))
    assert labels.max() < most_labels(h, w, segments)
