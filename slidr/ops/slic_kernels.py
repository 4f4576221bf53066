"""SLIC's loops, compiled by numba: k-means and connectivity, bit for bit as scikit-image computes them.

Distances of neighbouring pixels to a centre are independent of each other, so they are computed in vectors; every sum
keeps scikit-image's order, and no multiplication is fused with an addition. `slidr.ops.superpixels` prepares the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

from slidr.shapes import Float64, Int32, Int64

F = TypeVar("F", bound=Callable[..., Any])
_LARGEST = np.finfo(np.float64).max
_BLOCK = 64  # pixels of a row that skip a centre together


def _compiled(function: F) -> F:
    """`function`, compiled when it is first called and kept on disk where a folder can be written."""
    options: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba finds no folder for its cache
        return njit(**options)(function)


@_compiled
def blur(planes: Float64[np.ndarray, "C H W"], weights: Float64[np.ndarray, " R"]) -> None:
    """Smooths every plane in place: along a third axis of one pixel, along columns, then along rows.

    ``weights[0]`` is the kernel's centre, ``weights[r]`` that of both neighbours at distance r; beyond an edge the
    image is mirrored. The terms are added from the farthest to the nearest, as scipy's `correlate1d` does.
    """
    channels, height, width = planes.shape
    radius = len(weights) - 1
    source = np.empty((height, width))
    row, total = np.empty(width + 2 * radius), np.empty(width)
    for c in range(channels):
        plane = planes[c]
        for y in range(height):
            line, out = plane[y], source[y]
            for x in range(width):
                out[x] = line[x] * weights[0]
            for r in range(radius, 0, -1):
                weight = weights[r]
                for x in range(width):
                    out[x] += (line[x] + line[x]) * weight
        for y in range(height):
            line, out = source[y], plane[y]
            for x in range(width):
                total[x] = line[x] * weights[0]
            for r in range(radius, 0, -1):
                above, below = source[_mirrored(y - r, height)], source[_mirrored(y + r, height)]
                weight = weights[r]
                for x in range(width):
                    total[x] += (above[x] + below[x]) * weight
            row[radius : radius + width] = total
            for r in range(1, radius + 1):
                row[radius - r] = total[_mirrored(-r, width)]
                row[radius + width - 1 + r] = total[_mirrored(width - 1 + r, width)]
            for x in range(width):
                out[x] = total[x] * weights[0]
            for r in range(radius, 0, -1):
                left, right = row[radius - r : radius - r + width], row[radius + r : radius + r + width]
                weight = weights[r]
                for x in range(width):
                    out[x] += (left[x] + right[x]) * weight


@_compiled
def _mirrored(place: int, length: int) -> int:
    """The place inside a line of `length` that its mirror images beyond both ends show."""
    place = place % (2 * length)
    return place if place < length else 2 * length - 1 - place


@_compiled
def kmeans(
    planes: Float64[np.ndarray, "3 H W"],
    centres: Float64[np.ndarray, "K 5"],
    step_y: int,
    step_x: int,
    spatial_weight: float,
    iterations: int,
) -> Int32[np.ndarray, "H W"]:
    """The nearest centre of every pixel after `iterations` rounds; -1 where no centre's window reaches.

    `planes` are the colour channels. `centres` (row, column, colour) start at a grid and are changed in place. A
    centre looks two steps far. Of equally near centres a pixel takes the first.

    The nearest centre does not depend on the order of the comparisons, so every row begins with the centres that are
    nearest to it, and a block of pixels skips a centre that is too far already in space: rounding is monotonic, so
    the distance in space and colour is never less than the distance in space.
    """
    _, height, width = planes.shape
    count = len(centres)
    nearest = np.full((height, width), -1, np.int32)
    columns, labels = np.arange(width).astype(np.float64), np.empty(width, np.int64)
    distance = np.empty(width)
    bits = distance.view(np.int64)  # of numbers that are not negative: in the same order, and faster to compare
    farthest = np.empty((width + _BLOCK - 1) // _BLOCK)  # the largest distance in a block
    farthest_bits = farthest.view(np.int64)
    window = np.empty((4, count), np.int64)  # first and last row, first and last column
    sums, members = np.empty_like(centres), np.empty(count, np.int64)
    for _ in range(iterations):
        _windows(centres, window, height, width, step_y, step_x)
        order = np.argsort(centres[:, 0])
        rows = centres[order, 0]
        sums[:] = 0.0
        members[:] = 0
        for y in range(height):
            distance[:] = _LARGEST
            farthest[:] = _LARGEST
            labels[:] = nearest[y]
            above = np.searchsorted(rows, y) - 1
            below = above + 1
            while True:
                up = y - rows[above] if above >= 0 else np.inf
                down = rows[below] - y if below < count else np.inf
                if not min(up, down) <= 2 * step_y + 2:  # also where only centres without pixels are left
                    break
                if up <= down:
                    k = order[above]
                    above -= 1
                else:
                    k = order[below]
                    below += 1
                if window[0, k] <= y < window[1, k]:
                    _assign(
                        planes,
                        y,
                        window[2, k],
                        window[3, k],
                        k,
                        centres,
                        spatial_weight,
                        columns,
                        labels,
                        distance,
                        bits,
                        farthest,
                        farthest_bits,
                    )
            nearest[y] = labels
            _add_row(planes, y, nearest, sums, members)
        for k in range(count):
            for c in range(5):
                centres[k, c] = sums[k, c] / members[k]
    return nearest


@_compiled
def _windows(
    centres: Float64[np.ndarray, "K 5"],
    window: Int64[np.ndarray, "4 K"],
    height: int,
    width: int,
    step_y: int,
    step_x: int,
) -> None:
    for k in range(len(centres)):
        row, column = centres[k, 0], centres[k, 1]
        if row != row:  # a centre that lost all its pixels
            window[:, k] = 0
            continue
        window[0, k] = int(max(row - 2 * step_y, 0.0))
        window[1, k] = int(min(row + 2 * step_y + 1, float(height)))
        window[2, k] = int(max(column - 2 * step_x, 0.0))
        window[3, k] = int(min(column + 2 * step_x + 1, float(width)))


@_compiled
def _assign(
    planes: Float64[np.ndarray, "3 H W"],
    y: int,
    start: int,
    end: int,
    k: int,
    centres: Float64[np.ndarray, "K 5"],
    spatial_weight: float,
    columns: Float64[np.ndarray, " W"],
    labels: Int64[np.ndarray, " W"],
    distance: Float64[np.ndarray, " W"],
    bits: Int64[np.ndarray, " W"],
    farthest: Float64[np.ndarray, " B"],
    farthest_bits: Int64[np.ndarray, " B"],
) -> None:
    """Gives centre `k` those pixels start..end of row `y` that are nearer to it than to every centre before."""
    row, column = centres[k, 0], centres[k, 1]
    c0, c1, c2 = centres[k, 2], centres[k, 3], centres[k, 4]
    dy = row - y
    dy = dy * dy
    for block in range(start // _BLOCK, (end + _BLOCK - 1) // _BLOCK):
        left, right = max(start, block * _BLOCK), min(end, (block + 1) * _BLOCK)
        gap = max(left - column, column - (right - 1), 0.0)
        if (dy + gap * gap) * spatial_weight > farthest[block]:
            continue
        # Slices, counted from 0: with indices that might be negative, the loops would not be vectorised.
        pixels = right - left
        first, second, third = planes[0, y, left:right], planes[1, y, left:right], planes[2, y, left:right]
        place, best, label = columns[left:right], distance[left:right], labels[left:right]
        for i in range(pixels):
            dx = column - place[i]
            t0, t1, t2 = first[i] - c0, second[i] - c1, third[i] - c2
            colour = t0 * t0 + t1 * t1
            colour = colour + t2 * t2
            d = (dy + dx * dx) * spatial_weight + colour
            nearer = (d < best[i]) | ((d == best[i]) & (k < label[i]))
            best[i] = d if nearer else best[i]
            label[i] = k if nearer else label[i]
        most = np.int64(0)
        part = bits[block * _BLOCK : min(len(distance), (block + 1) * _BLOCK)]
        for i in range(len(part)):
            most = max(most, part[i])
        farthest_bits[block] = most


@_compiled
def _add_row(
    planes: Float64[np.ndarray, "3 H W"],
    y: int,
    nearest: Int32[np.ndarray, "H W"],
    sums: Float64[np.ndarray, "K 5"],
    members: Int64[np.ndarray, " K"],
) -> None:
    """Adds row `y` to the sums of its pixels' centres, pixel after pixel."""
    width = nearest.shape[1]
    for x in range(width):
        k = nearest[y, x]
        if k < 0:
            continue
        members[k] += 1
        sums[k, 0] += y
        sums[k, 1] += x
        sums[k, 2] += planes[0, y, x]
        sums[k, 3] += planes[1, y, x]
        sums[k, 4] += planes[2, y, x]


