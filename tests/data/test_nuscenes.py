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
        (_replace(f"{VERSION}/scene.json", "[{"), r"scene\.json: is not readable JSON"),
        (_replace(f"{VERSION}/scene.json", "{}"), r"scene\.json: expected a list of records"),
        (_edit("ego_pose", lambda rows: rows.clear()), r"ego_pose\.json: has no record .*sample_data\.json"),
        (_edit("sensor", lambda rows: rows.pop()), r"calibrated_sensor\.json: record .* refers to .*sensor\.json"),
        (_edit("scene", lambda rows: rows.clear()), r"sample\.json: holds no keyframe"),
        (_edit("sample", lambda rows: rows[0].update(next=rows[0]["token"])), r"comes after itself"),
        (
            _edit("calibrated_sensor", lambda rows: rows[0].update(rotation=[0, 0, 0, 0])),
            r"calibrated_sensor\.json: record .* rotation \[0, 0, 0, 0\]: is not a rotation",
        ),
        (_edit("sample_data", lambda rows: rows[:] is rows.pop(0)), r"(has no CAM_|has no LIDAR_)"),
        (
            _rename_first_image("../outside.jpg"),
            r"sample_data\.json: record .* filename .*outside\.jpg': leaves the data root",
        ),
        (
            _rename_first_image("/etc/passwd"),
            r"sample_data\.json: record .* filename '/etc/passwd': leaves the data root",
        ),
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


DEEP = "[" * 100_000 + "]" * 100_000
LOST = object()  # a key that is removed


def _change(table: str, key: str, value: Any, number: int = 0) -> Spoil:
    """Another value in a record of keyframes."""

    def change(rows: list[dict[str, Any]]) -> None:
        row = [row for row in rows if row.get("is_key_frame", True)][number]
        row.pop(key)
        if value is not LOST:
            row[key] = value

    return _edit(table, change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_replace(f"{VERSION}/sensor.json", DEEP), r"sensor\.json: is not readable JSON \(nested too deeply\)"),
        (_replace(f"{VERSION}/log.json", "[1]"), r"log\.json: expected a list of records, but number 0 is 1"),
        (_replace(f"{VERSION}/map.json", '[{"token": []}]'), r"map\.json: record 0 has no token"),
        (_change("map", "log_tokens", [["a"]]), r"map\.json: record '\w+': log_tokens .*: expected a list of texts"),
        (_change("sensor", "channel", ["CAM_FRONT"]), r"sensor\.json: record '\w+': channel \['CAM_FRONT'\]: expected"),
        (_change("scene", "name", LOST), r"scene\.json: record '\w+' has no 'name'"),
        (_change("scene", "name", None), r"scene\.json: record '\w+': name None: expected a text"),
        (_change("sample", "next", None), r"sample\.json: record '\w+': next None: expected a text"),
        (_change("sample", "prev", None), r"sample\.json: record '\w+': prev None: expected a text"),
        (_change("sample_data", "sample_token", ["x"]), r"sample_data\.json: record '\w+': sample_token \['x'\]"),
        (_change("sample_data", "is_key_frame", "true"), r"sample_data\.json: record '\w+': is_key_frame 'true'"),
        (_change("sample_data", "calibrated_sensor_token", {}), r"calibrated_sensor_token \{\}: expected a text"),
        (
            _change("sample_data", "calibrated_sensor_token", "x"),
            r"sample_data\.json: record .* refers to 'x', which is",
        ),
        (_change("sample_data", "width", 10**400), r"sample_data\.json: record '\w+': width 1000.*: expected pixels"),
        (_change("sample_data", "height", LOST), r"sample_data\.json: record '\w+' has no 'height'"),
        (_change("sample_data", "timestamp", "noon"), r"timestamp 'noon': expected microseconds"),
        (_change("sample_data", "filename", "a\0.jpg"), r"filename 'a\\x00\.jpg': has control characters"),
        (
            _change("sample_data", "filename", "samples\\a.jpg"),
            r"filename .*: has backslashes, as tables made on Windows",
        ),
        (_change("sample_data", "token", "a/b"), r"sample_data\.json: record 'a/b': token 'a/b': cannot name a file"),
        (_change("sample_data", "ego_pose_token", LOST), r"sample_data\.json: record '\w+' has no 'ego_pose_token'"),
        (
            _change("ego_pose", "translation", [10**400, 0, 0]),
            r"ego_pose\.json: record '\w+': translation .*: expected 3 m",
        ),
        (
            _change("ego_pose", "rotation", [1, 0, float("nan"), 0]),
            r"ego_pose\.json: record '\w+': rotation .*not a rot",
        ),
        (_change("calibrated_sensor", "camera_intrinsic", None), r"camera_intrinsic None: expected 3 x 3 numbers"),
        (_change("calibrated_sensor", "translation", None), r"calibrated_sensor\.json: record '\w+': translation None"),
        (_change("lidarseg", "sample_data_token", LOST), r"lidarseg\.json: record '\w+' has no 'sample_data_token'"),
        (
            _change("lidarseg", "filename", "../x.bin"),
            r"lidarseg\.json: record '\w+': filename .*: leaves the data root",
        ),
        (
            _change("scene", "first_sample_token", ""),
            r"scene\.json: 2 samples of .*sample\.json are in no scene's chain",
        ),
        (_change("sample", "next", ""), r"scene\.json: 1 samples of .* are in no scene's chain .* of scene-0001"),
        (_change("sample", "scene_token", "x"), r"sample\.json: record '\w+': scene_token is 'x', but"),
    ],
)
def test_a_damaged_record_is_refused_by_table_token_and_key(
    tiny_world: Path, tmp_path: Path, spoil: Spoil, message: str
) -> None:
    (tmp_path / "root").mkdir()
    shutil.copytree(tiny_world / VERSION, tmp_path / "root" / VERSION)
    spoil(tmp_path / "root")
    with pytest.raises(DataError, match=message):
        read_frames(str(tmp_path / "root"), VERSION, check_files=False)


