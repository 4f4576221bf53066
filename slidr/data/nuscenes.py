"""nuScenes tables to `Frame`s; the only module that imports nuscenes-devkit.

The devkit's own start-up reads every annotation and insists on maps; here its joins run over the keyframes'
tables alone, read wherever they lie (see `slidr.data.storage`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from PIL import Image

from slidr.config import NuscenesVersion
from slidr.data import storage
from slidr.data.splits import pretraining_splits
from slidr.data.storage import DataError
from slidr.ops.geometry import camera_from_lidar, pose
from slidr.types import CAMERA_CHANNELS, Camera, Frame


def _import_devkit() -> tuple[Any, Any]:
    """The devkit's class and its splits.

    The devkit raises Pillow's limit on an image's pixels for the whole process when it is imported; here the limit is
    restored, for whatever else opens images in this process. (`slidr.data.images` has a limit of its own.)
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        from nuscenes.nuscenes import NuScenes
        from nuscenes.utils import splits
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    return NuScenes, splits


NuScenes, devkit_splits = _import_devkit()

LIDAR_CHANNEL = "LIDAR_TOP"
OFFICIAL_SPLITS = ("train", "val", "test", "mini_train", "mini_val")
_SMALL_TABLES = ("category", "sensor", "calibrated_sensor", "log", "map", "scene", "sample")
_TABLES = (*_SMALL_TABLES, "sample_data", "ego_pose")


def read_frames(
    root: str,
    version: str = "v1.0-trainval",
    check_files: bool = True,
    report: Callable[[str], None] | None = None,
) -> list[Frame]:
    """The keyframes of a nuScenes dataroot: scene after scene in table order, each in order of time.

    A scene's splits are its official ones (the mini split's scenes belong to train or val, too), and for
    training scenes verify or parametrize. `label_path` is the nuScenes-lidarseg file where there is one. With
    `check_files` every file that a frame names must be there. `report` is told what is being read (trainval
    takes minutes). Raises `DataError` naming the file: a table that is missing, unreadable or contradicts
    another, a sample file that is missing or lies outside the dataroot.
    """
    if version not in get_args(NuscenesVersion):
        raise DataError(f"{root}: version {version!r}; expected one of {list(get_args(NuscenesVersion))}")
    if not storage.list_names(storage.join(root, version)):
        raise DataError(
            f"{storage.join(root, version)}: no such folder; data.root must hold the folder {version} "
            "with the tables, and samples/"
        )
    report = report or (lambda line: None)
    tables = _Tables(root, version, report)
    frames = [frame for scene in tables.scene for frame in _frames_of_scene(tables, scene)]
    if not frames:
        raise DataError(f"{tables.path_of('sample')}: holds no keyframe; is the download complete?")
    if check_files:
        report(f"{root}: looking for the files of {len(frames)} keyframes")
        check_sample_files(root, frames)
    return frames


def scenes_of_splits() -> dict[str, tuple[str, ...]]:
    """The official splits and the names of their scenes."""
    return {name: tuple(getattr(devkit_splits, name)) for name in OFFICIAL_SPLITS}


def check_sample_files(root: str, frames: list[Frame]) -> None:
    """Raises `DataError` naming the first files of the frames that are missing or lie outside `root`.

    Each folder is listed once, which a network file system answers far sooner than a question per file.
    """
    folders: dict[str, list[str]] = {}
    for path in _paths(frames):
        folder, name = posixpath.split(path)
        folders.setdefault(folder, []).append(name)
    missing: list[str] = []
    for folder, names in folders.items():
        where = storage.safe_join(root, folder) if folder else root
        there = storage.list_names(where)
        missing += [posixpath.join(folder, name) for name in names if name not in there]
        if there:
            _refuse_links_outside(root, folder, where)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{', '.join(storage.join(root, path) for path in missing[:3])}{more}: named by the tables "
            "but missing; finish the download or pass the data root they are in"
        )


