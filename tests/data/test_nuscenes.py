"""nuScenes tables as frames: the real keyframe against the devkit's own reading, and damaged dataroots."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nuscenes.nuscenes import NuScenes
from pyquaternion import Quaternion

from slidr.data.nuscenes import read_frames
from slidr.data.storage import DataError
from slidr.types import CAMERA_CHANNELS, Frame

VERSION = "v1.0-trainval"


def _matrix(record: dict[str, Any]) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = Quaternion(record["rotation"]).rotation_matrix
    matrix[:3, 3] = record["translation"]
    return matrix


def _assert_as_the_devkit_reads(frames: list[Frame], root: Path, version: str) -> None:
    devkit = NuScenes(version, str(root), verbose=False)
    assert [f.token for f in frames] == [s["token"] for s in _samples_in_order(devkit)]
    for frame in frames:
        sample = devkit.get("sample", frame.token)
        lidar = devkit.get("sample_data", sample["data"]["LIDAR_TOP"])
        assert (frame.lidar_token, frame.lidar_path) == (lidar["token"], lidar["filename"])
        assert frame.timestamp == lidar["timestamp"]
        assert (frame.previous or "", frame.next or "") == (sample["prev"], sample["next"])
        assert frame.scene == devkit.get("scene", sample["scene_token"])["name"]
        ego_from_lidar = _matrix(devkit.get("calibrated_sensor", lidar["calibrated_sensor_token"]))
        global_from_ego = _matrix(devkit.get("ego_pose", lidar["ego_pose_token"]))
        np.testing.assert_allclose(frame.ego_from_lidar, ego_from_lidar, atol=1e-12)
        np.testing.assert_allclose(frame.global_from_ego, global_from_ego, atol=1e-9)
        assert [camera.channel for camera in frame.cameras] == list(CAMERA_CHANNELS)
        for camera in frame.cameras:
            image = devkit.get("sample_data", sample["data"][camera.channel])
            sensor = devkit.get("calibrated_sensor", image["calibrated_sensor_token"])
            assert (camera.token, camera.image_path) == (image["token"], image["filename"])
            assert (camera.width, camera.height) == (image["width"], image["height"])
            assert camera.timestamp == image["timestamp"]
            np.testing.assert_array_equal(camera.intrinsics, sensor["camera_intrinsic"])
            chain = [_matrix(sensor), _matrix(devkit.get("ego_pose", image["ego_pose_token"]))]
            np.testing.assert_allclose(camera.ego_from_camera, chain[0], atol=1e-12)
            np.testing.assert_allclose(camera.global_from_ego, chain[1], atol=1e-9)
            camera_from_lidar = np.linalg.inv(chain[1] @ chain[0]) @ global_from_ego @ ego_from_lidar
            np.testing.assert_allclose(camera.camera_from_lidar, camera_from_lidar, atol=1e-8)


def _samples_in_order(devkit: NuScenes) -> list[dict[str, Any]]:
    """Scene after scene, each by its chain of samples."""
    samples = []
    for scene in devkit.scene:
        token = scene["first_sample_token"]
        while token:
            samples.append(devkit.get("sample", token))
            token = samples[-1]["next"]
    return samples


def test_the_real_keyframe_is_as_the_devkit_reads_it(real_nuscenes: Path) -> None:
    frames = read_frames(str(real_nuscenes), "v1.0-mini")
    assert len(frames) == 1
    assert frames[0].splits == ("train", "mini_train", "parametrize")
    assert frames[0].label_path is None
    _assert_as_the_devkit_reads(frames, real_nuscenes, "v1.0-mini")


def test_a_dataroot_with_labels_is_as_the_devkit_reads_it(tiny_world: Path, world_frames: list[Frame]) -> None:
    _assert_as_the_devkit_reads(world_frames, tiny_world, VERSION)
    devkit = NuScenes(VERSION, str(tiny_world), verbose=False)
    for frame in world_frames:
        assert frame.label_path == devkit.get("lidarseg", frame.lidar_token)["filename"]
    splits = {frame.splits for frame in world_frames}
    assert splits == {("train", "parametrize"), ("train", "verify"), ("val",)}


Spoil = Callable[[Path], None]


def _edit(table: str, change: Callable[[list[dict[str, Any]]], Any]) -> Spoil:
    """Changes a table of the dataroot's copy."""

    def spoil(root: Path) -> None:
        path = root / VERSION / f"{table}.json"
        rows = json.loads(path.read_text())
        change(rows)
        path.unlink()
        path.write_text(json.dumps(rows))

    return spoil


