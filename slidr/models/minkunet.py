"""MinkUNet (Res16UNet): the voxel student, a sparse U-Net with residual blocks.

Stem, four times down, four times up with skips, a linear head. State-dict names and shapes are those of the
published checkpoints, whichever engine runs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal

from torch import nn

import slidr.sparse.modules
from slidr.config import MINKUNET_STRIDE
from slidr.sparse.tensor import SparseTensor, sort_rows

Engine = Literal["torch", "minkowski"]
CHANNELS = (32, 64, 128, 256, 256, 128, 96, 96)
STEM = 32


def layers_of(engine: Engine) -> ModuleType:
    """The module with an engine's layers: Convolution, TransposedConvolution, BatchNorm, concatenate."""
    if engine == "torch":
        return slidr.sparse.modules
    if engine == "minkowski":
        from slidr.sparse import minkowski

        return minkowski
    raise ValueError(f"engine: got {engine!r}, expected 'torch' or 'minkowski'")


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a multiple of 8, at least 8; unchanged for width 1."""
    return channels if width == 1.0 else max(8, round(channels * width / 8) * 8)


class ResidualBlock(nn.Module):
    """conv3, norm, ReLU, conv3, norm, + shortcut, ReLU; the shortcut is conv1 + norm if channels change."""

    def __init__(self, layers: Any, c_in: int, c_out: int, bn_momentum: float) -> None:
        super().__init__()
        # As published: norms inside a block keep PyTorch's momentum, only the shortcut's follows the config.
        self.conv1, self.norm1 = layers.Convolution(c_in, c_out, 3), layers.BatchNorm(c_out)
        self.conv2, self.norm2 = layers.Convolution(c_out, c_out, 3), layers.BatchNorm(c_out)
        self.downsample = (
            nn.Sequential(layers.Convolution(c_in, c_out, 1), layers.BatchNorm(c_out, bn_momentum))
            if c_in != c_out
            else None
        )

    def forward(self, x: Any) -> Any:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.conv2(self.conv1(x), norm=self.norm1)
        return self.norm2(y, residual=shortcut, relu=True)


class MinkUNet(nn.Module):
    """A sparse U-Net of `blocks` residual blocks per stage; `forward` keeps the rows in input order.

    Features (V, in_channels) at stride-1 voxels become (V, out_channels), L2-normalised per row if
    `normalize`. `bn_momentum` applies to stem, down, up and shortcut norms. `width` scales every hidden
    channel count. With `azimuth_cells`, a multiple of 16, the second axis closes to a circle of that many cells.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        in_channels: int = 1,
        out_channels: int = 64,
        normalize: bool = True,
        bn_momentum: float = 0.05,
        engine: Engine = "torch",
        width: float = 1.0,
        azimuth_cells: int | None = None,
    ) -> None:
        super().__init__()
        if azimuth_cells is not None and (azimuth_cells < 1 or azimuth_cells % MINKUNET_STRIDE):
            raise ValueError(
                f"MinkUNet: got azimuth_cells {azimuth_cells}, expected a multiple of its stride, {MINKUNET_STRIDE}"
            )
        layers = layers_of(engine)
        self.engine, self.normalize = engine, normalize
        self.azimuth_cells = azimuth_cells
        stem = scaled(STEM, width)
        c1, c2, c3, c4, c5, c6, c7, c8 = (scaled(c, width) for c in CHANNELS)

        def stage(c_in: int, c_out: int, depth: int) -> nn.Sequential:
            ends = [c_in] + [c_out] * depth
            return nn.Sequential(*(ResidualBlock(layers, a, c_out, bn_momentum) for a in ends[:-1]))

        def norm(channels: int) -> nn.Module:
            return layers.BatchNorm(channels, bn_momentum)

        self.conv0p1s1, self.bn0 = layers.Convolution(in_channels, stem, 3), norm(stem)
        self.conv1p1s2, self.bn1 = layers.Convolution(stem, stem, 2, stride=2), norm(stem)
        self.block1 = stage(stem, c1, blocks[0])
        self.conv2p2s2, self.bn2 = layers.Convolution(c1, c1, 2, stride=2), norm(c1)
        self.block2 = stage(c1, c2, blocks[1])
        self.conv3p4s2, self.bn3 = layers.Convolution(c2, c2, 2, stride=2), norm(c2)
        self.block3 = stage(c2, c3, blocks[2])
        self.conv4p8s2, self.bn4 = layers.Convolution(c3, c3, 2, stride=2), norm(c3)
        self.block4 = stage(c3, c4, blocks[3])
        self.convtr4p16s2, self.bntr4 = layers.TransposedConvolution(c4, c5), norm(c5)
        self.block5 = stage(c5 + c3, c5, blocks[4])
        self.convtr5p8s2, self.bntr5 = layers.TransposedConvolution(c5, c6), norm(c6)
        self.block6 = stage(c6 + c2, c6, blocks[5])
        self.convtr6p4s2, self.bntr6 = layers.TransposedConvolution(c6, c7), norm(c7)
        self.block7 = stage(c7 + c1, c7, blocks[6])
        self.convtr7p2s2, self.bntr7 = layers.TransposedConvolution(c7, c8), norm(c8)
        self.block8 = stage(c8 + stem, c8, blocks[7])
        self.final = layers.Convolution(c8, out_channels, 1, bias=True)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Features for every voxel of `x`, in the order of its rows."""
        given = x
        if self.azimuth_cells is not None:
            x = SparseTensor(x.features, x.coordinates, self.azimuth_cells)
        if self.engine == "minkowski":
            features = layers_of(self.engine).run(self._unet, x)
        else:
            ordered = sort_rows(x)
            features = self._unet(ordered.tensor).features
            features = features if ordered.back is None else features[ordered.back]
        if self.normalize:
            features = nn.functional.normalize(features, dim=1)
        return given.replace(features)

    def _unet(self, x: Any) -> Any:
        join = layers_of(self.engine).concatenate
        skip1 = self.bn0(self.conv0p1s1(x), relu=True)
        skip2 = self.block1(self.bn1(self.conv1p1s2(skip1), relu=True))
        skip4 = self.block2(self.bn2(self.conv2p2s2(skip2), relu=True))
        skip8 = self.block3(self.bn3(self.conv3p4s2(skip4), relu=True))
        y = self.block4(self.bn4(self.conv4p8s2(skip8), relu=True))
        y = self.block5(join(self.bntr4(self.convtr4p16s2(y), relu=True), skip8))
        y = self.block6(join(self.bntr5(self.convtr5p8s2(y), relu=True), skip4))
        y = self.block7(join(self.bntr6(self.convtr6p4s2(y), relu=True), skip2))
        y = self.block8(join(self.bntr7(self.convtr7p2s2(y), relu=True), skip1))
        return self.final(y)


class MinkUNet34C(MinkUNet):
    """Res16UNet34C: 37.85 M parameters at 64 outputs, the published student."""

    def __init__(self, in_channels: int = 1, out_channels: int = 64, **options: Any) -> None:
        super().__init__((2, 3, 4, 6, 2, 2, 2, 2), in_channels, out_channels, **options)


class MinkUNet18(MinkUNet):
    """The same layout with two blocks in every stage."""

    def __init__(self, in_channels: int = 1, out_channels: int = 64, **options: Any) -> None:
        super().__init__((2,) * 8, in_channels, out_channels, **options)


class MinkUNet14(MinkUNet):
    """The same layout with one block in every stage."""

    def __init__(self, in_channels: int = 1, out_channels: int = 64, **options: Any) -> None:
        super().__init__((1,) * 8, in_channels, out_channels, **options)


__all__ = ["MinkUNet", "MinkUNet14", "MinkUNet18", "MinkUNet34C", "ResidualBlock"]