def test_a_scene_whose_first_sample_is_its_second_is_refused_by_name(tiny_world: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    shutil.copytree(tiny_world / VERSION, tmp_path / "root" / VERSION)
    samples = json.loads((tiny_world / VERSION / "sample.json").read_text())
    second = next(sample for sample in samples if sample["prev"])
    first = {"scene": second["scene_token"]}

    def change(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["token"] == first["scene"])["first_sample_token"] = second["token"]

    _edit("scene", change)(tmp_path / "root")
    with pytest.raises(DataError, match=rf"sample\.json: record '{second['token']}': prev is '{second['prev']}', but"):
        read_frames(str(tmp_path / "root"), VERSION, check_files=False)


def test_a_camera_without_focal_lengths_and_two_records_of_one_image_are_refused(
    tiny_world: Path, tmp_path: Path
) -> None:
    def no_focal(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if row["camera_intrinsic"])
        row["camera_intrinsic"][0][0] = 0

    def twice(rows: list[dict[str, Any]]) -> None:
        row = next(row for row in rows if row["is_key_frame"])
        rows.append({**row, "token": "another"})

    for spoil, message in (
        (
            _edit("calibrated_sensor", no_focal),
            r"calibrated_sensor\.json: record '\w+': camera_intrinsic .*focal lengths 0",
        ),
        (_edit("sample_data", twice), r"sample_data\.json: keyframe \w+ has 2 records of"),
        (_edit("ego_pose", lambda rows: rows.append(rows[0])), r"ego_pose\.json: two records have the token"),
    ):
        root = tmp_path / message[:5]
        root.mkdir(exist_ok=True)
        shutil.copytree(tiny_world / VERSION, root / VERSION)
        spoil(root)
        with pytest.raises(DataError, match=message):
            read_frames(str(root), VERSION, check_files=False)


def test_a_lidarseg_table_that_is_a_link_to_nothing_is_not_taken_for_none(tiny_world: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_world / VERSION, tmp_path / VERSION)
    (tmp_path / VERSION / "lidarseg.json").unlink()
    (tmp_path / VERSION / "lidarseg.json").symlink_to("gone.json")
    with pytest.raises(DataError, match=r"lidarseg\.json: cannot be read"):
        read_frames(str(tmp_path), VERSION, check_files=False)
