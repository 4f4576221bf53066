"""VoxelNet: the bird's-eye-view student, a sparse encoder with spconv's parameter names and weight layout.

Submanifold and strided 3x3x3 convolutions, each followed by norm and ReLU, bring a (40, 1024, 1024) grid of
voxels to one dense (128, 128) map. All grids here run (z, y, x), as spconv's do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slidr.shapes import Float, Int
from slidr.sparse.coordinates import CoordinateError, Triple
from slidr.sparse.functional import sparse_conv
from slidr.sparse.norm import norm_relu
from slidr.sparse.tensor import SparseTensor, sort_rows

GRID: Triple = (40, 1024, 1024)  # z, y, x
BEV_STRIDE = 8
CUBE: Triple = (3, 3, 3)


class SpatialConvolution(nn.Module):
    """A convolution without bias whose ``weight`` is [C_out, kz, ky, kx, C_in], as spconv stores it.

    Without `stride` it keeps the voxels (submanifold); with one, an output exists wherever its window meets an
    input. A 1x1x1 weight is read as spconv reads it, its memory taken for [C_in, C_out]: published weights were
    trained that way.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: Triple = CUBE,
        stride: Triple | None = None,
        padding: Triple = (0, 0, 0),
    ) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        bound = 1 / math.sqrt(c_in * math.prod(kernel))
        self.weight = nn.Parameter(torch.empty(c_out, *kernel, c_in).uniform_(-bound, bound))

    def kernels(self) -> Float[Tensor, "K C D"]:
        """The weight in the engine's order: one [C_in, C_out] matrix per offset, z (first axis) fastest."""
        if self.kernel == (1, 1, 1):
            return self.weight.reshape(1, self.weight.shape[4], self.weight.shape[0])
        return self.weight.permute(3, 2, 1, 4, 0).flatten(0, 2)

    def forward(self, x: SparseTensor, shape: Triple) -> tuple[SparseTensor, Triple]:
        """The output and the shape of its grid, given the grid that `x` lies in."""
        if self.kernel == (1, 1, 1) and self.stride is None:
            return x.replace(x.features @ self.kernels()[0]), shape
        if self.stride is None:
            kernel_map = x.manager.submanifold(x.stride, self.kernel)
            return x.replace(sparse_conv(x.features, self.kernels(), kernel_map)), shape
        kernel_map, shape = x.manager.window(x.stride, self.kernel, self.stride, self.padding, shape)
        features = sparse_conv(x.features, self.kernels(), kernel_map)
        (sz, sy, sx), (fz, fy, fx) = x.stride, self.stride
        return SparseTensor.on(x.manager, (sz * fz, sy * fy, sx * fx), features), shape

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}"


def convolution_block(
    c_in: int, c_out: int, kernel: Triple = CUBE, stride: Triple | None = None, padding: Triple = (0, 0, 0)
) -> nn.Sequential:
    """Convolution, norm, ReLU; a container with the published names, run by `VoxelNet.forward`."""
    return nn.Sequential(
        SpatialConvolution(c_in, c_out, kernel, stride, padding),
        nn.BatchNorm1d(c_out, eps=1e-3, momentum=0.01),
        nn.ReLU(),
    )


