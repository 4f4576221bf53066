"""nuScenes tables to `Frame`s; the only module that imports nuscenes-devkit.

The devkit's own start-up reads every annotation and insists on maps; here its joins run over the keyframes'
tables alone, read wherever they lie (see `slidr.data.storage`).
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any, get_args

import numpy as np
from PIL import Image

from slidr.config import MissingFiles, NuscenesVersion
from slidr.data import storage
from slidr.data.download import Download, Keyframe, paths_of, take_whole
from slidr.data.nuscenes_rows import ROWS, SELECTION, require_distinct, require_keys, require_records
from slidr.data.records import parse_json
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
_NAMED = 3  # scenes that a note names


def read_frames(
    root: str,
    version: str = "v1.0-trainval",
    check_files: bool = True,
    report: Callable[[str], None] | None = None,
) -> list[Frame]:
    """The keyframes of a whole nuScenes dataroot: see `read_download`."""
    return read_download(root, version, check_files, report).frames


def read_download(
    root: str,
    version: str = "v1.0-trainval",
    check_files: bool = True,
    report: Callable[[str], None] | None = None,
    allow_missing: MissingFiles | None = None,
) -> Download:
    """The keyframes of a nuScenes dataroot: scene after scene in table order, each in order of time.

    A scene's splits are its official ones (the mini split's scenes belong to train or val, too), and for
    training scenes verify or parametrize. `label_path` is the nuScenes-lidarseg file where there is one. With
    `check_files` every file that a frame names must be there, or `allow_missing` says what to take of a download that
    is not whole (`download.take_whole`). `report` is given a line for each table that is read (trainval takes minutes).
    Raises `DataError` naming the file: a table that is missing, unreadable or contradicts another, a sample file that
    is missing or lies outside the dataroot.
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
    keyframes = [each for scene in tables.scene for each in _keyframes_of_scene(tables, scene)]
    if not keyframes:
        raise DataError(f"{tables.path_of('sample')}: holds no keyframe; is the download complete?")
    _require_every_sample(tables, keyframes)
    frames = [each.frame for each in keyframes if each.frame is not None]
    missing: set[str] = set()
    if check_files:
        report(f"{root}: looking for the files of {len(frames)} keyframes")
        missing = _missing_files(root, frames)
    found = take_whole(keyframes, missing, allow_missing, tables.path_of("sample_data"), tables.naming)
    return Download(found.frames, found.left_out, _notes(found.frames))


def scenes_of_splits() -> dict[str, tuple[str, ...]]:
    """The official splits and the names of their scenes."""
    return {name: tuple(getattr(devkit_splits, name)) for name in OFFICIAL_SPLITS}


def _missing_files(root: str, frames: Iterable[Frame]) -> set[str]:
    """The files of the frames that are not there, below `root`. Raises `DataError` for one that lies outside `root`.

    Each folder is listed once, which a network file system answers far sooner than a question per file.
    """
    folders: dict[str, set[str]] = {}
    for frame in frames:
        for path in paths_of(frame):
            folder, name = posixpath.split(path)
            folders.setdefault(folder, set()).add(name)
    missing: set[str] = set()
    for folder, names in folders.items():
        where = storage.safe_join(root, folder) if folder else root
        there = storage.list_names(where)
        there -= _broken_links(root, folder, where) if there else set()
        missing |= {posixpath.join(folder, name) for name in names - there}
    return missing


def _notes(frames: list[Frame]) -> list[str]:
    """What a user should know of the scenes."""
    strange = list(dict.fromkeys(frame.scene for frame in frames if not frame.splits))
    if not strange:
        return []
    more = f" and {len(strange) - _NAMED} more" if len(strange) > _NAMED else ""
    return [
        f"{len(strange)} scenes are in no official split of nuScenes ({', '.join(strange[:_NAMED])}{more}): only the "
        "split all has them; set data.train_split: all, or give them the names of official scenes"
    ]