class _Tables(NuScenes):  # type: ignore[misc, valid-type]
    """The devkit's indexed tables, of keyframes only and without annotations, maps' masks or drawing."""

    def __init__(self, root: str, version: str, report: Callable[[str], None]) -> None:
        self.dataroot = os.fspath(root)
        self.version = version
        self.verbose = False
        self.table_names = list(_TABLES)
        self._report = report
        for name in _SMALL_TABLES:
            setattr(self, name, self._load(name))
        self.instance: list[dict[str, Any]] = []
        self.sample_annotation: list[dict[str, Any]] = []
        channel_of = self._channels()
        wanted = {LIDAR_CHANNEL, *CAMERA_CHANNELS}
        self.sample_data: list[dict[str, Any]] = [
            record
            for record in self._load("sample_data")
            if record["is_key_frame"] and channel_of.get(record["calibrated_sensor_token"]) in wanted
        ]
        poses = {record["ego_pose_token"] for record in self.sample_data}
        self.ego_pose: list[dict[str, Any]] = [record for record in self._load("ego_pose") if record["token"] in poses]
        self.labels = self._labels()
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.__make_reverse_index__(False)
        except (KeyError, IndexError) as error:
            raise DataError(
                f"{storage.join(root, version)}: the tables contradict each other: {error} is referred "
                "to but missing; copy all of the version's tables again"
            ) from error

    def path_of(self, table: str) -> str:
        return storage.join(self.dataroot, self.version, f"{table}.json")

    def record(self, table: str, token: str, referrer: str) -> dict[str, Any]:
        """A record, or an error that names the table it should be in."""
        try:
            return self.get(table, token)
        except KeyError:
            raise DataError(
                f"{self.path_of(table)}: has no record {token!r}, which {self.path_of(referrer)} refers "
                "to; copy the tables again"
            ) from None

    def _load(self, name: str) -> list[dict[str, Any]]:
        path = self.path_of(name)
        self._report(f"{path}: reading")
        if not storage.exists(path):
            raise DataError(f"{path}: table is missing; a nuScenes {self.version} dataroot has {list(_TABLES)}")
        data = storage.read_bytes(path, storage.TABLE_BYTES)
        try:
            table = json.loads(data)
        except ValueError as error:
            raise DataError(f"{path}: table is not readable JSON ({error}); copy it again") from error
        if not isinstance(table, list) or not all(isinstance(row, dict) and "token" in row for row in table):
            raise DataError(f"{path}: expected a list of records with a token each; copy the table again")
        return table

    def _channels(self) -> dict[str, str]:
        """The channel of each calibrated sensor."""
        try:
            channel_of_sensor = {sensor["token"]: sensor["channel"] for sensor in self.sensor}
            return {c["token"]: channel_of_sensor[c["sensor_token"]] for c in self.calibrated_sensor}
        except KeyError as error:
            raise DataError(
                f"{self.path_of('calibrated_sensor')}: refers to {error}, which is not in {self.path_of('sensor')}"
            ) from error

    def _labels(self) -> dict[str, str]:
        """The label file of each lidar sweep, where nuScenes-lidarseg is there."""
        if not storage.exists(self.path_of("lidarseg")):
            return {}
        return {record["sample_data_token"]: record["filename"] for record in self._load("lidarseg")}


def _frames_of_scene(tables: _Tables, scene: dict[str, Any]) -> Iterator[Frame]:
    splits = pretraining_splits(scene["name"], _official_splits(scene["name"]))
    token, seen = scene["first_sample_token"], set()
    while token:
        if token in seen:
            raise DataError(f"{tables.path_of('sample')}: {scene['name']}: sample {token} comes after itself")
        seen.add(token)
        sample = tables.record("sample", token, "scene")
        try:
            yield _frame(tables, sample, scene["name"], splits)
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{tables.path_of('sample')}: keyframe {token} of {scene['name']} is incomplete: {error!r}"
            ) from error
        token = sample["next"]