@_compiled
def connected(nearest: Int32[np.ndarray, "H W"], smallest: int, largest: int) -> Int32[np.ndarray, "H W"]:
    """Labels of connected regions, counted in raster order; one under `smallest` joins a neighbour met before it.

    A region stops growing at `largest` pixels. Pixels of label -1 keep it.
    """
    height, width = nearest.shape
    stride = width + 2
    # A frame of labels that no pixel has saves the test of every neighbour's position.
    labels = np.full((height + 2) * stride, -2, np.int32)
    found = np.full((height + 2) * stride, -1, np.int32)
    for y in range(height):
        begin = (y + 1) * stride + 1
        labels[begin : begin + width] = nearest[y]
    steps = (1, -1, stride, -stride)
    queue = np.empty(max(largest, 1), np.int64)
    current = 0
    for y in range(height):
        for x in range(width):
            start = (y + 1) * stride + x + 1
            label = labels[start]
            if label == -1 or found[start] > -1:
                continue
            adjacent = current
            found[start] = current
            queue[0] = start
            size, visited = 1, 0
            while visited < size < largest:
                here = queue[visited]
                for step in steps:
                    there = here + step
                    if labels[there] == label and found[there] == -1:
                        found[there] = current
                        queue[size] = there
                        size += 1
                        if size >= largest:
                            break
                    elif found[there] > -1 and found[there] != current:
                        adjacent = found[there]
                visited += 1
            if size < smallest:
                for i in range(size):
                    found[queue[i]] = adjacent
            else:
                current += 1
    return found.reshape(height + 2, stride)[1:-1, 1:-1].copy()
