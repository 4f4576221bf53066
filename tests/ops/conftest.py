"""The real keyframe, read by plain loops over its tables rather than by the project's own readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from slidr.ops.geometry import camera_from_lidar, pose
from slidr.types import CAMERA_CHANNELS, Camera

# A first call may import or compile; on a busy machine no deadline says anything about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def keyframe(real_nuscenes: Path) -> dict[str, dict[str, Any]]:
    """Per sensor channel: file, size, timestamp, and the records of its calibration and ego pose."""
    tables = {
        name: json.loads((real_nuscenes / "v1.0-mini" / f"{name}.json").read_text())
        for name in ("sample_data", "calibrated_sensor", "ego_pose")
    }
    calibration = {row["token"]: row for row in tables["calibrated_sensor"]}
    ego = {row["token"]: row for row in tables["ego_pose"]}
    return {
        row["filename"].split("/")[1]: {
            **row,
            "calibration": calibration[row["calibrated_sensor_token"]],
            "ego": ego[row["ego_pose_token"]],
        }
        for row in tables["sample_data"]
        if row["is_key_frame"]
    }


@pytest.fixture(scope="session")
def real_cloud(real_nuscenes: Path, keyframe: dict[str, dict[str, Any]]) -> np.ndarray:
    """x, y, z, intensity of the sweep, float32."""
    return np.fromfile(real_nuscenes / keyframe["LIDAR_TOP"]["filename"], np.float32).reshape(-1, 5)[:, :4]


@pytest.fixture(scope="session")
def real_cameras(keyframe: dict[str, dict[str, Any]]) -> tuple[Camera, ...]:
    def matrix(record: dict[str, Any]) -> np.ndarray:
        return pose(record["rotation"], record["translation"])

    lidar = keyframe["LIDAR_TOP"]
    cameras = []
    for channel in CAMERA_CHANNELS:
        row = keyframe[channel]
        ego_from_camera, global_from_ego = matrix(row["calibration"]), matrix(row["ego"])
        cameras.append(
            Camera(
                channel=channel,
                token=row["token"],
                image_path=row["filename"],
                width=row["width"],
                height=row["height"],
                timestamp=row["timestamp"],
                intrinsics=np.array(row["calibration"]["camera_intrinsic"]),
                ego_from_camera=ego_from_camera,
                global_from_ego=global_from_ego,
                camera_from_lidar=camera_from_lidar(
                    ego_from_camera, global_from_ego, matrix(lidar["calibration"]), matrix(lidar["ego"])
                ),
            )
        )
    return tuple(cameras)


@pytest.fixture(scope="session")
def front_image(real_nuscenes: Path, keyframe: dict[str, dict[str, Any]]) -> np.ndarray:
    return np.array(Image.open(real_nuscenes / keyframe["CAM_FRONT"]["filename"]))


@pytest.fixture(scope="session")
def front_superpixels(golden: Path) -> np.ndarray:
    return np.array(Image.open(golden / "slic" / "CAM_FRONT.png"))
