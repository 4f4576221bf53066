"""Unit-length bilinear upsampling that is never carried out.

A teacher's features are coarse; the method asks for them at full size: upsampled bilinearly, scaled to unit length at
every pixel, averaged over superpixels. The full-size map is the largest tensor of a training step by far, yet both
what it is asked for and its lengths follow from the coarse map:

    x[p] = sum over the 4 cells around pixel p of w[p, cell] f[cell]
    |x[p]|^2 is a quadratic form of the weights with the dot products of neighbouring cells
    mean over segment s of x[p] / |x[p]| = sum over cells of (sum over p in s of w[p, cell] / |x[p]|) f[cell] / |s|

The last is a small matrix (segments x cells) times the coarse map. Values and gradients are those of
``normalize(interpolate(f, align_corners=True))``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from slidr.shapes import Float, Int64


@dataclass(frozen=True)
class UpsampledMap:
    """A coarse feature map that stands for its upsampled, unit-length version.

    The map is stretched over `grid` pixels (align_corners), of which the top left `size` count. A vector shorter than
    `eps` is divided by `eps`.
    """

    features: Float[Tensor, "B C h w"]
    grid: tuple[int, int]  # height, width
    size: tuple[int, int]  # height, width
    eps: float = 1e-6

    def cpu(self) -> UpsampledMap:
        """The same map on the CPU."""
        return replace(self, features=self.features.cpu())

    def dense(self) -> Float[Tensor, "B C H W"]:
        """The full-size map itself."""
        full = F.interpolate(self.features.float(), size=self.grid, mode="bilinear", align_corners=True)
        return F.normalize(full[..., : self.size[0], : self.size[1]], dim=1, eps=self.eps)

    def at(self, pixel_index: Int64[Tensor, "P 3"]) -> Float[Tensor, "P C"]:
        """The features of pixels (image, row, column)."""
        features = self.features.float()
        _, channels, height, width = features.shape
        cells = features.permute(0, 2, 3, 1).reshape(-1, channels)
        image, row, column = pixel_index.unbind(1)
        rows, columns = self._axis(0), self._axis(1)
        total = cells.new_zeros(len(pixel_index), channels)
        for near_row, row_weight in rows.at(row):
            for near_column, column_weight in columns.at(column):
                cell = (image * height + near_row) * width + near_column
                total = total + cells.index_select(0, cell) * (row_weight * column_weight)[:, None]
        return F.normalize(total, dim=1, eps=self.eps)

    def segment_means(
        self, labels: Int64[Tensor, "B H W"], segments: int
    ) -> tuple[Float[Tensor, "B S C"], Int64[Tensor, "B S"]]:
        """Mean feature of the pixels of each label of each image, and how many they are; 0 where there are none."""
        batch = len(self.features)
        if labels.shape != (batch, *self.size):
            raise ValueError(f"segment_means: maps {(batch, *self.size)} but labels {tuple(labels.shape)}")
        if labels.numel() > 0 and (int(labels.min()) < 0 or int(labels.max()) >= segments):
            raise ValueError(
                f"segment_means: labels span {int(labels.min())} to {int(labels.max())}, expected 0 to {segments - 1}"
            )
        features = self.features.float()
        inverse = self._lengths(features).clamp_min(self.eps).reciprocal()
        segment = labels + torch.arange(batch, device=labels.device)[:, None, None] * segments
        counts = torch.bincount(segment.flatten(), minlength=batch * segments).view(batch, segments)
        shares = self._shares(inverse, segment, batch * segments).view(batch, segments, -1)
        sums = torch.bmm(shares, features.flatten(2).transpose(1, 2))
        return sums / counts.clamp_min(1)[..., None], counts

    def _axis(self, axis: int) -> _Axis:
        return _Axis(self.features.shape[2 + axis], self.grid[axis], self.size[axis], self.features.device)

    def _lengths(self, features: Float[Tensor, "B C h w"]) -> Float[Tensor, "B H W"]:
        """|x| of every pixel, from dot products of neighbouring cells."""
        right = F.pad(features[..., 1:], (0, 1))
        below = F.pad(features[..., 1:, :], (0, 0, 0, 1))
        corner = F.pad(features[..., 1:, 1:], (0, 1, 0, 1))
        own = features.square().sum(1)
        beside = (features * right).sum(1)
        beneath = (features * below).sum(1)
        across = ((features * corner).sum(1) + (right * below).sum(1)) / 2
        products = torch.cat([torch.cat([own, beside], 2), torch.cat([beneath, across], 2)], 1)
        squares = self._axis(0).quadratic() @ products @ self._axis(1).quadratic().T
        # Rounding may leave a tiny negative number; below eps the length does not matter.
        return squares.clamp_min(self.eps**2).sqrt()

    def _shares(
        self, inverse: Float[Tensor, "B H W"], segment: Int64[Tensor, "B H W"], segments: int
    ) -> Float[Tensor, " SC"]:
        """For each segment and cell, the sum of the segment's pixel weights on the cell, over their lengths."""
        _, _, height, width = self.features.shape
        rows, columns = self._axis(0), self._axis(1)
        total = inverse.new_zeros(segments * height * width)
        first = segment * (height * width)
        for near_row, row_weight in rows.neighbours():
            for near_column, column_weight in columns.neighbours():
                cell = first + (near_row * width)[:, None] + near_column
                weight = inverse * row_weight[:, None] * column_weight
                total = total.index_add(0, cell.flatten(), weight.flatten())
        return total


class _Axis:
    """Bilinear weights along one axis: pixel p lies between cells low[p] and low[p] + 1, at fraction part[p]."""

    def __init__(self, cells: int, grid: int, size: int, device: torch.device) -> None:
        scale = (cells - 1) / (grid - 1) if grid > 1 else 0.0
        place = torch.arange(size, device=device) * scale
        self.cells = cells
        self.low = place.floor().long().clamp(max=max(cells - 2, 0))
        self.high = (self.low + 1).clamp(max=cells - 1)
        self.part = place - self.low

    def neighbours(self) -> list[tuple[Int64[Tensor, " P"], Float[Tensor, " P"]]]:
        """(cell, weight) of both neighbours, for every pixel."""
        return [(self.low, 1 - self.part), (self.high, self.part)]

    def at(self, pixels: Int64[Tensor, " P"]) -> list[tuple[Int64[Tensor, " P"], Float[Tensor, " P"]]]:
        """The same for some pixels."""
        return [(cell[pixels], weight[pixels]) for cell, weight in self.neighbours()]

    def quadratic(self) -> Float[Tensor, "P T"]:
        """What the product of a cell with itself, then with the next one, weighs in a pixel's squared length."""
        table = self.part.new_zeros(len(self.low), 2 * self.cells)
        pixel = torch.arange(len(self.low), device=self.low.device)
        for cell, weight in self.neighbours():
            table.index_put_((pixel, cell), weight.square(), accumulate=True)
        table[pixel, self.cells + self.low] = 2 * self.part * (1 - self.part)
        return table
