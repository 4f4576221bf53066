"""A run small enough to be disturbed often: its data, its config, itself undisturbed; what to disturb it on.

At the end of a session that made faults happen, the table of what they cost (see `fault_book`). SLIDR_CHAOS_ROUNDS:
how often each of `make chaos`'s tests is run, each time with faults at other moments; SLIDR_CHAOS_RESULTS: the file
that keeps the table as JSON.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from fault_book import FaultBook
from faults import FaultCluster
from PIL import Image
from training_runs import named

from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import compute_map, compute_superpixels
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
from slidr.data.frames import FrameTable, write_frames
from slidr.data.image_list import ImageRef
from slidr.data.nuscenes import read_frames

ROUNDS = int(os.environ.get("SLIDR_CHAOS_ROUNDS", "1"))
BOOK = FaultBook()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "chaos_round" in metafunc.fixturenames:
        metafunc.parametrize("chaos_round", range(ROUNDS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not (BOOK.entries or BOOK.skipped):
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(BOOK.table())
    path = os.environ.get("SLIDR_CHAOS_RESULTS")
    if path:
        BOOK.write(Path(path), ROUNDS)
        terminalreporter.write_line(f"also in {path}")


@pytest.fixture
def book() -> FaultBook:
    """Where a fault that a test makes happen is entered."""
    return BOOK


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[FaultCluster]:
    with FaultCluster(cpus=[2, 2]) as cluster:
        yield cluster


@pytest.fixture
def cluster(one_cluster: FaultCluster) -> FaultCluster:
    """A head without CPUs and two nodes of two, whatever an earlier test has killed."""
    while len(one_cluster.nodes) < 2:
        one_cluster.add_node(2)
    return one_cluster


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
        optim=OptimConfig(lr=5e-4, epochs=10, max_steps=10, batch_size=2),
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


@pytest.fixture(scope="session")
def large_images(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The tiny world, with images large enough for superpixels to take a while: time to be killed in."""
    folder, frames = tmp_path_factory.mktemp("large"), []
    shutil.copytree(tiny_world, folder / "root")
    for frame in read_frames(tiny_world, "v1.0-trainval"):
        for camera in frame.cameras:
            Image.open(tiny_world / camera.image_path).resize((480, 270)).save(folder / "root" / camera.image_path)
        cameras = tuple(replace(camera, width=480, height=270) for camera in frame.cameras)
        frames.append(replace(frame, cameras=cameras))
    write_frames(frames, str(folder / "frames.parquet"))
    return DataConfig(root=str(folder / "root"), frames=str(folder / "frames.parquet"))


@pytest.fixture(scope="session")
def images(large_images: DataConfig) -> list[ImageRef]:
    splits = (large_images.train_split, large_images.val_split)
    return FrameTable.open(large_images.frames).select(splits).images()


@pytest.fixture(scope="session")
def undisturbed(
    large_images: DataConfig, images: list[ImageRef], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The label maps as one process makes them that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for image in images:
        compute_map(image, large_images.root, str(folder), SuperpixelConfig(sigma=1.0))
    return {path.name: path.read_bytes() for path in folder.iterdir()}
