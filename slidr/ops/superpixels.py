"""Superpixels of an image; the only module that imports scikit-image."""

from __future__ import annotations

import math
from functools import cache
from typing import get_args

import numpy as np
from skimage import color, segmentation, util
from skimage.color.colorconv import xyz_from_rgb

from slidr.config.schema import SlicEngine
from slidr.shapes import Float64, Int32, UInt8, UInt16
from slidr.urls import redacting_logger

MAX_LABELS = 2**16
MAX_SIGMA = 1000.0  # pixels; a wider filter would take more memory than the image
HEAP_PER_PIXEL = 250  # bytes that scikit-image's `slic` takes at its peak, measured; the compiled engine takes less
ITERATIONS = 10  # of k-means
SMALLEST, LARGEST = 0.5, 3  # of a connected region, in parts of the mean superpixel
_ROWS = 16  # of an image that are converted to Lab together
_log = redacting_logger(__name__)


def slic(
    image: UInt8[np.ndarray, "H W 3"],
    segments: int = 150,
    compactness: float = 6.0,
    sigma: float = 3.0,
    engine: SlicEngine = "compiled",
) -> UInt16[np.ndarray, "H W"]:
    """SLIC superpixels (Achanta et al., 2012) of an RGB image: a label per pixel, counted from 0.

    The labels are scikit-image's own, whichever engine computes them: "compiled" runs the same arithmetic in vectors
    and falls back to "scikit-image" where numba is missing or a first comparison of both differs. `segments` is how
    many are asked for (somewhat fewer come out), `compactness` weighs nearness against likeness of colour, `sigma` is
    the width of the Gaussian smoothing in pixels. Raises `ValueError` for anything but an H x W x 3 uint8 image,
    parameters that SLIC cannot work with, an unknown engine, and where the labels do not fit uint16.
    """
    _check_parameters(segments, compactness, sigma)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"slic: got an image of shape {image.shape} and type {image.dtype}; expected (H, W, 3) uint8, RGB"
        )
    if engine not in get_args(SlicEngine):
        raise ValueError(f"slic: unknown engine {engine!r}; expected one of {list(get_args(SlicEngine))}")
    compiled = engine == "compiled" and compiled_agrees()
    labels = (_compiled if compiled else _reference)(image, segments, compactness, sigma)
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


@cache
def compiled_agrees() -> bool:
    """The compiled engine can be used here: numba is installed, and its labels of a small image are scikit-image's.

    Another build of scikit-image may round in another way (on processors whose compiler fuses multiplications with
    additions, say); its labels are the ones that count. The answer is kept for the life of the process.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        _log.info("superpixels: numba cannot be imported (%s); scikit-image computes them, more slowly", error)
        return False
    rows, columns = np.mgrid[:48, :64]
    noise = np.random.default_rng(0).integers(0, 40, (48, 64, 3))
    image = (np.stack([4 * rows, 3 * columns, rows * columns % 200], axis=2) + noise).clip(0, 255).astype(np.uint8)
    same = bool((_compiled(image, 12, 6.0, 1.5) == _reference(image, 12, 6.0, 1.5)).all())
    if not same:
        _log.warning("superpixels: the compiled engine differs from this build of scikit-image, which is used instead")
    return same


def _reference(
    image: UInt8[np.ndarray, "H W 3"], segments: int, compactness: float, sigma: float
) -> Int32[np.ndarray, "H W"]:
    labels = segmentation.slic(
        image, n_segments=segments, compactness=compactness, sigma=sigma, start_label=0, channel_axis=-1
    )
    return labels.astype(np.int32)


def _compiled(
    image: UInt8[np.ndarray, "H W 3"], segments: int, compactness: float, sigma: float
) -> Int32[np.ndarray, "H W"]:
    from slidr.ops import slic_kernels

    height, width = image.shape[:2]
    planes = _lab(image)
    if sigma > 0:
        slic_kernels.blur(planes, _gaussian_weights(sigma))
    planes *= 1.0 / compactness
    rows, columns = util.regular_grid((1, height, width), segments)[1:]
    grid = np.mgrid[:height, :width][:, rows, columns].reshape(2, -1)
    centres = np.zeros((grid.shape[1], 5))
    centres[:, :2] = grid.T
    # scikit-image keeps the step in single precision, and looks as far as the grid of the centres that there are.
    step = np.float32(max(_step(rows), _step(columns), 1))
    look = util.regular_grid((1, height, width), len(centres))
    nearest = slic_kernels.kmeans(planes, centres, _step(look[1]), _step(look[2]), 1.0 / float(step * step), ITERATIONS)
    size = math.prod((1, height, width)) / len(centres)
    return slic_kernels.connected(nearest, int(SMALLEST * size), int(LARGEST * size))


def _step(part: slice) -> int:
    return 1 if part.step is None else int(part.step)


def _gaussian_weights(sigma: float) -> Float64[np.ndarray, " R"]:
    """One half of the Gaussian kernel, from its centre on, as scipy's `gaussian_filter` makes it."""
    radius = int(4.0 * float(sigma) + 0.5)
    places = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 / (sigma * sigma) * places**2)
    return (weights / weights.sum())[radius:]


def _lab(image: UInt8[np.ndarray, "H W 3"]) -> Float64[np.ndarray, "3 H W"]:
    """CIE Lab of an image whose range is stretched to [0, 1], as scikit-image's `slic` and `rgb2lab` compute it.

    A byte has 256 values, so the gamma is a table. Some rows at a time, which fit the cache.
    """
    levels = util.img_as_float(np.arange(256, dtype=np.uint8))
    low, high = levels[image.min()], levels[image.max()]
    levels = (levels - low).clip(min=0)  # no pixel has a level below the lowest
    if high != low:
        levels = levels / (high - low)
    linear = np.where(levels > 0.04045, np.power((levels + 0.055) / 1.055, 2.4), levels / 12.92)
    matrix = xyz_from_rgb.T.astype(np.float64)
    white = color.xyz_tristimulus_values(illuminant="D65", observer="2", dtype=np.float64)
    lab = np.empty((3, *image.shape[:2]))
    for first in range(0, len(image), _ROWS):
        xyz = linear[image[first : first + _ROWS]] @ matrix
        xyz /= white
        x, y, z = np.moveaxis(np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16.0 / 116.0), -1, 0)
        part = lab[:, first : first + _ROWS]
        part[0] = 116.0 * y - 16.0
        part[1] = 500.0 * (x - y)
        part[2] = 200.0 * (y - z)
    return lab