class _Tables(NuScenes):  # type: ignore[misc, valid-type]
    """The devkit's indexed tables, of keyframes only and without annotations, maps' masks or drawing."""

    def __init__(self, root: str, version: str, report: Callable[[str], None]) -> None:
        self.dataroot = os.fspath(root)
        self.version = version
        self.verbose = False
        self.table_names = list(_TABLES)
        self._report = report
        for name in _SMALL_TABLES:
            setattr(self, name, self._read(name))
            self._require_rows(name, getattr(self, name))
        self.instance: list[dict[str, Any]] = []
        self.sample_annotation: list[dict[str, Any]] = []
        self._require_modalities()
        self.sample_data: list[dict[str, Any]] = self._sample_data()
        poses = {record["ego_pose_token"] for record in self.sample_data}
        self.ego_pose: list[dict[str, Any]] = [row for row in self._read("ego_pose") if row["token"] in poses]
        self._require_rows("ego_pose", self.ego_pose)
        self.labels = self._labels()
        self._require_known("sample_data", self.sample_data, "sample_token", self.sample)
        self._index()

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

    def naming(self, path: str) -> tuple[str, str]:
        """Where a sample file should be, and the table that names it."""
        table = "lidarseg" if path in self.labels.values() else "sample_data"
        return storage.join(self.dataroot, path), self.path_of(table)

    def _read(self, name: str) -> list[dict[str, Any]]:
        path = self.path_of(name)
        self._report(f"{path}: reading")
        if f"{name}.json" not in storage.list_names(storage.join(self.dataroot, self.version)):
            raise DataError(f"{path}: table is missing; a nuScenes {self.version} dataroot has {list(_TABLES)}")
        data = storage.read_bytes(path, storage.TABLE_BYTES)
        return require_records(parse_json(data, path, "copy the table again"), path)

    def _require_rows(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Raises `DataError` naming the table and the record whose keys, types or token are not right."""
        require_distinct(rows, self.path_of(name))
        require_keys(rows, self.path_of(name), ROWS[name])

    def _sample_data(self) -> list[dict[str, Any]]:
        """The sweeps and images of keyframes."""
        path, rows = self.path_of("sample_data"), self._read("sample_data")
        require_keys(rows, path, SELECTION)
        channel_of_sensor = {sensor["token"]: sensor["channel"] for sensor in self.sensor}
        channel_of = {c["token"]: channel_of_sensor[c["sensor_token"]] for c in self.calibrated_sensor}
        keyframes = [row for row in rows if row["is_key_frame"]]
        self._require_known("sample_data", keyframes, "calibrated_sensor_token", self.calibrated_sensor)
        wanted = {LIDAR_CHANNEL, *CAMERA_CHANNELS}
        kept = [row for row in keyframes if channel_of[row["calibrated_sensor_token"]] in wanted]
        self._require_rows("sample_data", kept)
        places = Counter((row["sample_token"], channel_of[row["calibrated_sensor_token"]]) for row in kept)
        for (sample, channel), count in places.items():
            if count > 1:
                raise DataError(f"{path}: keyframe {sample} has {count} records of {channel}; copy the table again")
        return kept

    def _require_modalities(self) -> None:
        self._require_known("calibrated_sensor", self.calibrated_sensor, "sensor_token", self.sensor)
        camera = {sensor["token"] for sensor in self.sensor if sensor["channel"] in CAMERA_CHANNELS}
        for row in self.calibrated_sensor:
            if row["sensor_token"] in camera and not row["camera_intrinsic"]:
                raise DataError(
                    f"{self.path_of('calibrated_sensor')}: record {row['token']!r} is of a camera and has no "
                    "camera_intrinsic; copy the table again"
                )

    def _require_known(self, table: str, rows: list[dict[str, Any]], key: str, others: list[dict[str, Any]]) -> None:
        """Raises `DataError` where a record refers to one that another table does not have."""
        known = {other["token"] for other in others}
        unknown = next((row for row in rows if row[key] not in known), None)
        if unknown is not None:
            other = self.path_of(key.removesuffix("_token"))
            raise DataError(
                f"{self.path_of(table)}: record {unknown['token']!r} refers to {unknown[key]!r}, which is not in "
                f"{other}; copy the tables again"
            )

    def _index(self) -> None:
        """The devkit's own indices over the tables."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.__make_reverse_index__(False)
        except (KeyError, IndexError, TypeError) as error:
            raise DataError(
                f"{storage.join(self.dataroot, self.version)}: the tables contradict each other: {error} is referred "
                "to but missing; copy all of the version's tables again"
            ) from error

    def _labels(self) -> dict[str, str]:
        """The label file of each lidar sweep, where nuScenes-lidarseg is there."""
        if "lidarseg.json" not in storage.list_names(storage.join(self.dataroot, self.version)):
            return {}
        rows = self._read("lidarseg")
        self._require_rows("lidarseg", rows)
        return {row["sample_data_token"]: row["filename"] for row in rows}


def _keyframes_of_scene(tables: _Tables, scene: dict[str, Any]) -> Iterator[Keyframe]:
    splits = pretraining_splits(scene["name"], _official_splits(scene["name"]))
    path, token, previous = tables.path_of("sample"), scene["first_sample_token"], ""
    seen: set[str] = set()
    while token:
        if token in seen:
            raise DataError(f"{path}: {scene['name']}: sample {token} comes after itself; copy the tables again")
        seen.add(token)
        sample = tables.record("sample", token, "sample" if previous else "scene")
        for key, expected in (("scene_token", scene["token"]), ("prev", previous)):
            if sample[key] != expected:
                raise DataError(
                    f"{path}: record {token!r}: {key} is {sample[key]!r}, but it comes after {previous or 'none'!r} in "
                    f"{scene['name']} ({scene['token']}); copy the tables again"
                )
        absent = tuple(name for name in (LIDAR_CHANNEL, *CAMERA_CHANNELS) if name not in sample["data"])
        frame = None if LIDAR_CHANNEL in absent else _frame(tables, sample, scene["name"], splits)
        yield Keyframe(scene["name"], token, frame, absent)
        previous, token = token, sample["next"]


def _require_every_sample(tables: _Tables, keyframes: list[Keyframe]) -> None:
    """Raises `DataError` where a sample is in no scene's chain, as when a scene's first sample is not its first."""
    chained = {each.token for each in keyframes}
    lost = [sample for sample in tables.sample if sample["token"] not in chained]
    if lost:
        scene_of = {scene["token"]: scene["name"] for scene in tables.scene}
        name = scene_of.get(lost[0]["scene_token"], f"scene {lost[0]['scene_token']!r}, which is not in the table")
        raise DataError(
            f"{tables.path_of('scene')}: {len(lost)} samples of {tables.path_of('sample')} are in no scene's chain "
            f"from its first_sample_token, the first is {lost[0]['token']} of {name}; copy both tables again"
        )


def _frame(tables: _Tables, sample: dict[str, Any], scene: str, splits: tuple[str, ...]) -> Frame:
    lidar = tables.record("sample_data", sample["data"][LIDAR_CHANNEL], "sample")
    ego_from_lidar, _ = _calibration(tables, lidar)
    global_from_ego = _ego_pose(tables, lidar)
    return Frame(
        token=sample["token"],
        scene=scene,
        timestamp=int(lidar["timestamp"]),
        lidar_token=lidar["token"],
        lidar_path=lidar["filename"],
        label_path=tables.labels.get(lidar["token"]),
        ego_from_lidar=ego_from_lidar,
        global_from_ego=global_from_ego,
        cameras=tuple(
            _camera(tables, channel, sample["data"][channel], ego_from_lidar, global_from_ego)
            for channel in CAMERA_CHANNELS
            if channel in sample["data"]
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
        image_path=image["filename"],
        width=image["width"],
        height=image["height"],
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


@lru_cache(maxsize=1)
def _splits_of_scenes() -> dict[str, tuple[str, ...]]:
    splits: dict[str, tuple[str, ...]] = {}
    for name, scenes in scenes_of_splits().items():
        for scene in scenes:
            splits[scene] = (*splits.get(scene, ()), name)
    return splits


def _official_splits(scene: str) -> tuple[str, ...]:
    return _splits_of_scenes().get(scene, ())


def _broken_links(root: str, folder: str, where: str) -> set[str]:
    """The names in a folder that are links to nothing. Raises `DataError` for a link that ends outside `root`."""
    broken: set[str] = set()
    if storage.is_remote(root):
        return broken
    with os.scandir(where) as entries:
        for entry in entries:
            if entry.is_symlink():
                path = storage.safe_join(root, posixpath.join(folder, entry.name))
                if not os.path.exists(path):
                    broken.add(entry.name)
    return broken
