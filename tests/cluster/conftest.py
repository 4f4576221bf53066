"""A run small enough to be disturbed often: its data, its config, itself undisturbed, and what it left."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_runs import named

from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import compute_superpixels
from slidr.config import (
    AugmentConfig,
    ClusterConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    SuperpixelConfig,
    TeacherConfig,
    VoxelConfig,
)
from slidr.data.frames import write_frames
from slidr.data.nuscenes import read_frames


@pytest.fixture(scope="session")
def base(tiny_world: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of 10 steps, 2 an epoch: its frame table and superpixels exist, and its networks are small."""
    folder = tmp_path_factory.mktemp("train")
    config = Config(
        data=DataConfig(
            root=str(tiny_world),
            frames=str(folder / "frames.parquet"),
            max_val_frames=2,
            image_size=(56, 104),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
            augment=AugmentConfig(crop=False, drop_cuboid=False),
        ),
        superpixels=SuperpixelConfig(folder=str(folder / "superpixels"), segments=40, sigma=1.0),
        student=StudentConfig(name="minkunet14", width=0.25),
        teacher=TeacherConfig(name="efficientnet_lite0", weights="imagenet"),
        loss=LossConfig(gather_negatives=True),
        # Gently: large steps, and Adam's division by tiny gradients, blow float32's rounding up within ten steps.
        optim=OptimConfig(lr=1e-3, epochs=10, max_steps=10, batch_size=2),
        run=RunConfig(folder=str(folder / "runs"), log_every=1, checkpoint_every=3, keep_checkpoints=9, score_frames=2),
        cluster=ClusterConfig(num_workers=0),
    )
    frames = read_frames(tiny_world, "v1.0-trainval")
    write_frames(frames, config.data.frames)
    report = compute_superpixels(frames, config.data, config.superpixels, config.cluster, progress=False)
    assert not report.failed
    return config


@pytest.fixture(scope="session")
def on_ray(base: Config) -> dict[int, Config]:
    """The same run on one and on two Ray workers."""
    configs = {workers: named(base, f"ray-{workers}", workers) for workers in (1, 2)}
    for config in configs.values():
        pretrain(config, progress=False)
    return configs
