"""The 3D networks that can be taught, and the one way to ask any of them for features."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from slidr.config import StudentConfig, StudentName
from slidr.models.minkunet import MinkUNet14, MinkUNet18, MinkUNet34C
from slidr.models.voxelnet import VoxelNet, bev_features
from slidr.shapes import Float
from slidr.sparse import SparseTensor
from slidr.types import PairBatch, ScanBatch

# What VoxelNet's grid covers: low corner, high corner; metres, lidar frame. `voxelize_grid` bins the same.
BEV_RANGE = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)

MINKUNETS: dict[StudentName, Callable[..., nn.Module]] = {
    "minkunet34c": MinkUNet34C,
    "minkunet18": MinkUNet18,
    "minkunet14": MinkUNet14,
}


def build_student(config: StudentConfig, normalize: bool = True, azimuth_cells: int | None = None) -> nn.Module:
    """The configured student, randomly initialised; `normalize` puts its output on the unit sphere.

    `azimuth_cells` closes a MinkUNet's azimuth to a circle of that many cells.
    """
    if config.name == "voxelnet":
        return VoxelNet(in_channels=4, out_channels=config.out_channels)
    return MINKUNETS[config.name](
        in_channels=1,
        out_channels=config.out_channels,
        normalize=normalize,
        bn_momentum=config.bn_momentum,
        engine=config.engine,
        width=config.width,
        azimuth_cells=azimuth_cells,
    )


def student_rows(student: nn.Module, batch: PairBatch | ScanBatch) -> Float[Tensor, "R C"]:
    """The student's features for a batch: one row a voxel, or one row a point for a bird's-eye-view student."""
    if isinstance(student, VoxelNet):
        assert isinstance(batch, PairBatch), "a VoxelNet has no per-voxel output to segment"
        bev = student(batch.features, batch.coordinates, len(batch.tokens))
        return bev_features(bev, batch.points, BEV_RANGE)
    return student(SparseTensor(batch.features, batch.coordinates)).features
