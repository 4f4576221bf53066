"""Made-up frames and real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidr.data.nuscenes import read_frames
from slidr.ops.geometry import pose
from slidr.types import CAMERA_CHANNELS, Camera, Frame

MakeFrames = Callable[..., list[Frame]]


def _frame(number: int, scene: str, splits: tuple[str, ...], cameras: int) -> Frame:
    rng = np.random.default_rng(number)

    def some_pose() -> np.ndarray:
        return pose(rng.normal(size=4), rng.normal(size=3))

    def some_intrinsics() -> np.ndarray:
        focal, u, v = rng.uniform(400, 1600, size=3)
        return np.array([[focal, 0, u], [0, focal, v], [0, 0, 1]])

    return Frame(
        token=f"frame-{number:05d}",
        scene=scene,
        timestamp=1_500_000_000_000_000 + number,
        lidar_token=f"lidar-{number}",
        lidar_path=f"samples/LIDAR_TOP/{number}.bin",
        label_path=f"lidarseg/{number}.bin" if number % 2 else None,
        ego_from_lidar=some_pose(),
        global_from_ego=some_pose(),
        cameras=tuple(
            Camera(
                channel=channel,
                token=f"{channel}-{number}",
                image_path=f"samples/{channel}/{number}.jpg",
                width=1600,
                height=900,
                timestamp=1_500_000_000_000_000 + number,
                intrinsics=some_intrinsics(),
                ego_from_camera=some_pose(),
                global_from_ego=some_pose(),
                camera_from_lidar=some_pose(),
            )
            for channel in CAMERA_CHANNELS[:cameras]
        ),
        previous=None if number % 3 == 0 else f"frame-{number - 1:05d}",
        next=None if number % 3 == 2 else f"frame-{number + 1:05d}",
        splits=splits,
    )


@pytest.fixture(scope="session")
def make_frames() -> MakeFrames:
    """frames(scenes, cameras=6): three frames a scene; every fifth scene is val, the others train."""

    def frames(scenes: int, cameras: int = 6) -> list[Frame]:
        return [
            _frame(3 * s + i, f"scene-{s:04d}", ("val",) if s % 5 == 4 else ("train", "parametrize"), cameras)
            for s in range(scenes)
            for i in range(3)
        ]

    return frames


@pytest.fixture(scope="session")
def real_frame(real_nuscenes: Path) -> Frame:
    return read_frames(str(real_nuscenes), "v1.0-mini")[0]


@pytest.fixture(scope="session")
def world_frames(tiny_world: Path) -> list[Frame]:
    return read_frames(str(tiny_world))


@pytest.fixture(scope="session")
def real_superpixels(real_frame: Frame, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of the real keyframe's superpixel maps, as the original implementation computed them."""
    folder = tmp_path_factory.mktemp("superpixels")
    for camera in real_frame.cameras:
        (folder / f"{camera.token}.png").write_bytes((golden / f"slic/{camera.channel}.png").read_bytes())
    return str(folder)


@pytest.fixture(scope="session")
def without_cameras(make_frames: MakeFrames) -> list[Frame]:
    return [replace(frame, cameras=()) for frame in make_frames(2)]