class VoxelNet(nn.Module):
    """Voxel features and indices to an L2-normalised BEV map of stride 8 (rows y, columns x)."""

    def __init__(self, in_channels: int = 4, out_channels: int = 64) -> None:
        super().__init__()
        half: Triple = (2, 2, 2)
        self.conv_input = convolution_block(in_channels, 16)
        self.conv1 = nn.Sequential(convolution_block(16, 16))
        self.conv2 = nn.Sequential(
            convolution_block(16, 32, CUBE, half, (1, 1, 1)),
            convolution_block(32, 32),
            convolution_block(32, 32),
        )
        self.conv3 = nn.Sequential(
            convolution_block(32, 64, CUBE, half, (1, 1, 1)),
            convolution_block(64, 64),
            convolution_block(64, 64),
        )
        self.conv4 = nn.Sequential(
            convolution_block(64, 64, CUBE, half, (0, 1, 1)),
            convolution_block(64, 64),
            convolution_block(64, 64),
        )
        self.conv_out = convolution_block(64, 128, (3, 1, 1), (2, 1, 1))
        self.final = SpatialConvolution(128, out_channels, (1, 1, 1))

    def forward(
        self, features: Float[Tensor, "V C"], indices: Int[Tensor, "V 4"], batch_size: int
    ) -> Float[Tensor, "B D 128 128"]:
        """The BEV map of voxels `indices` [batch, z, y, x] in a (40, 1024, 1024) grid; zero where empty."""
        _check_in_grid(indices, batch_size)
        x, shape = sort_rows(SparseTensor(features, indices)).tensor, GRID
        blocks = [self.conv_input, *self.conv1, *self.conv2, *self.conv3, *self.conv4, self.conv_out]
        for convolution, norm, _ in blocks:
            x, shape = convolution(x, shape)
            x = x.replace(_norm_relu(x.features, norm))
        x, shape = self.final(x, shape)
        return to_bev(x.replace(nn.functional.normalize(x.features, dim=1)), shape, batch_size)


def _norm_relu(features: Float[Tensor, "V C"], norm: nn.Module) -> Float[Tensor, "V C"]:
    if type(norm) is not nn.BatchNorm1d:  # a norm over all workers must be entered even by one whose cloud is empty
        return torch.relu(norm(features))
    return norm_relu(features, norm, None, True) if len(features) > 0 else features


def to_bev(x: SparseTensor, shape: Triple, batch_size: int) -> Float[Tensor, "B CZ Y X"]:
    """Features on their dense (z, y, x) grid, height folded into channels: c, z at channel c * Z + z."""
    z, y, x_size = shape
    stride = x.coordinates.new_tensor((1, *x.stride))
    batch, iz, iy, ix = (x.coordinates // stride).long().unbind(1)
    cell = ((batch * z + iz) * y + iy) * x_size + ix
    channels = x.features.shape[1]
    dense = x.features.new_zeros(batch_size * z * y * x_size, channels).index_copy(0, cell, x.features)
    return dense.view(batch_size, z, y, x_size, channels).permute(0, 4, 1, 2, 3).flatten(1, 2).contiguous()


def bev_features(
    bev: Float[Tensor, "B C H W"], points: Float[Tensor, "N 4"], point_cloud_range: Sequence[float]
) -> Float[Tensor, "N C"]:
    """Bilinear samples of a BEV map at points [batch, x, y, z] (metres).

    `point_cloud_range` is (x, y, z) of the low, then of the high corner. Cell (row, column) lies at
    (y_min + row * cell height, x_min + column * cell width): a stride-8 output is centred on voxel 8 * index.
    Points beyond the outermost cells take their values.
    """
    height, width = bev.shape[2:]
    x_min, y_min, _, x_max, y_max, _ = point_cloud_range
    column = ((points[:, 1] - x_min) * (width / (x_max - x_min))).clamp(0, width - 1)
    row = ((points[:, 2] - y_min) * (height / (y_max - y_min))).clamp(0, height - 1)
    left, top = column.floor().long(), row.floor().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    along, down = (column - left)[:, None].to(bev.dtype), (row - top)[:, None].to(bev.dtype)
    cells = bev.permute(0, 2, 3, 1).reshape(-1, bev.shape[1])
    first_row = points[:, 0].long() * height

    def at(y: Tensor, x: Tensor) -> Tensor:
        return cells.index_select(0, (first_row + y) * width + x)

    upper = torch.lerp(at(top, left), at(top, right), along)
    lower = torch.lerp(at(bottom, left), at(bottom, right), along)
    return torch.lerp(upper, lower, down)


def _check_in_grid(indices: Tensor, batch_size: int) -> None:
    if len(indices) == 0:
        return
    low, high = (limit.tolist() for limit in torch.aminmax(indices, dim=0))
    ends = (batch_size, *GRID)
    if min(low) < 0 or any(h >= end for h, end in zip(high, ends, strict=True)):
        raise CoordinateError(
            f"VoxelNet: indices [batch, z, y, x] span {low} to {high}, expected within {ends}; "
            "voxelize with the model's range and voxel size, and pass the batch's number of clouds"
        )
