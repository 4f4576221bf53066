"""Augmentation of clouds and images. Every draw comes from the generator that is passed in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from slidr.shapes import Bool, Float, Float32, Int64, Shaped, UInt8
from slidr.types import Pairing

Size = tuple[int, int]  # height, width in pixels
Array = TypeVar("Array", bound=np.ndarray)


# --- clouds ---


def rotate_z(points: Float[np.ndarray, "N 3"], rng: np.random.Generator) -> Float[np.ndarray, "N 3"]:
    """The cloud turned about the z axis by an angle from U[0, 2 pi)."""
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    turned_from_points = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return (points @ turned_from_points.T).astype(points.dtype)


def flip_axes(points: Float[np.ndarray, "N 3"], rng: np.random.Generator) -> Float[np.ndarray, "N 3"]:
    """The cloud with x, then y mirrored, each with probability 0.5."""
    signs = np.array([-1 if rng.random() < 0.5 else 1, -1 if rng.random() < 0.5 else 1, 1], points.dtype)
    return points * signs


def scale(
    points: Float[np.ndarray, "N 3"], low: float, high: float, rng: np.random.Generator
) -> Float[np.ndarray, "N 3"]:
    """The cloud enlarged about the origin by a factor from U[low, high]."""
    return (points * rng.uniform(low, high)).astype(points.dtype)


def drop_cuboid(
    points: Float[np.ndarray, "N 3"],
    pairing: Pairing,
    images: int,
    rng: np.random.Generator,
    max_side: float = 0.2,
    min_pairs: int = 1024,
) -> tuple[Bool[np.ndarray, " N"], Pairing]:
    """Which points stay when one random cuboid is cut out, and the pairs of those, re-indexed to them.

    The cuboid is axis-aligned, centred on a random point; its half side along each axis is the cloud's extent
    times U[0, `max_side`) / 2. Points strictly inside go. It is undone entirely if any of the `images` images
    is left with fewer than `min_pairs` pairs, so a frame in which an image starts below that is never cut.
    """
    keep = np.ones(len(points), bool)
    if len(points) == 0:
        return keep, pairing
    centre = points[rng.integers(len(points))]
    half_side = (points.max(0) - points.min(0)) * rng.uniform(0, max_side, 3) / 2
    keep = ~(np.abs(points - centre) < half_side).all(1)
    kept_pairs = pairing[keep[pairing.point_index]]
    pairs_per_image = np.bincount(kept_pairs.camera_index, minlength=images)
    if (pairs_per_image < min_pairs).any():
        return np.ones(len(points), bool), pairing
    kept_from_all = np.cumsum(keep) - 1
    return keep, Pairing(kept_from_all[kept_pairs.point_index], kept_pairs.camera_index, kept_pairs.pixel)


# --- images ---


@dataclass(frozen=True)
class Crop:
    """A window of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draw_crop(
    height: int,
    width: int,
    pixel: Int64[np.ndarray, "P 2"],
    rng: np.random.Generator,
    area: tuple[float, float] = (0.3, 1.0),
    aspect: tuple[float, float] = (14 / 9, 17 / 9),
    min_pairs: int = 1024,
    min_share: float = 0.75,
    size: Size = (224, 416),
    attempts: int = 100,
) -> Crop:
    """A random window of a `height` x `width` image that keeps enough of its pairs.

    Its area is U[area] of the image's, its aspect ratio (width / height) log-uniform in `aspect`. It is drawn
    again until, resized to `size`, it keeps more than `min_pairs` pairs or more than `min_share` of the pairs
    at `pixel` (row, column). An image without pairs has none to lose: its first window that fits is taken.
    After `attempts` draws the one that kept most pairs is taken, since pairs are what the loss is made of; if
    none fitted into the image, the whole image is.
    """
    best, most = Crop(0, 0, height, width), -1
    for _ in range(attempts):
        crop = _draw_window(height, width, rng, area, aspect)
        if crop is None:
            continue
        pairs = int(crop_pixels(pixel, crop, size)[1].sum())
        if len(pixel) == 0 or pairs > min_pairs or pairs > min_share * len(pixel):
            return crop
        if pairs > most:
            best, most = crop, pairs
    return best


def _draw_window(
    height: int, width: int, rng: np.random.Generator, area: tuple[float, float], aspect: tuple[float, float]
) -> Crop | None:
    """One window of random area, aspect ratio and place, or None where it is larger than the image."""
    pixels = height * width * rng.uniform(*area)
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
    if not (0 < w <= width and 0 < h <= height):
        return None
    return Crop(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w)


def crop_image(image: UInt8[np.ndarray, "H W 3"], crop: Crop, size: Size) -> Float32[np.ndarray, "3 h w"]:
    """The window of an RGB image in [0, 1], bilinearly resized to `size` without antialiasing, channels
    first.

    The result is torch's `interpolate` (align_corners and antialias off) of the float window.
    """
    window = torch.from_numpy(_window(image, crop).copy())
    as_float = window.permute(2, 0, 1)[None].float().div_(255)
    resized = F.interpolate(as_float, size=size, mode="bilinear", align_corners=False, antialias=False)
    return resized[0].contiguous().numpy()


def crop_labels(labels: Shaped[np.ndarray, "H W"], crop: Crop, size: Size) -> Shaped[np.ndarray, "h w"]:
    """The window of a label map, resized to `size`: output i is input floor(i * in / out), the nearest."""
    rows = _nearest(crop.height, size[0]) + crop.top
    columns = _nearest(crop.width, size[1]) + crop.left
    return labels[rows[:, None], columns[None, :]]


def crop_pixels(
    pixel: Int64[np.ndarray, "P 2"], crop: Crop, size: Size
) -> tuple[Int64[np.ndarray, "K 2"], Bool[np.ndarray, " P"]]:
    """Where the pixels (row, column) that fall into the window lie after resizing it to `size`, and which
    those are.

    pixel' = round((pixel - corner) * size / window), half to even; kept where inside `size`.
    """
    factor = np.array([size[0] / crop.height, size[1] / crop.width])
    moved = np.rint((pixel - np.array([crop.top, crop.left])) * factor).astype(np.int64)
    keep = ((moved >= 0) & (moved < np.array(size))).all(1)
    return moved[keep], keep


def resize_pixels(pixel: Int64[np.ndarray, "P 2"], from_size: Size, size: Size) -> Int64[np.ndarray, "P 2"]:
    """Where the pixels (row, column) of a `from_size` image lie at `size`: scaled, rounded, clipped."""
    factor = np.array([size[0] / from_size[0], size[1] / from_size[1]])
    return np.clip(np.rint(pixel * factor).astype(np.int64), 0, np.array(size) - 1)


def flip_image(image: Array) -> Array:
    """Images or label maps mirrored left to right (the last axis)."""
    return np.ascontiguousarray(image[..., ::-1])  # type: ignore[return-value]


def flip_pixels(pixel: Int64[np.ndarray, "P 2"], width: int) -> Int64[np.ndarray, "P 2"]:
    """Pixels (row, column) of an image of that width after `flip_image`."""
    return np.stack([pixel[:, 0], width - 1 - pixel[:, 1]], axis=1)


def _window(image: np.ndarray, crop: Crop) -> np.ndarray:
    return image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def _nearest(source: int, target: int) -> Int64[np.ndarray, " T"]:
    """torch's nearest source index of each target index, in float32 as torch computes it."""
    step = np.float32(source) / np.float32(target)
    return np.floor(np.arange(target, dtype=np.float32) * step).astype(np.int64)
