"""What tests share: where the real samples lie, and weights made from their names."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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


def named_normal(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    """The standard normal float32 array that the golden files call by `tag`."""
    return np.random.default_rng(zlib.crc32(tag.encode())).standard_normal(shape).astype(np.float32)


def named_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value that the golden files give the state-dict entry `name`."""
    x = named_normal(name, shape)
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(x)
    if name.endswith("running_mean"):
        return 0.1 * x
    if name.endswith("weight") and len(shape) == 1:
        return 1 + 0.1 * x
    if name.endswith("bias"):
        return 0.1 * x
    if len(shape) >= 4:
        fan_in = int(np.prod(shape[1:]))
    elif len(shape) == 3:
        fan_in = shape[0] * shape[1]
    else:
        fan_in = shape[0] if name.endswith("kernel") else shape[1]
    return (x / np.sqrt(fan_in)).astype(np.float32)


def load_named_weights(module: Any) -> Any:
    """Fills every entry of a module's state dict from its name; returns the module."""
    import torch

    state = module.state_dict()
    for name, value in state.items():
        if not name.endswith("num_batches_tracked"):
            value.copy_(torch.from_numpy(named_weight(name, tuple(value.shape))))
    return module
