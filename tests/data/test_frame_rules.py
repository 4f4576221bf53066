"""Frames that later steps could not work with are refused when they are written, by frame, camera, field and value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from slidr.data.frames import FrameTable, read_frames, write_frames
from slidr.data.nuscenes import read_frames as read_nuscenes
from slidr.data.storage import DataError
from slidr.types import Frame

MakeFrames = Callable[..., list[Frame]]


def _with_frame(frames: list[Frame], **changes: Any) -> list[Frame]:
    """The second frame changed."""
    return [frames[0], replace(frames[1], **changes), *frames[2:]]


def _with_camera(frames: list[Frame], **changes: Any) -> list[Frame]:
    """The third camera of the second frame changed."""
    cameras = list(frames[1].cameras)
    cameras[2] = replace(cameras[2], **changes)
    return _with_frame(frames, cameras=tuple(cameras))


def _pose(**entries: float) -> np.ndarray:
    matrix = np.eye(4)
    for place, value in entries.items():
        matrix[int(place[1]), int(place[2])] = value
    return matrix


K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
CAMERA = r"frame 'frame-00001' of 'scene-0000': CAM_BACK_RIGHT: "
FRAME = r"frame 'frame-00001' of 'scene-0000': "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intrinsics": np.zeros((3, 3))}, r"intrinsics has the last row \[0\.0, 0\.0, 0\.0\]; expected 0 0 1"),
        ({"intrinsics": K * [[-1], [1], [1]]}, r"intrinsics has focal lengths -500 and 500; expected positive"),
        ({"intrinsics": np.where(K == 320, np.nan, K)}, r"intrinsics is not finite"),
        ({"intrinsics": np.array([[1.0, 2, 0], [1, 2, 0], [0, 0, 1]])}, r"intrinsics cannot be inverted"),
        ({"intrinsics": np.eye(4)}, r"intrinsics: got the shape \(4, 4\); expected \(3, 3\)"),
        ({"intrinsics": "none"}, r"intrinsics: expected \(3, 3\) numbers, got 'none'"),
        ({"camera_from_lidar": np.eye(3)}, r"camera_from_lidar: got the shape \(3, 3\); expected \(4, 4\)"),
        ({"camera_from_lidar": np.zeros((4, 4))}, r"camera_from_lidar has the last row"),
        ({"camera_from_lidar": _pose(_03=np.inf)}, r"camera_from_lidar is not finite"),
        ({"camera_from_lidar": _pose(_03=1e30)}, r"camera_from_lidar moves by \[1e\+30, 0\.0, 0\.0\]"),
        ({"ego_from_camera": _pose(_00=0.001)}, r"ego_from_camera has no rotation in its upper left 3 x 3 block"),
        ({"ego_from_camera": _pose(_11=-1.0)}, r"ego_from_camera is mirrored: .* has determinant -1; expected \+1"),
        ({"global_from_ego": _pose(_00=1e200)}, r"global_from_ego has no rotation"),
        ({"width": 0}, r"width 0 pixels; expected 1 to 65535"),
        ({"height": -900}, r"height -900 pixels; expected 1 to 65535"),
        ({"height": 10**12}, r"height: expected int32, got 1000000000000"),
        ({"width": "wide"}, r"width: expected int32, got 'wide'"),
        ({"timestamp": 10**400}, r"timestamp: expected int64, got 1000"),
        ({"token": "a/b"}, r"token 'a/b' cannot name a file; expected no '/'"),
        ({"token": "a\\b"}, r"token 'a\\\\b' cannot name a file"),
        ({"token": ".."}, r"token '\.\.' cannot name a file"),
        ({"token": "a\0b"}, r"token 'a\\x00b' cannot name a file"),
        ({"token": ""}, r"token '' is empty"),
        ({"token": "x" * 201}, r"token 'x+\.\.\. has more than 200 bytes"),
        ({"token": "CAM_FRONT-0"}, r"token 'CAM_FRONT-0' is another image's, too"),
        ({"channel": "CAM_FRONT"}, r"channel comes twice in one frame"),
        ({"image_path": "../x.jpg"}, r"image_path '\.\./x\.jpg' leaves the data root"),
        ({"image_path": "/x.jpg"}, r"image_path '/x\.jpg' leaves the data root"),
        ({"image_path": "samples\\x.jpg"}, r"image_path .* has backslashes, as tables made on Windows do"),
        ({"image_path": "a\0.jpg"}, r"image_path .* has control characters"),
    ],
)
def test_a_camera_that_cannot_be_used_is_refused_by_name(
    make_frames: MakeFrames, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "f.parquet"
    camera = CAMERA if "channel" not in changes else CAMERA.replace("CAM_BACK_RIGHT", "CAM_FRONT")
    with pytest.raises(DataError, match=rf"f\.parquet: {camera}{message}"):
        write_frames(_with_camera(make_frames(1), **changes), str(path))
    assert not path.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ego_from_lidar": np.full((4, 4), np.nan)}, r"ego_from_lidar is not finite"),
        ({"global_from_ego": np.eye(4)[:3]}, r"global_from_ego: got the shape \(3, 4\); expected \(4, 4\)"),
        ({"lidar_path": ""}, r"lidar_path '' is empty"),
        ({"label_path": "/labels.bin"}, r"label_path '/labels\.bin' leaves the data root"),
        ({"lidar_path": "a\nb.bin"}, r"lidar_path .* has control characters"),
        ({"timestamp": "noon"}, r"timestamp: expected int64, got 'noon'"),
    ],
)
def test_a_frame_that_cannot_be_used_is_refused_by_name(
    make_frames: MakeFrames, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"f\.parquet: {FRAME}{message}"):
        write_frames(_with_frame(make_frames(1), **changes), str(tmp_path / "f.parquet"))


def test_one_token_is_one_frame_and_the_frames_of_a_scene_follow_each_other(
    make_frames: MakeFrames, tmp_path: Path
) -> None:
    frames, path = make_frames(200), str(tmp_path / "f.parquet")  # more than one row group
    with pytest.raises(DataError, match=r"frame 'frame-00000' of 'scene-0199': token is the token of an earlier frame"):
        write_frames([*frames[:-1], replace(frames[-1], token="frame-00000")], path)
    with pytest.raises(DataError, match=r"frame 'frame-00599' of 'scene-0000': scene comes a second time, after"):
        write_frames([*frames[:-1], replace(frames[-1], scene="scene-0000")], path)
    with pytest.raises(DataError, match=r"column scene has rows without a value"):
        write_frames([*frames[:-1], replace(frames[-1], scene=None)], path)  # type: ignore[arg-type]


def test_frames_may_share_an_image_and_its_token(make_frames: MakeFrames, tmp_path: Path) -> None:
    frames = make_frames(2)
    shared = [frames[0], replace(frames[1], cameras=frames[0].cameras), *frames[2:]]
    write_frames(shared, str(tmp_path / "f.parquet"))
    assert FrameTable.open(tmp_path / "f.parquet")[1].cameras[3].token == frames[0].cameras[3].token


def test_real_and_synthetic_frames_keep_the_rules(
    world_frames: list[Frame], real_nuscenes: Path, tmp_path: Path
) -> None:
    write_frames(world_frames, str(tmp_path / "world.parquet"))
    write_frames(read_nuscenes(str(real_nuscenes), "v1.0-mini"), str(tmp_path / "real.parquet"))
    assert len(read_frames(str(tmp_path / "real.parquet"))) == 1


def test_names_that_no_file_has_are_free(make_frames: MakeFrames, tmp_path: Path) -> None:
    """As ROS topics, and as logs without a token for each sweep."""
    frames, path = make_frames(1), str(tmp_path / "f.parquet")
    topic = "/camera/front left/image_raw"
    named = _with_camera(frames, channel=topic)
    write_frames(_with_frame(named, token="/log 1/7", lidar_token=""), path)
    frame = FrameTable.open(path)[1]
    assert (frame.token, frame.lidar_token, frame.cameras[2].channel) == (
        "/log 1/7",
        "",
        "/camera/front left/image_raw",
    )
    with pytest.raises(DataError, match=r"channel '' is empty"):
        write_frames(_with_camera(frames, channel=""), path)
    with pytest.raises(DataError, match=r"frame '\.\./7' of 'scene-0000': token cannot name a file"):
        write_frames(_with_frame(frames, token="../7"), path, "semantic_kitti")


@pytest.mark.parametrize("seed", range(5))
def test_rotations_of_three_decimals_pass_and_another_unit_does_not(
    make_frames: MakeFrames, tmp_path: Path, seed: int
) -> None:
    frames, path = make_frames(1), str(tmp_path / "f.parquet")
    rounded = np.eye(4)
    rounded[:3, :3] = np.round(Rotation.random(random_state=seed).as_matrix(), 3)
    write_frames(_with_frame(frames, ego_from_lidar=rounded), path)
    with pytest.raises(DataError, match="has no rotation"):
        write_frames(_with_frame(frames, ego_from_lidar=np.diag([1.01, 1.01, 1.01, 1])), path)
