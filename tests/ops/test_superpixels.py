from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slidr.ops import superpixels
from slidr.ops.superpixels import slic
from slidr.types import CAMERA_CHANNELS


@pytest.mark.parametrize("channel", CAMERA_CHANNELS)
def test_labels_of_the_real_images_are_the_originals(
    golden: Path, real_nuscenes: Path, keyframe: dict[str, dict[str, Any]], channel: str
) -> None:
    labels = slic(np.array(Image.open(real_nuscenes / keyframe[channel]["filename"])))
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
    assert slic(np.zeros((256, 256, 3), np.uint8)).max() == 65535
    with pytest.raises(ValueError, match="65792 labels do not fit uint16"):
        slic(np.zeros((257, 256, 3), np.uint8))


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