def _rename_first_image(path: str) -> Spoil:
    def change(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["is_key_frame"] and row["filename"].endswith("jpg"))["filename"] = path

    return _edit("sample_data", change)


def _replace(path: str, text: str | None) -> Spoil:
    def spoil(root: Path) -> None:
        (root / path).unlink()
        if text is not None:
            (root / path).write_text(text)

    return spoil


def _link_outside(root: Path) -> None:
    image = next((root / "samples" / "CAM_FRONT").iterdir())
    shutil.copy(image, root.parent / "outside.jpg")
    image.unlink()
    image.symlink_to(root.parent / "outside.jpg")


def _remove_first_sweep(root: Path) -> None:
    next((root / "samples" / "LIDAR_TOP").iterdir()).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_replace(f"{VERSION}/sample_data.json", None), r"sample_data\.json: table is missing"),
        (_replace(f"{VERSION}/scene.json", "[{"), r"scene\.json: table is not readable JSON"),
        (_replace(f"{VERSION}/scene.json", "{}"), r"scene\.json: expected a list of records"),
        (_edit("ego_pose", lambda rows: rows.clear()), r"ego_pose\.json: has no record .*sample_data\.json"),
        (_edit("sensor", lambda rows: rows.pop()), r"calibrated_sensor\.json: refers to .*sensor\.json"),
        (_edit("scene", lambda rows: rows.clear()), r"sample\.json: holds no keyframe"),
        (_edit("sample", lambda rows: rows[0].update(next=rows[0]["token"])), r"comes after itself"),
        (_edit("calibrated_sensor", lambda rows: rows[0].update(rotation=[0, 0, 0, 0])), r"is no rotation"),
        (_edit("sample_data", lambda rows: rows[:] is rows.pop(0)), r"(has no CAM_|has no LIDAR_)"),
        (_rename_first_image("../outside.jpg"), r"sample_data\.json: names .*outside\.jpg', which leaves"),
        (_rename_first_image("/etc/passwd"), r"names the file '/etc/passwd', which leaves the dataroot"),
        (_rename_first_image("samples/gone.jpg"), r"samples/gone\.jpg: named by the tables but missing"),
        (_remove_first_sweep, r"LIDAR_TOP/.*: named by the tables but missing"),
        (_link_outside, r"CAM_FRONT/.*: is a link to .*outside\.jpg, outside the data root"),
    ],
)
def test_a_damaged_dataroot_is_refused_by_the_file_at_fault(
    tiny_world: Path, tmp_path: Path, spoil: Spoil, message: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_world, root)
    spoil(root)
    with pytest.raises(DataError, match=message):
        read_frames(str(root), VERSION)


def test_unchecked_files_may_be_missing(tiny_world: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_world / VERSION, tmp_path / VERSION)
    assert len(read_frames(str(tmp_path), VERSION, check_files=False)) == 8
    with pytest.raises(DataError, match=r"and \d+ more: named by the tables but missing"):
        read_frames(str(tmp_path), VERSION)


def test_a_folder_without_the_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"v1\.0-test: no such folder"):
        read_frames(str(tmp_path), "v1.0-test")
    with pytest.raises(DataError, match="version 'v2'; expected one of"):
        read_frames(str(tmp_path), "v2")


def test_reading_says_what_it_reads_and_the_devkit_says_nothing(
    tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    read_frames(str(tiny_world), VERSION, report=lines.append)
    assert capsys.readouterr() == ("", "")
    assert any("sample_data.json: reading" in line for line in lines)


def test_importing_the_devkit_through_the_reader_leaves_pillows_limit_as_it_was() -> None:
    code = "import {}; from PIL import Image; print(Image.MAX_IMAGE_PIXELS)"

    def limit_after(module: str) -> int:
        done = subprocess.run([sys.executable, "-c", code.format(module)], capture_output=True, check=True, text=True)
        return int(done.stdout)

    assert limit_after("slidr.data.nuscenes") == limit_after("PIL.Image") < limit_after("nuscenes.nuscenes")
