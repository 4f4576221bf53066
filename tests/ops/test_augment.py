from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from slidr.ops.augment import (
    Crop,
    crop_image,
    crop_labels,
    crop_pixels,
    draw_crop,
    drop_cuboid,
    flip_axes,
    flip_image,
    flip_pixels,
    resize_pixels,
    rotate_z,
    scale,
)
from slidr.types import Pairing

SIZE = (224, 416)
FULL = Crop(0, 0, 900, 1600)
seeds = st.integers(0, 2**32 - 1)


def cloud(seed: int, count: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-20, 20, (count, 3)).astype(np.float32)


def pairs_of(points: int, images: int, seed: int, per_image: int) -> Pairing:
    rng = np.random.default_rng(seed)
    total = images * per_image
    return Pairing(
        rng.integers(0, points, total),
        np.repeat(np.arange(images), per_image),
        rng.integers(0, 99, (total, 2)),
    )


# --- clouds ---


@given(seeds)
def test_rotation_multiplies_x_plus_iy_by_a_uniform_phase(seed: int) -> None:
    points = cloud(seed)
    turned = rotate_z(points, np.random.default_rng(seed))
    phase = np.exp(1j * np.random.default_rng(seed).uniform(0, 2 * np.pi))
    plane = (points[:, 0] + 1j * points[:, 1].astype(np.float64)) * phase
    np.testing.assert_allclose(turned, np.column_stack([plane.real, plane.imag, points[:, 2]]), atol=1e-5)
    assert turned.dtype == np.float32


def test_flips_are_four_equally_likely_mirrors() -> None:
    rng = np.random.default_rng(0)
    points = cloud(0, 5)
    seen: dict[tuple[float, ...], int] = {}
    for _ in range(2000):
        signs = flip_axes(points, rng) / points
        assert np.ptp(signs, axis=0).max() == 0
        seen[tuple(signs[0])] = seen.get(tuple(signs[0]), 0) + 1
    assert set(seen) == {(x, y, 1) for x in (-1, 1) for y in (-1, 1)}
    assert all(400 < count < 600 for count in seen.values())  # 500 expected, standard deviation 19


@given(seeds)
def test_scaling_keeps_directions_and_stays_in_bounds(seed: int) -> None:
    points = cloud(seed)
    ratio = scale(points, 0.9, 1.1, np.random.default_rng(seed)) / points
    assert np.ptp(ratio) < 1e-5
    assert 0.9 - 1e-6 < ratio.mean() < 1.1 + 1e-6


@given(seeds)
def test_a_dropped_cuboid_is_a_plain_loops(seed: int) -> None:
    points = cloud(seed)
    pairing = pairs_of(len(points), 2, seed, 400)
    keep, kept_pairs = drop_cuboid(points, pairing, 2, np.random.default_rng(seed), max_side=0.8, min_pairs=1)

    rng = np.random.default_rng(seed)
    centre = points[rng.integers(len(points))]
    half = [np.ptp(points[:, axis]) * factor / 2 for axis, factor in enumerate(rng.uniform(0, 0.8, 3))]
    for point, kept in zip(points, keep, strict=True):
        assert kept == any(abs(p - c) >= h for p, c, h in zip(point, centre, half, strict=True))
    survivors = [i for i in range(len(pairing)) if keep[pairing.point_index[i]]]
    np.testing.assert_array_equal(points[keep][kept_pairs.point_index], points[pairing.point_index[survivors]])
    np.testing.assert_array_equal(kept_pairs.camera_index, pairing.camera_index[survivors])
    np.testing.assert_array_equal(kept_pairs.pixel, pairing.pixel[survivors])


@pytest.mark.parametrize("least", [1, 150, 300, 10_000])
def test_a_cuboid_that_starves_an_image_is_undone_entirely(least: int) -> None:
    points = cloud(3)
    pairing = pairs_of(len(points), 3, 3, 300)
    undone = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        keep, kept_pairs = drop_cuboid(points, pairing, 3, rng, max_side=1.5, min_pairs=least)
        if keep.all():
            undone += 1
            assert kept_pairs is pairing
        else:
            assert np.bincount(kept_pairs.camera_index, minlength=3).min() >= least
    assert (undone > 0) == (least > 1)
    assert (undone == 30) == (least >= 300)  # 300 is what every image starts with: no pair may go


def test_a_frame_whose_image_starts_below_the_least_is_never_cut() -> None:
    points = cloud(4)
    rich_and_empty = pairs_of(len(points), 1, 4, 2000)
    for seed in range(10):
        keep, kept_pairs = drop_cuboid(points, rich_and_empty, 2, np.random.default_rng(seed), 1.0, 10)
        assert keep.all()
        assert len(kept_pairs) == 2000


