"""A small world with everything in place: frame table, superpixels, and a config that trains on it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from slidr.cluster.superpixels import compute_images, compute_map, folder_of
from slidr.config import (
    AugmentConfig,
    ClusterConfig,
    Config,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    SuperpixelConfig,
    TeacherConfig,
    VoxelConfig,
)
from slidr.data.frames import FrameTable, write_frames
from slidr.data.nuscenes import read_frames


@pytest.fixture(scope="session")
def prepared(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("preflight")
    config = Config(
        data=DataConfig(
            root=str(tiny_world),
            frames=str(folder / "frames.parquet"),
            image_size=(56, 104),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
            augment=AugmentConfig(crop=False, drop_cuboid=False),
        ),
        superpixels=SuperpixelConfig(folder=str(folder / "superpixels"), segments=40, sigma=1.0),
        student=StudentConfig(name="minkunet14", width=0.25),
        teacher=TeacherConfig(name="efficientnet_lite0", weights=None),
        optim=OptimConfig(batch_size=1, epochs=2),
        run=RunConfig(folder=str(folder / "runs"), score_frames=1),
        cluster=ClusterConfig(local_cpus=2),
    )
    write_frames(read_frames(tiny_world), config.data.frames)
    table = FrameTable.open(config.data.frames).select(("parametrize", "verify"))
    compute_images([], config.data.root, config.superpixels, config.cluster, progress=False)  # writes the parameters
    for image in table.images():
        compute_map(image, config.data.root, folder_of(config.superpixels), config.superpixels)
    return config


@pytest.fixture
def spoilable(prepared: Config, tmp_path: Path) -> Config:
    """The same with copies of its files, which a test may damage."""
    shutil.copytree(prepared.data.root, tmp_path / "root")
    shutil.copytree(prepared.superpixels.folder, tmp_path / "superpixels")
    shutil.copy(prepared.data.frames, tmp_path / "frames.parquet")
    return replace(
        prepared,
        data=replace(prepared.data, root=str(tmp_path / "root"), frames=str(tmp_path / "frames.parquet")),
        superpixels=replace(prepared.superpixels, folder=str(tmp_path / "superpixels")),
        run=replace(prepared.run, folder=str(tmp_path / "runs")),
    )
