"""Several samples as one batch: rows are laid end to end and indices are moved along.

A `PairSample`'s answers are as many as its `points` (see `slidr.data.samples.pair_sample`), which is how far
its neighbour's `point_index` moves; images are counted over the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from slidr.shapes import Shaped
from slidr.types import PairBatch, PairSample, ScanBatch, ScanSample


def collate_pairs(samples: Sequence[PairSample]) -> PairBatch:
    """Samples as one batch, in their order. Raises `ValueError` for none."""
    _refuse_none(samples)
    first_answer = _starts([len(sample.points) for sample in samples])
    first_image = _starts([len(sample.images) for sample in samples])
    return PairBatch(
        tokens=tuple(sample.token for sample in samples),
        coordinates=_numbered([sample.coordinates for sample in samples]),
        features=_joined([sample.features for sample in samples]),
        images=_joined([sample.images for sample in samples]),
        superpixels=_joined([sample.superpixels.astype(np.int64) for sample in samples]),
        points=_numbered([sample.points for sample in samples]),
        point_index=_joined([s.point_index + first for s, first in zip(samples, first_answer, strict=True)]),
        pixel_index=_joined(
            [s.pixel_index + np.array([first, 0, 0]) for s, first in zip(samples, first_image, strict=True)]
        ),
    )


def collate_scans(samples: Sequence[ScanSample]) -> ScanBatch:
    """Sweeps as one batch, in their order. Raises `ValueError` for none."""
    _refuse_none(samples)
    first_voxel = _starts([len(sample.coordinates) for sample in samples])
    return ScanBatch(
        tokens=tuple(sample.token for sample in samples),
        coordinates=_numbered([sample.coordinates for sample in samples]),
        features=_joined([sample.features for sample in samples]),
        voxel_of_point=_joined([s.voxel_of_point + first for s, first in zip(samples, first_voxel, strict=True)]),
        voxel_labels=_joined([sample.voxel_labels for sample in samples]),
        point_labels=_joined([sample.point_labels for sample in samples]),
        distance=_joined([sample.distance for sample in samples]),
        points_per_scan=tuple(len(sample.point_labels) for sample in samples),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each of several stretches begins when they are laid end to end."""
    return [0, *np.cumsum(lengths)[:-1].tolist()]


def _joined(arrays: Sequence[Shaped[np.ndarray, "_ ..."]]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _numbered(arrays: Sequence[Shaped[np.ndarray, "_ 3"]]) -> Tensor:
    """The arrays end to end, each row led by its array's number."""
    return _joined([np.insert(array, 0, number, axis=1) for number, array in enumerate(arrays)])


def _refuse_none(samples: Sequence[object]) -> None:
    if not samples:
        raise ValueError("collate: got no samples, expected at least one")
