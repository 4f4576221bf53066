"""How many labels a superpixel map may hold: a bound that needs no image and no scikit-image."""

from __future__ import annotations

import math


def most_labels(height: int, width: int, segments: int) -> int:
    """The most labels that `slidr.ops.superpixels.slic` gives an image when asked for so many `segments`.

    SLIC starts from a regular grid of about `segments` centres (on small images more: the step is a whole number) and
    afterwards keeps every connected region of at least half a mean superpixel, so twice the grid's count is possible.

    >>> most_labels(900, 1600, 150)
    288
    """
    pixels = height * width
    smallest = max(1, int(0.5 * (pixels / _grid_points(height, width, segments))))
    return max(1, pixels // smallest)


def _grid_points(height: int, width: int, segments: int) -> int:
    """The centres of scikit-image's `regular_grid((1, height, width), segments)`."""
    sizes = sorted((1, height, width))
    space = float(math.prod(sizes))
    if space <= segments:
        return int(space)
    steps = [(space / segments) ** (1 / 3)] * 3
    if any(size < step for size, step in zip(sizes, steps, strict=True)):
        for axis in range(3):
            steps[axis] = sizes[axis]
            rest = float(math.prod(sizes[axis + 1 :]))
            if axis < 2:
                steps[axis + 1 :] = [(rest / segments) ** (1 / (2 - axis))] * (2 - axis)
            if all(size >= step for size, step in zip(sizes, steps, strict=True)):
                break
    return math.prod(len(range(int(step // 2), size, round(step))) for size, step in zip(sizes, steps, strict=True))