def test_a_cut_that_leaves_exactly_the_least_stands_and_one_pair_less_undoes_it() -> None:
    points = cloud(5)
    pairing = pairs_of(len(points), 3, 5, 300)

    def cut(least: int) -> tuple[np.ndarray, Pairing]:
        return drop_cuboid(points, pairing, 3, np.random.default_rng(1), max_side=1.5, min_pairs=least)

    keep, kept_pairs = cut(1)
    left = int(np.bincount(kept_pairs.camera_index).min())
    assert left < 300
    np.testing.assert_array_equal(cut(left)[0], keep)
    assert cut(left + 1)[0].all()


def test_points_on_the_cuboids_faces_stay() -> None:
    flat = cloud(6) * np.array([1, 1, 0], np.float32)  # no extent along z: every point lies on two faces
    keep, _ = drop_cuboid(flat, pairs_of(len(flat), 1, 6, 50), 1, np.random.default_rng(0), 2.0, 0)
    assert keep.all()


def test_an_empty_cloud_drops_nothing() -> None:
    keep, pairing = drop_cuboid(np.zeros((0, 3)), pairs_of(1, 0, 0, 0), 0, np.random.default_rng(0))
    assert len(keep) == len(pairing) == 0


# --- images ---


@pytest.mark.parametrize("arm", ["train", "val"])
def test_a_fixed_crop_of_the_real_keyframe_is_the_originals(
    golden: Path, front_image: np.ndarray, front_superpixels: np.ndarray, arm: str
) -> None:
    expected = np.load(golden / "crops.npz")
    crop = Crop(*expected["crop_i_j_h_w"].tolist()) if arm == "train" else FULL
    image = crop_image(front_image, crop, SIZE)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[:, ::4, ::4], expected[f"{arm}_image0"], atol=1e-6)
    np.testing.assert_array_equal(crop_labels(front_superpixels, crop, SIZE), expected[f"{arm}_superpixels0"])


def test_pixels_of_the_real_keyframe_move_as_the_originals(golden: Path) -> None:
    expected, pairs = np.load(golden / "crops.npz"), np.load(golden / "projection.npz")
    image, pixel = pairs["pairing_images"][:, 0], pairs["pairing_images"][:, 1:].astype(np.int64)
    cropped, keep = crop_pixels(pixel, Crop(*expected["crop_i_j_h_w"].tolist()), SIZE)
    np.testing.assert_array_equal(pairs["pairing_points"][keep], expected["train_pairing_points"])
    np.testing.assert_array_equal(np.column_stack([image[keep], cropped]), expected["train_pairing_images"])
    resized = resize_pixels(pixel, (900, 1600), SIZE)
    np.testing.assert_array_equal(np.column_stack([image, resized]), expected["val_pairing_images"])


