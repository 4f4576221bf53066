"""Upsampling that is never carried out, against upsampling carried out by torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from slidr.ops.pooling import map_segment_mean
from slidr.ops.upsampled import UpsampledMap

shapes = st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 17), st.integers(1, 19))


def _map(cells: tuple[int, int], pixels: tuple[int, int], crop: tuple[int, int], seed: int) -> UpsampledMap:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 4, *cells, generator=generator, dtype=torch.float32).requires_grad_()
    return UpsampledMap(features, pixels, crop)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, cut=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=st.integers(0, 99))
def test_segment_means_and_gradients_equal_those_of_the_full_size_map(
    shape: tuple[int, int, int, int], cut: tuple[int, int], seed: int
) -> None:
    h, w, height, width = shape
    size = (max(1, height - cut[0]), max(1, width - cut[1]))
    maps = _map((h, w), (height, width), size, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(0, 5, (2, *size), generator=generator)
    cotangent = torch.randn(2, 6, 4, generator=generator)

    full = F.interpolate(maps.features, size=(height, width), mode="bilinear", align_corners=True)
    unit = F.normalize(full[..., : size[0], : size[1]], dim=1, eps=maps.eps)
    expected, expected_counts = map_segment_mean(unit, labels, 6)
    (expected_grad,) = torch.autograd.grad((expected * cotangent).sum(), maps.features)

    means, counts = maps.segment_means(labels, 6)
    (grad,) = torch.autograd.grad((means * cotangent).sum(), maps.features)
    torch.testing.assert_close(counts, expected_counts)
    torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-5)
    # Where neighbours nearly cancel, 1 / |x| magnifies float32's rounding.
    scale = float(expected_grad.abs().max()) + 1e-6
    torch.testing.assert_close(grad / scale, expected_grad / scale, rtol=1e-3, atol=2e-3)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_pixels_equal_those_of_the_full_size_map(shape: tuple[int, int, int, int], seed: int) -> None:
    h, w, height, width = shape
    maps = _map((h, w), (height, width), (height, width), seed)
    generator = torch.Generator().manual_seed(seed)
    pixel_index = torch.stack(
        [torch.randint(0, bound, (9,), generator=generator) for bound in (2, height, width)], dim=1
    )
    image, row, column = pixel_index.unbind(1)
    torch.testing.assert_close(maps.at(pixel_index), maps.dense()[image, :, row, column], rtol=1e-4, atol=1e-5)


def test_lengths_follow_from_dot_products_of_neighbouring_cells() -> None:
    features = torch.randn(1, 3, 3, 4, dtype=torch.float32).requires_grad_()
    maps = UpsampledMap(features, (7, 9), (7, 9))
    lengths = maps._lengths(features)
    full = F.interpolate(features, size=(7, 9), mode="bilinear", align_corners=True)
    torch.testing.assert_close(lengths, full.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_a_zero_map_has_zero_means_and_finite_gradients() -> None:
    features = torch.zeros(1, 3, 2, 2, requires_grad=True)
    means, _ = UpsampledMap(features, (4, 4), (4, 4)).segment_means(torch.zeros(1, 4, 4, dtype=torch.long), 1)
    means.sum().backward()
    assert torch.equal(means, torch.zeros(1, 1, 3))
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()


def test_labels_that_do_not_fit_are_refused() -> None:
    maps = _map((2, 2), (4, 4), (4, 4), 0)
    with pytest.raises(ValueError, match="maps"):
        maps.segment_means(torch.zeros(2, 4, 5, dtype=torch.long), 1)
    with pytest.raises(ValueError, match="0 to 0"):
        maps.segment_means(torch.ones(2, 4, 4, dtype=torch.long), 1)
