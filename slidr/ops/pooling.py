"""Means over segments, of rows and of image-shaped maps, with backward passes written by hand.

No one-hot matrix is built: the forward pass adds every value to its segment's sum, the backward pass reads
every segment's gradient back. Sums are float32 at least, whatever autocast hands in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slidr.shapes import Float, Int64


def segment_mean(
    values: Float[Tensor, "N C"], segment: Int64[Tensor, " N"], segments: int
) -> tuple[Float[Tensor, "S C"], Int64[Tensor, " S"]]:
    """Mean of the rows of each segment, and how many there are; an empty segment's mean is 0, its count too.

    mean[s] = sum of values[n] over segment[n] = s, divided by its count. Differentiable in `values`.
    """
    if len(values) != len(segment):
        raise ValueError(f"segment_mean: {len(values)} values but {len(segment)} segment ids; expected one for each")
    counts = torch.bincount(segment, minlength=segments)
    if len(counts) > segments:
        raise ValueError(f"segment_mean: segment id {len(counts) - 1} is not below segments = {segments}")
    means = _RowMean.apply(values, segment, counts)
    return means, counts


def map_segment_mean(
    maps: Float[Tensor, "B C H W"], labels: Int64[Tensor, "B H W"], segments: int
) -> tuple[Float[Tensor, "B S C"], Int64[Tensor, "B S"]]:
    """Mean over the pixels of each label of each image, and how many there are, without permuting the maps.

    Labels count from 0 in every image; one that an image lacks has mean 0 and count 0. Differentiable in
    `maps`.
    """
    batch, _, height, width = maps.shape
    if labels.shape != (batch, height, width):
        raise ValueError(f"map_segment_mean: maps {tuple(maps.shape)} but labels {tuple(labels.shape)}")
    offset = torch.arange(batch, device=labels.device)[:, None] * segments
    labels = labels.reshape(batch, height * width)
    if labels.numel() > 0 and (int(labels.min()) < 0 or int(labels.max()) >= segments):
        raise ValueError(
            f"map_segment_mean: labels span {int(labels.min())} to {int(labels.max())}, expected 0 to {segments - 1}"
        )
    counts = torch.bincount((labels + offset).reshape(-1), minlength=batch * segments).reshape(batch, segments)
    means = _MapMean.apply(maps, labels, counts)
    return means, counts


class _RowMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segment: Tensor, counts: Tensor) -> Tensor:
        dtype = torch.promote_types(values.dtype, torch.float32)
        divisor = counts.clamp(min=1)[:, None].to(dtype)
        ctx.save_for_backward(segment, divisor)
        ctx.dtype = values.dtype
        sums = torch.zeros(len(counts), values.shape[1], dtype=dtype, device=values.device)
        return sums.index_add_(0, segment, values.to(dtype)).div_(divisor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        segment, divisor = ctx.saved_tensors
        return (grad / divisor).to(ctx.dtype).index_select(0, segment), None, None


class _MapMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
        dtype = torch.promote_types(maps.dtype, torch.float32)
        batch, channels = maps.shape[:2]
        divisor = counts.clamp(min=1)[:, None, :].to(dtype)
        ctx.save_for_backward(labels, divisor)
        ctx.shape, ctx.dtype = maps.shape, maps.dtype
        sums = torch.zeros(batch, channels, counts.shape[1], dtype=dtype, device=maps.device)
        for total, image, label in zip(sums, maps, labels, strict=True):  # one image's float32 copy at most
            total.scatter_add_(1, label.expand(channels, -1), image.flatten(1).to(dtype))
        return sums.div_(divisor).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        labels, divisor = ctx.saved_tensors
        table = (grad.transpose(1, 2) / divisor).to(ctx.dtype)
        index = labels[:, None, :].expand(-1, table.shape[1], -1)
        return table.gather(2, index).reshape(ctx.shape), None, None
