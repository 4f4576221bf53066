"""The synthetic dataroot: a true nuScenes folder whose sensors agree, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slidr.config import ConfigError
from slidr.data.labels import NUSCENES_CLASSES, classes_of
from slidr.data.nuscenes import read_frames, scenes_of_splits
from slidr.data.splits import VERIFY_SCENES
from slidr.data.storage import DataError
from slidr.data.synthetic import dataroot, write_dataroot
from slidr.data.synthetic.dataroot import World, see
from slidr.data.synthetic.names import CATEGORIES, SCENES
from slidr.ops.pairing import pair_points
from slidr.types import CAMERA_CHANNELS, Frame

# The parameters of the shared tiny world.
TINY = World("v1.0-trainval", (("parametrize", 2), ("verify", 1), ("val", 1)), keyframes=2, scale=0.1, seed=0)


def _digest(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _write(out: Path, **changes: object) -> Path:
    arguments = {"splits": {"mini_train": 1, "mini_val": 1}, "version": "v1.0-mini", "keyframes": 1, "scale": 0.05}
    return write_dataroot(out, **(arguments | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("small"))


def test_scene_names_are_in_the_official_splits_they_are_listed_under() -> None:
    official = scenes_of_splits()
    names = {
        (version, split): [f"scene-{n:04d}" for n in numbers]
        for version, pools in SCENES.items()
        for split, numbers in pools.items()
    }
    assert set(names["v1.0-trainval", "parametrize"]) <= set(official["train"]) - VERIFY_SCENES
    assert set(names["v1.0-trainval", "verify"]) <= set(official["train"]) & VERIFY_SCENES
    assert set(names["v1.0-trainval", "val"]) <= set(official["val"])
    assert set(names["v1.0-mini", "mini_train"]) == set(official["mini_train"])
    assert set(names["v1.0-mini", "mini_val"]) == set(official["mini_val"])
    for listed in names.values():
        assert len(set(listed)) == len(listed)


def test_the_devkit_loads_every_table(tiny_world: Path) -> None:
    from nuscenes import NuScenes

    nusc = NuScenes("v1.0-trainval", str(tiny_world), verbose=False)
    assert [scene["name"] for scene in nusc.scene] == ["scene-0001", "scene-0002", "scene-0003", "scene-0008"]
    assert len(nusc.sample) == 8
    assert [nusc.lidarseg_idx2name_mapping[i] for i in range(32)] == list(CATEGORIES)
    for sample in nusc.sample:
        path, boxes, _ = nusc.get_sample_data(sample["data"]["LIDAR_TOP"])
        assert Path(path).is_file()
        assert len(boxes) > 10
        assert nusc.get("scene", sample["scene_token"])["nbr_samples"] == 2
    first = nusc.sample[0]
    assert nusc.get("sample", first["next"])["timestamp"] - first["timestamp"] == 500_000


def test_an_annotated_box_holds_the_points_it_counts(tiny_world: Path) -> None:
    from nuscenes import NuScenes
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    nusc = NuScenes("v1.0-trainval", str(tiny_world), verbose=False)
    path, boxes, _ = nusc.get_sample_data(nusc.sample[0]["data"]["LIDAR_TOP"])
    points = LidarPointCloud.from_file(path).points[:3]
    checked = 0
    for box in boxes:
        counted = nusc.get("sample_annotation", box.token)["num_lidar_pts"]
        if counted >= 40 and box.name.startswith("vehicle.car"):
            assert points_in_box(box, points, wlh_factor=1.12).sum() >= 0.9 * counted
            checked += 1
    assert checked > 0


def test_frames_of_every_split_are_read(world_frames: list[Frame], tiny_world: Path) -> None:
    assert len(world_frames) == 8
    count = {name: sum(name in frame.splits for frame in world_frames) for name in ("parametrize", "verify", "val")}
    assert count == {"parametrize": 4, "verify": 2, "val": 2}
    frame = world_frames[0]
    assert tuple(camera.channel for camera in frame.cameras) == CAMERA_CHANNELS
    with Image.open(tiny_world / frame.cameras[0].image_path) as image:
        assert image.size == (160, 90) == (frame.cameras[0].width, frame.cameras[0].height)
    assert len({camera.timestamp for camera in frame.cameras}) == 6
    moved = frame.cameras[0].global_from_ego[:3, 3] - frame.global_from_ego[:3, 3]
    assert 0.05 < np.linalg.norm(moved) < 0.6  # the ego car drives on between the camera's and the lidar's moment


def test_every_sweep_is_labelled_point_by_point_and_shows_every_class_in_every_scene(
    world_frames: list[Frame], tiny_world: Path
) -> None:
    seen: dict[str, set[int]] = {}
    for frame in world_frames:
        points = np.fromfile(tiny_world / frame.lidar_path, np.float32).reshape(-1, 5)
        assert frame.label_path is not None
        raw = np.fromfile(tiny_world / frame.label_path, np.uint8)
        assert len(raw) == len(points) > 20_000
        assert set(np.unique(points[:, 4])) == set(range(32))
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 255
        counts = np.bincount(classes_of(raw, "nuscenes"), minlength=len(NUSCENES_CLASSES))
        seen.setdefault(frame.scene, set()).update(np.flatnonzero(counts >= 5).tolist())
    for scene, classes in seen.items():
        assert classes >= set(range(1, 17)), scene


def test_points_land_on_pixels_of_their_class(world_frames: list[Frame], tiny_world: Path) -> None:
    agreeing = pairs = 0
    for frame in world_frames[::4]:
        views = see(TINY, int(frame.scene[-4:]), 0).views
        points = np.fromfile(tiny_world / frame.lidar_path, np.float32).reshape(-1, 5)
        classes = classes_of(np.fromfile(tiny_world / str(frame.label_path), np.uint8), "nuscenes")
        pairing = pair_points(points[:, :3], frame.cameras)
        labels = np.stack([views[camera.channel].label for camera in frame.cameras])
        pixel = classes_of(labels[pairing.camera_index, pairing.pixel[:, 0], pairing.pixel[:, 1]], "nuscenes")
        point = classes[pairing.point_index]
        agreeing += int(((point == pixel) & (point > 0)).sum())
        pairs += int((point > 0).sum())
    assert pairs > 15_000
    assert agreeing / pairs >= 0.9


def test_no_class_has_an_intensity_of_its_own(world_frames: list[Frame], tiny_world: Path) -> None:
    labels, intensities = [], []
    for frame in world_frames:
        intensities.append(np.fromfile(tiny_world / frame.lidar_path, np.float32).reshape(-1, 5)[:, 3])
        labels.append(classes_of(np.fromfile(tiny_world / str(frame.label_path), np.uint8), "nuscenes"))
    label, intensity = np.concatenate(labels), np.concatenate(intensities)
    low = {c: np.percentile(intensity[label == c], 10) for c in range(1, 17)}
    high = {c: np.percentile(intensity[label == c], 90) for c in range(1, 17)}
    overlapping = [[low[a] < high[b] and low[b] < high[a] for b in range(1, 17)] for a in range(1, 17)]
    assert np.mean(overlapping) > 0.9


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(small: Path, tmp_path: Path) -> None:
    assert _digest(_write(tmp_path / "two", workers=2)) == _digest(small)


def test_another_seed_gives_other_pictures_and_tokens(small: Path, tmp_path: Path) -> None:
    other = _write(tmp_path / "other", seed=1)
    pictures = {path.name: path.read_bytes() for path in small.rglob("*.jpg")}
    others = {path.name: path.read_bytes() for path in other.rglob("*.jpg")}
    assert pictures.keys() == others.keys()
    assert all(pictures[name] != others[name] for name in pictures)
    assert not {frame.token for frame in read_frames(str(small), "v1.0-mini")} & {
        frame.token for frame in read_frames(str(other), "v1.0-mini")
    }


def test_a_run_that_was_cut_off_is_completed_by_running_it_again(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cut"
    whole = dataroot._write
    written = 0

    def failing(path: Path, data: bytes) -> None:
        nonlocal written
        written += 1
        if written == 13:  # amid the second keyframe
            raise OSError(28, "No space left on device", str(path))
        whole(path, data)

    monkeypatch.setattr(dataroot, "_write", failing)
    with pytest.raises(OSError, match="No space left"):
        _write(out)
    assert not (out / "v1.0-mini").exists()  # tables come last
    monkeypatch.setattr(dataroot, "_write", whole)
    rendered = []
    monkeypatch.setattr(dataroot, "see", lambda *args: rendered.append(args[1:3]) or see(*args))
    steps: list[tuple[int, int]] = []
    _write(out, progress=lambda done, total: steps.append((done, total)))
    assert _digest(out) == _digest(small)
    assert len(rendered) == 1  # the first keyframe was kept
    assert steps == [(1, 2), (2, 2)]


def test_a_lost_file_is_made_again(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(small, out)
    next(out.rglob("*CAM_BACK*.jpg")).unlink()
    assert _digest(_write(out)) == _digest(small)


def test_a_keyframe_whose_mark_is_damaged_is_made_again(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "world")
    mark = sorted((tmp_path / "world" / "synthetic").iterdir())[0]
    mark.write_bytes(mark.read_bytes()[:20])
    assert _digest(_write(tmp_path / "world")) == _digest(small)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_folder_whose_parameters_cannot_be_read_is_refused_by_name(text: str, small: Path, tmp_path: Path) -> None:
    shutil.copytree(small, tmp_path / "world")
    path = tmp_path / "world" / dataroot.PARAMETERS
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises((ConfigError, DataError), match=rf"^{path}: .*remove this folder or choose another"):
        _write(tmp_path / "world")


def test_a_folder_of_another_world_is_refused(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parameters\.json: .*scale: there 0\.05, asked 0\.06.*another folder"):
        _write(small, scale=0.06)
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="is not empty"):
        _write(tmp_path)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "v2"}, "version: got 'v2'"),
        ({"splits": {"train": 1}}, "splits: got 'train', expected"),
        ({"splits": {"mini_val": 3}}, "splits.mini_val: got 3 scenes, expected 0 to 2"),
        ({"splits": {}}, "no scene asked for"),
        ({"splits": None, "scenes": 1}, "scenes: got 1, expected at least 2"),
        ({"scenes": 4}, "not both"),
        ({"keyframes": 0}, "keyframes: got 0"),
        ({"scale": 2.0}, "scale: got 2.0"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _write(tmp_path / "none", **changes)
    assert not (tmp_path / "none").exists()


def test_a_number_of_scenes_is_shared_over_all_splits() -> None:
    world = dataroot._world(None, 7, 1, 0.1, 0, "v1.0-trainval")
    assert sum(count for _, count in world.splits) == 7
    assert all(count >= 1 for _, count in world.splits)


def test_parameters_lie_beside_the_tables(small: Path) -> None:
    parameters = json.loads((small / "parameters.json").read_text())
    assert parameters["seed"] == 0
    assert parameters["scale"] == 0.05