@st.composite
def crops(draw: st.DrawFn) -> tuple[np.ndarray, Crop, tuple[int, int]]:
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    h, w = draw(st.integers(1, height)), draw(st.integers(1, width))
    crop = Crop(draw(st.integers(0, height - h)), draw(st.integers(0, width - w)), h, w)
    image = np.random.default_rng(draw(seeds)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, crop, (draw(st.integers(1, 30)), draw(st.integers(1, 30)))


def window(tensor: torch.Tensor, crop: Crop) -> torch.Tensor:
    return tensor[..., crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


@given(crops())
def test_crops_are_torch_interpolations_of_the_whole_float_image(case: tuple) -> None:
    image, crop, size = case
    whole = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    expected = F.interpolate(window(whole, crop), size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(crop_image(image, crop, size), expected[0].numpy(), atol=1e-6)
    labels = image[..., 0].astype(np.uint16)
    nearest = F.interpolate(window(torch.from_numpy(labels.astype(np.float32)), crop)[None, None], size)
    np.testing.assert_array_equal(crop_labels(labels, crop, size), nearest[0, 0].numpy())
    assert crop_labels(labels, crop, size).dtype == np.uint16


def test_a_crop_does_not_touch_or_keep_the_image() -> None:
    image = np.zeros((20, 30, 3), np.uint8)
    image.flags.writeable = False
    crop_image(image, Crop(0, 0, 20, 30), (5, 5))[:] = 1.0
    assert image.max() == 0


@given(seeds)
def test_cropped_pixels_round_half_to_even_and_leave_when_outside(seed: int) -> None:
    pixel = np.random.default_rng(seed).integers(0, 60, (80, 2))
    crop, size = Crop(10, 5, 20, 40), (10, 30)
    moved, keep = crop_pixels(pixel, crop, size)
    expected = [(round((r - 10) * 10 / 20), round((c - 5) * 30 / 40)) for r, c in pixel.tolist()]
    inside = [0 <= r < 10 and 0 <= c < 30 for r, c in expected]
    assert keep.tolist() == inside
    assert [tuple(p) for p in moved.tolist()] == [p for p, i in zip(expected, inside, strict=True) if i]


@given(seeds)
def test_resized_pixels_never_leave_the_image(seed: int) -> None:
    pixel = np.random.default_rng(seed).integers(0, 60, (80, 2))
    resized = resize_pixels(pixel, (60, 60), (7, 11))
    for before, after in zip(pixel.tolist(), resized.tolist(), strict=True):
        assert after == [min(round(before[0] * 7 / 60), 6), min(round(before[1] * 11 / 60), 10)]


def test_flipped_pixels_read_the_same_values() -> None:
    rng = np.random.default_rng(0)
    image, labels = rng.random((3, 12, 17)), rng.integers(0, 9, (12, 17))
    pixel = np.column_stack([rng.integers(0, 12, 50), rng.integers(0, 17, 50)])
    row, column = flip_pixels(pixel, 17).T
    np.testing.assert_array_equal(flip_image(image)[:, row, column], image[:, pixel[:, 0], pixel[:, 1]])
    np.testing.assert_array_equal(flip_image(labels)[row, column], labels[pixel[:, 0], pixel[:, 1]])
    np.testing.assert_array_equal(flip_image(flip_image(image)), image)


@settings(max_examples=50)
@given(seeds, st.integers(0, 3000))
def test_a_drawn_crop_fits_its_bounds_and_keeps_enough_pairs(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    pixel = np.column_stack([rng.integers(400, 900, count), rng.integers(0, 1600, count)])
    crop = draw_crop(900, 1600, pixel, rng, size=SIZE)
    assert 0 <= crop.top <= 900 - crop.height
    assert 0 <= crop.left <= 1600 - crop.width
    assert 0.299 < crop.height * crop.width / (900 * 1600) <= 1
    assert 14 / 9 - 0.01 < crop.width / crop.height < 17 / 9 + 0.01
    kept = crop_pixels(pixel, crop, SIZE)[1].sum()
    assert count == 0 or kept > min(1024, 0.75 * count)  # 100 draws without success: less than 1 in 10^9


def test_areas_and_aspect_ratios_are_spread_as_asked() -> None:
    rng = np.random.default_rng(0)
    drawn = [
        draw_crop(900, 1600, np.zeros((0, 2), np.int64), rng, area=(0.2, 0.6), aspect=(0.8, 1.25)) for _ in range(2000)
    ]
    areas = np.array([c.height * c.width / (900 * 1600) for c in drawn])
    logs = np.array([math.log(c.width / c.height) for c in drawn]) / math.log(1.25)
    # Uniform on [0.2, 0.6] less what does not fit (height > 900 where area > 0.56 at 1:1), and on [-1, 1].
    small = areas < 0.45
    np.testing.assert_allclose(np.quantile(areas[small], [0, 0.5, 1]), [0.2, 0.325, 0.45], atol=0.015)
    np.testing.assert_allclose(np.quantile(logs[small], [0, 0.5, 1]), [-1, 0, 1], atol=0.08)


def test_of_crops_that_all_lose_too_much_the_richest_is_taken() -> None:
    # Pairs along the middle row; windows of at most 0.4 of the area span at most 0.66 of it.
    pixel = np.column_stack([np.full(40, 450), np.arange(0, 1600, 40)])
    crop = draw_crop(900, 1600, pixel, np.random.default_rng(0), area=(0.3, 0.4), attempts=50)
    rng = np.random.default_rng(0)
    kept = [crop_pixels(pixel, draw_crop(900, 1600, pixel[:0], rng, area=(0.3, 0.4)), SIZE)[1].sum() for _ in range(50)]
    assert min(kept) < max(kept) < 30
    assert crop_pixels(pixel, crop, SIZE)[1].sum() == max(kept)


def test_an_image_that_no_window_fits_is_taken_whole() -> None:
    tall = draw_crop(100, 10, np.array([[5, 5]]), np.random.default_rng(0), area=(0.9, 1.0))
    assert tall == Crop(0, 0, 100, 10)


def test_the_same_generator_draws_the_same_crop() -> None:
    pixel = np.random.default_rng(1).integers(0, 900, (500, 2))
    first, second = (draw_crop(900, 1600, pixel, np.random.default_rng(7)) for _ in range(2))
    assert first == second
