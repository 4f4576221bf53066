"""Superpixels on one core: the compiled engine beside scikit-image, image by image in turn, in one process.

    python benchmarks/superpixels.py [--images FOLDER] [--count 6] [--rounds 3]

FOLDER is searched for *.jpg and *.png (a data set's samples/, say); without it the synthetic street is drawn at
1600 x 900. Prints a table of CPU seconds an image (medians) and the ratio, then where the compiled engine's time goes,
and writes results/superpixels.json. Ends with an error if a single label differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from slidr.config import SuperpixelConfig
from slidr.data import images as files
from slidr.data.synthetic import write_dataroot
from slidr.ops import slic_kernels, superpixels

T = TypeVar("T")
PARAMETERS = SuperpixelConfig()


def found(folder: Path, count: int) -> list[np.ndarray]:
    """`count` of a folder's images, spread over it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    if not paths:
        raise SystemExit(f"{folder}: holds no *.jpg and no *.png")
    chosen = np.linspace(0, len(paths) - 1, min(count, len(paths))).round().astype(int)
    return [files.read_image(paths[i]) for i in chosen]


def pictures(folder: Path | None, count: int) -> list[np.ndarray]:
    if folder is not None:
        return found(folder, count)
    with tempfile.TemporaryDirectory() as scratch:
        root = write_dataroot(Path(scratch), splits={"parametrize": 1}, keyframes=1, scale=1.0)
        return found(Path(root), count)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.process_time()
    value = call()
    return value, time.process_time() - start


def parts(image: np.ndarray) -> Iterator[tuple[str, float]]:
    """CPU seconds of each part of the compiled engine, and of all it does."""
    height, width = image.shape[:2]
    planes, seconds = timed(lambda: superpixels._lab(image))
    yield "Lab", seconds
    weights = superpixels._gaussian_weights(PARAMETERS.sigma)
    yield "blur", timed(lambda: slic_kernels.blur(planes, weights))[1]
    planes /= PARAMETERS.compactness
    step = round((height * width / PARAMETERS.segments) ** 0.5)
    grid = np.mgrid[step // 2 : height : step, step // 2 : width : step].reshape(2, -1).T
    centres = np.concatenate([grid, np.zeros((len(grid), 3))], axis=1)
    weight = 1.0 / step**2
    nearest, seconds = timed(lambda: slic_kernels.kmeans(planes, centres, step, step, weight, superpixels.ITERATIONS))
    yield "k-means", seconds
    size = height * width // len(grid)
    yield "connectivity", timed(lambda: slic_kernels.connected(nearest, size // 2, 3 * size))[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = pictures(options.images, options.count)
    if not superpixels.compiled_agrees():
        raise SystemExit("the compiled engine cannot be used here; see the warning above")
    arguments = (PARAMETERS.segments, PARAMETERS.compactness, PARAMETERS.sigma)
    rows: list[tuple[float, float]] = []
    for _ in range(options.rounds):
        for image in images:
            ours, fast = timed(lambda image=image: superpixels.slic(image, *arguments, "compiled"))
            theirs, slow = timed(lambda image=image: superpixels.slic(image, *arguments, "scikit-image"))
            if not np.array_equal(ours, theirs):
                raise SystemExit(f"{int((ours != theirs).sum())} labels of an image differ")
            rows.append((fast, slow))
    fast, slow = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [slow / fast for fast, slow in rows]
    shares: dict[str, list[float]] = {}
    for image in images:
        for name, seconds in parts(image):
            shares.setdefault(name, []).append(seconds)
    result = {
        "machine": platform.processor() or platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "images": [list(image.shape[:2]) for image in images],
        "compiled_s": fast,
        "scikit_image_s": slow,
        "ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
        "parts_s": {name: statistics.median(values) for name, values in shares.items()},
    }
    print(f"{len(rows)} pairs, {images[0].shape[1]} x {images[0].shape[0]} pixels, all labels equal")
    print(f"compiled      {fast:.3f} CPU s an image")
    print(f"scikit-image  {slow:.3f} CPU s an image")
    print(f"ratio         {result['ratio']['median']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for name, seconds in result["parts_s"].items():
        print(f"  {name:<13}{1000 * seconds:4.0f} ms")
    Path("results").mkdir(exist_ok=True)
    Path("results/superpixels.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
