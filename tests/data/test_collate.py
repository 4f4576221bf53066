"""A batch says of every sample what the sample says of itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slidr.data.collate import collate_pairs, collate_scans
from slidr.types import PairSample, ScanSample


def _pairs(seed: int, voxels: int, points: int, images: int, pairs: int) -> PairSample:
    rng = np.random.default_rng(seed)
    return PairSample(
        token=f"frame-{seed}",
        coordinates=rng.integers(-99, 99, (voxels, 3)).astype(np.int32),
        features=rng.normal(size=(voxels, 4)).astype(np.float32),
        points=rng.normal(size=(points, 3)).astype(np.float32),
        images=rng.random((images, 3, 4, 6)).astype(np.float32),
        superpixels=rng.integers(0, 65536, (images, 4, 6)).astype(np.uint16),
        point_index=rng.integers(0, max(1, points), pairs),
        pixel_index=np.stack([rng.integers(0, max(1, n), pairs) for n in (images, 4, 6)], 1),
    )


def test_pairs_point_at_the_same_rows_and_pixels_in_the_batch() -> None:
    samples = [_pairs(0, 5, 9, 2, 20), _pairs(1, 3, 0, 1, 0), _pairs(2, 7, 4, 3, 11)]
    batch = collate_pairs(samples)
    assert batch.tokens == ("frame-0", "frame-1", "frame-2")
    assert batch.coordinates.dtype == torch.int32
    assert batch.points.dtype == torch.float32
    assert batch.superpixels.dtype == torch.int64
    first = 0
    for number, sample in enumerate(samples):
        mine = batch.coordinates[:, 0] == number
        np.testing.assert_array_equal(batch.coordinates[mine, 1:], sample.coordinates)
        np.testing.assert_array_equal(batch.features[mine], sample.features)
        np.testing.assert_array_equal(batch.points[batch.points[:, 0] == number, 1:], sample.points)
        last = first + len(sample.point_index)
        rows = batch.points[batch.point_index[first:last]]
        np.testing.assert_array_equal(rows[:, 1:], sample.points[sample.point_index])
        assert (rows[:, 0] == number).all()
        here, there = batch.pixel_index[first:last].T.numpy(), sample.pixel_index.T
        np.testing.assert_array_equal(
            batch.superpixels.numpy()[tuple(here)], sample.superpixels[tuple(there)].astype(np.int64)
        )
        np.testing.assert_array_equal(
            batch.images.numpy()[here[0], :, here[1], here[2]], sample.images[there[0], :, there[1], there[2]]
        )
        first = last
    assert first == len(batch.point_index) == len(batch.pixel_index)


def test_points_find_their_voxels_in_the_batch() -> None:
    rng = np.random.default_rng(0)
    samples = [
        ScanSample(
            token=str(n),
            coordinates=rng.integers(-9, 9, (voxels, 3)).astype(np.int32),
            features=rng.normal(size=(voxels, 1)).astype(np.float32),
            voxel_of_point=rng.integers(0, max(1, voxels), points),
            voxel_labels=rng.integers(0, 17, voxels),
            point_labels=rng.integers(0, 17, points),
            distance=rng.random(points).astype(np.float32),
        )
        for n, (voxels, points) in enumerate([(4, 10), (0, 0), (6, 8)])
    ]
    batch = collate_scans(samples)
    assert batch.points_per_scan == (10, 0, 8)
    parts = torch.split(batch.voxel_of_point, list(batch.points_per_scan))
    for number, (sample, mine) in enumerate(zip(samples, parts, strict=True)):
        np.testing.assert_array_equal(batch.features[mine], sample.features[sample.voxel_of_point])
        np.testing.assert_array_equal(batch.voxel_labels[mine], sample.voxel_labels[sample.voxel_of_point])
        assert (batch.coordinates[mine, 0] == number).all()
    np.testing.assert_array_equal(batch.point_labels, np.concatenate([s.point_labels for s in samples]))
    np.testing.assert_array_equal(batch.distance, np.concatenate([s.distance for s in samples]))


def test_no_samples_make_no_batch() -> None:
    with pytest.raises(ValueError, match="got no samples"):
        collate_pairs([])
    with pytest.raises(ValueError, match="got no samples"):
        collate_scans([])
