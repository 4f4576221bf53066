"""What tests share: where the real samples lie, one Ray cluster, a small world, an object store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from hypothesis import settings

# Before anything imports ray: no telemetry, no token written into the home directory.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")
# Before anything imports triton: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# And before Ray's workers inherit their environment: what the tests' own S3 server is asked with.
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}

# A busy machine must not fail a property.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

SHARED = Path(os.environ.get("SLIDR_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared_folder(name: str) -> Path:
    """A folder of shared test material, or a skip that says which one is missing."""
    folder = SHARED / name
    if not folder.exists():
        pytest.skip(f"{folder} is absent: this test compares with real samples that are not part of the project")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    return shared_folder("golden")


@pytest.fixture(scope="session")
def manifest(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "manifest.json").read_text())


@pytest.fixture(scope="session")
def real_nuscenes() -> Path:
    """A devkit-loadable v1.0-mini dataroot with one real keyframe."""
    return shared_folder("data/nuscenes")


@pytest.fixture(scope="session")
def real_semantic_kitti() -> Path:
    return shared_folder("data/semantic_kitti/dataset")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The session's one Ray cluster: three CPUs on loopback."""
    from slidr.cluster import session
    from slidr.config import ClusterConfig

    session.start(ClusterConfig(), num_cpus=3)
    yield
    session.stop()


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic nuScenes dataroot: 4 scenes (2 parametrize, 1 verify, 1 val) of 2 keyframes, images of 160 x 90."""
    from slidr.data.synthetic import write_dataroot

    splits = {"parametrize": 2, "verify": 1, "val": 1}
    return write_dataroot(tmp_path_factory.mktemp("world"), splits=splits, keyframes=2, scale=0.1)


@pytest.fixture(scope="session")
def trainable(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pretraining of two steps in one process: its frame table and superpixels exist."""
    from slidr.cluster.superpixels import compute_map, folder_of
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

    folder = tmp_path_factory.mktemp("trainable")
    config = Config(
        data=DataConfig(
            root=str(tiny_world),
            frames=str(folder / "frames.parquet"),
            max_val_frames=1,
            image_size=(56, 104),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
            augment=AugmentConfig(crop=False, drop_cuboid=False),
        ),
        superpixels=SuperpixelConfig(folder=str(folder / "superpixels"), segments=40, sigma=1.0),
        student=StudentConfig(name="minkunet14", width=0.25),
        teacher=TeacherConfig(name="efficientnet_lite0", weights=None),
        optim=OptimConfig(lr=1e-3, batch_size=1, epochs=1, max_steps=2),
        run=RunConfig(folder=str(folder / "runs"), name="run", log_every=1, score_frames=1),
        cluster=ClusterConfig(num_workers=0),
    )
    write_frames(read_frames(tiny_world), config.data.frames)
    for image in FrameTable.open(config.data.frames).select(("parametrize", "verify")).images():
        compute_map(image, config.data.root, folder_of(config.superpixels), config.superpixels)
    return config


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """An empty bucket of a real S3 server, as a URI that names its endpoint."""
    pytest.importorskip("moto", reason="moto's S3 server is part of the development extra")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = "from moto.server import main; import sys; main(sys.argv[1:])"
    server = subprocess.Popen(
        [sys.executable, "-c", command, "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(port, server)
        filesystem = pyarrow.fs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}", scheme="http", allow_bucket_creation=True
        )
        filesystem.create_dir("bucket")
        yield f"s3://bucket/data?endpoint_override=127.0.0.1:{port}&scheme=http"
    finally:
        server.terminate()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the S3 server ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the S3 server does not answer")
