"""Superpixels of an image; the only module that imports scikit-image."""

from __future__ import annotations

import math

import numpy as np
from skimage import segmentation

from slidr.shapes import UInt8, UInt16

MAX_LABELS = 2**16
MAX_SIGMA = 1000.0  # pixels; a wider filter would take more memory than the image
HEAP_PER_PIXEL = 250  # bytes that `slic` takes at its peak, measured


def slic(
    image: UInt8[np.ndarray, "H W 3"], segments: int = 150, compactness: float = 6.0, sigma: float = 3.0
) -> UInt16[np.ndarray, "H W"]:
    """SLIC superpixels (Achanta et al., 2012) of an RGB image: a label per pixel, counted from 0.

    The labels are scikit-image's own. `segments` is how many are asked for (somewhat fewer come out),
    `compactness` weighs nearness against likeness of colour, `sigma` is the width of the Gaussian smoothing
    in pixels. Raises `ValueError` for anything but an H x W x 3 uint8 image, for parameters that SLIC cannot
    work with, and where the labels do not fit uint16.
    """
    _check_parameters(segments, compactness, sigma)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"slic: got an image of shape {image.shape} and type {image.dtype}; expected (H, W, 3) uint8, RGB"
        )
    labels = segmentation.slic(
        image, n_segments=segments, compactness=compactness, sigma=sigma, start_label=0, channel_axis=-1
    )
    highest = int(labels.max())
    if highest >= MAX_LABELS:
        raise ValueError(f"slic: {highest + 1} labels do not fit uint16; ask for fewer segments (got {segments})")
    return labels.astype(np.uint16)


def _check_parameters(segments: int, compactness: float, sigma: float) -> None:
    """scikit-image divides by some of these, and makes labels of NaN without an error."""
    if not 1 <= segments < MAX_LABELS:
        raise ValueError(f"slic: segments: expected 1 to {MAX_LABELS - 1}, got {segments}")
    if not 0 < compactness < math.inf:
        raise ValueError(f"slic: compactness: expected a finite number above 0, got {compactness}")
    if not 0 <= sigma <= MAX_SIGMA:
        raise ValueError(f"slic: sigma: expected 0 to {MAX_SIGMA:g} pixels, got {sigma}")