def _frame(tables: _Tables, sample: dict[str, Any], scene: str, splits: tuple[str, ...]) -> Frame:
    absent = {LIDAR_CHANNEL, *CAMERA_CHANNELS} - sample["data"].keys()
    if absent:
        raise DataError(
            f"{tables.path_of('sample_data')}: keyframe {sample['token']} of {scene} has no {', '.join(sorted(absent))}"
        )
    lidar = tables.record("sample_data", sample["data"][LIDAR_CHANNEL], "sample")
    ego_from_lidar, _ = _calibration(tables, lidar)
    global_from_ego = _ego_pose(tables, lidar)
    return Frame(
        token=sample["token"],
        scene=scene,
        timestamp=int(lidar["timestamp"]),
        lidar_token=lidar["token"],
        lidar_path=_inside(tables, lidar["filename"]),
        label_path=_inside(tables, tables.labels[lidar["token"]]) if lidar["token"] in tables.labels else None,
        ego_from_lidar=ego_from_lidar,
        global_from_ego=global_from_ego,
        cameras=tuple(
            _camera(tables, channel, sample["data"][channel], ego_from_lidar, global_from_ego)
            for channel in CAMERA_CHANNELS
        ),
        previous=sample["prev"] or None,
        next=sample["next"] or None,
        splits=splits,
    )


def _camera(
    tables: _Tables, channel: str, token: str, ego_from_lidar: np.ndarray, global_from_lidar_ego: np.ndarray
) -> Camera:
    image = tables.record("sample_data", token, "sample")
    ego_from_camera, intrinsics = _calibration(tables, image)
    global_from_ego = _ego_pose(tables, image)
    return Camera(
        channel=channel,
        token=token,
        image_path=_inside(tables, image["filename"]),
        width=int(image["width"]),
        height=int(image["height"]),
        timestamp=int(image["timestamp"]),
        intrinsics=np.array(intrinsics, np.float64).reshape(3, 3),
        ego_from_camera=ego_from_camera,
        global_from_ego=global_from_ego,
        camera_from_lidar=camera_from_lidar(ego_from_camera, global_from_ego, ego_from_lidar, global_from_lidar_ego),
    )


def _calibration(tables: _Tables, record: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """ego_from_sensor, and the intrinsics (an empty list for a lidar)."""
    sensor = tables.record("calibrated_sensor", record["calibrated_sensor_token"], "sample_data")
    return pose(sensor["rotation"], sensor["translation"]), sensor["camera_intrinsic"]


def _ego_pose(tables: _Tables, record: dict[str, Any]) -> np.ndarray:
    ego = tables.record("ego_pose", record["ego_pose_token"], "sample_data")
    return pose(ego["rotation"], ego["translation"])


def _inside(tables: _Tables, path: str) -> str:
    """A path of the tables, checked not to lead out of the dataroot by its spelling; links are checked later."""
    if posixpath.isabs(path) or ".." in path.replace("\\", "/").split("/") or "://" in path or not path:
        raise DataError(
            f"{tables.path_of('sample_data')}: names the file {path!r}, which leaves the dataroot {tables.dataroot}"
        )
    return path


@lru_cache(maxsize=1)
def _splits_of_scenes() -> dict[str, tuple[str, ...]]:
    splits: dict[str, tuple[str, ...]] = {}
    for name, scenes in scenes_of_splits().items():
        for scene in scenes:
            splits[scene] = (*splits.get(scene, ()), name)
    return splits


def _official_splits(scene: str) -> tuple[str, ...]:
    return _splits_of_scenes().get(scene, ())


def _paths(frames: list[Frame]) -> Iterator[str]:
    for frame in frames:
        yield frame.lidar_path
        if frame.label_path is not None:
            yield frame.label_path
        yield from (camera.image_path for camera in frame.cameras)


def _refuse_links_outside(root: str, folder: str, where: str) -> None:
    if storage.is_remote(root):
        return
    with os.scandir(where) as entries:
        for entry in entries:
            if entry.is_symlink():
                storage.safe_join(root, posixpath.join(folder, entry.name))
