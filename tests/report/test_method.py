"""The picture of the method: what it is given, it draws."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from slidr.ops.upsampled import UpsampledMap
from slidr.report.method import method_figure
from slidr.types import PairBatch


def _batch() -> PairBatch:
    generator = torch.Generator().manual_seed(0)
    superpixels = (torch.arange(16)[:, None] // 8 * 2 + torch.arange(24)[None] // 12)[None].expand(2, -1, -1)
    points = torch.randn(40, 3, generator=generator) * 10
    pixel_index = torch.stack([torch.randint(0, bound, (30,), generator=generator) for bound in (2, 16, 24)], dim=1)
    return PairBatch(
        tokens=("a",),
        coordinates=torch.zeros(40, 4, dtype=torch.int32),
        features=torch.ones(40, 1),
        images=torch.rand(2, 3, 16, 24, generator=generator),
        superpixels=superpixels,
        points=torch.cat([torch.zeros(40, 1), points], dim=1),
        point_index=torch.arange(30),
        pixel_index=pixel_index,
    )


def _drawn(rows: torch.Tensor, maps: torch.Tensor) -> np.ndarray:
    data = method_figure(_batch(), rows, UpsampledMap(maps, (16, 24), (16, 24)))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_the_picture_shows_the_students_features() -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 8, 4, 6, generator=generator)
    rows = torch.nn.functional.normalize(torch.randn(40, 8, generator=generator), dim=1)
    one, same, other = _drawn(rows, maps), _drawn(rows, maps), _drawn(-rows, maps)
    assert np.array_equal(one, same)
    changed = np.argwhere((one != other).any(axis=2))
    assert len(changed) > 0
    # Only the student's panels change: the middle and the right one of the lower row.
    assert changed[:, 0].min() > one.shape[0] * 0.45
    assert changed[:, 1].min() > one.shape[1] * 0.3


@pytest.mark.parametrize("channels", [1, 2, 8])
@pytest.mark.parametrize("superpixels", [1, 2])
def test_fewer_channels_or_superpixels_than_colours_are_drawn_too(channels: int, superpixels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    batch = _batch()
    batch = replace(batch, superpixels=batch.superpixels.clamp_max(superpixels - 1)[:1], images=batch.images[:1])
    batch = replace(batch, pixel_index=batch.pixel_index * torch.tensor([0, 1, 1]))
    maps = UpsampledMap(torch.randn(1, channels, 4, 6, generator=generator), (16, 24), (16, 24))
    rows = torch.nn.functional.normalize(torch.randn(40, channels, generator=generator), dim=1)
    assert method_figure(batch, rows, maps).startswith(b"\x89PNG")


def test_equal_features_of_both_networks_have_equal_colours() -> None:
    from slidr.report.method import _Projection

    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    project = _Projection(features)
    colours = project(features)
    assert colours.min() == 0
    assert colours.max() == 1
    assert np.array_equal(project(features[7:8])[0], colours[7])
