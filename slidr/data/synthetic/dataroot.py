"""Writes the synthetic world as a nuScenes v1.0 dataroot: files of every keyframe first, the tables last."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import multiprocessing
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slidr.config import ConfigError
from slidr.data import records, storage
from slidr.data.storage import DataError
from slidr.data.synthetic.names import ATTRIBUTES, CAMERAS, CATEGORIES, LIDAR, SCENES, VISIBILITIES
from slidr.data.synthetic.raycast import pinhole
from slidr.data.synthetic.sensors import Sweep, View, cast_shadows, render, sweep
from slidr.data.synthetic.street import Street, build_street
from slidr.shapes import Float64

PARAMETERS = "parameters.json"
KEYFRAME_SECONDS = 0.5
FORMAT = 1  # counts changes of the world: a folder of another format is refused, not mixed
_RENDER = "remove it: the keyframe is rendered again"
_DONE = "synthetic"  # folder of one small file per finished keyframe


@dataclass(frozen=True)
class World:
    """What decides every byte of a dataroot."""

    version: str
    splits: tuple[tuple[str, int], ...]  # (split, scenes)
    keyframes: int
    scale: float
    seed: int
    format: int = FORMAT

    def scenes(self) -> list[int]:
        """Scene numbers in table order."""
        pools = SCENES[self.version]
        return sorted(number for split, count in self.splits for number in pools[split][:count])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width, pixels."""
        return round(900 * self.scale), round(1600 * self.scale)


@dataclass(frozen=True)
class Keyframe:
    """What the sensors of one keyframe saw."""

    views: dict[str, View]
    sweep: Sweep


def write_dataroot(
    out: str | Path,
    *,
    splits: Mapping[str, int] | None = None,
    scenes: int | None = None,
    keyframes: int = 8,
    scale: float = 0.25,
    seed: int = 0,
    version: str = "v1.0-trainval",
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes a nuScenes v1.0 dataroot of synthetic street scenes and returns its folder.

    The same arguments give the same bytes, whatever the number of worker processes. Finished keyframes are kept, so
    that a run that was cut off is completed by running it again; the tables appear last, once everything is there.

    Args:
        out: The dataroot; made where it is missing.
        splits: How many scenes of each split: of `parametrize`, `verify` and `val` for v1.0-trainval (the first two are
            train scenes), of `mini_train` and `mini_val` for v1.0-mini. Default: `scenes` shared out.
        scenes: How many scenes in all where `splits` is not given, at least one per split. Default 10 (mini: 4).
        keyframes: Keyframes per scene, half a second apart.
        scale: Image size over nuScenes' 1600 x 900.
        seed: Decides everything that is drawn.
        version: v1.0-trainval or v1.0-mini.
        workers: Processes that render.
        progress: Called with (keyframes done, keyframes in all) as they finish.

    Raises:
        ValueError: For arguments that cannot be used, or a folder that holds another world.
    """
    world = _world(splits, scenes, keyframes, scale, seed, version)
    root = Path(out)
    _claim(root, world)
    jobs = [(number, k) for number in world.scenes() for k in range(keyframes)]
    todo = [job for job in jobs if not _finished(root, world, *job)]
    done = len(jobs) - len(todo)
    if progress is not None:
        progress(done, len(jobs))
    for _ in _run(root, world, todo, workers):
        done += 1
        if progress is not None:
            progress(done, len(jobs))
    _write_tables(root, world)
    return root


def _world(
    splits: Mapping[str, int] | None,
    scenes: int | None,
    keyframes: int,
    scale: float,
    seed: int,
    version: str,
) -> World:
    if version not in SCENES:
        raise ConfigError(f"version: got {version!r}, expected one of {sorted(SCENES)}")
    pools = SCENES[version]
    if splits is not None and scenes is not None:
        raise ConfigError("scenes: give either splits (scenes of each) or scenes (in all), not both")
    if splits is None:
        total = scenes if scenes is not None else (10 if version == "v1.0-trainval" else 4)
        shares = {"parametrize": 0.6, "verify": 0.15, "val": 0.25, "mini_train": 0.7, "mini_val": 0.3}
        if total < len(pools):
            raise ConfigError(f"scenes: got {total}, expected at least {len(pools)}, one for each of {list(pools)}")
        splits = {name: max(1, int(total * shares[name])) for name in pools}
        first = next(iter(pools))
        splits[first] = total - sum(count for name, count in splits.items() if name != first)
    for name, count in splits.items():
        if name not in pools:
            raise ConfigError(f"splits: got {name!r}, expected {list(pools)} for version {version}")
        if not 0 <= count <= len(pools[name]):
            raise ConfigError(f"splits.{name}: got {count} scenes, expected 0 to {len(pools[name])}")
    if sum(splits.values()) < 1:
        raise ConfigError("splits: no scene asked for; give at least one split a scene")
    if keyframes < 1:
        raise ConfigError(f"keyframes: got {keyframes}, expected at least 1")
    if not 0.02 <= scale <= 1:
        raise ConfigError(f"scale: got {scale}, expected 0.02 to 1 (of 1600 x 900)")
    return World(version, tuple((name, int(splits.get(name, 0))) for name in pools), keyframes, float(scale), int(seed))


def _claim(root: Path, world: World) -> None:
    """Marks the folder as this world's, or refuses one that is something else's."""
    path = root / PARAMETERS
    mine = json.loads(json.dumps(asdict(world)))
    if storage.exists(path):
        theirs = records.read_json(path, next_step="remove this folder or choose another")
        if theirs != mine and isinstance(theirs, dict):
            differ = [key for key in mine if theirs.get(key) != mine[key]]
            what = "; ".join(f"{key}: there {theirs.get(key)!r}, asked {mine[key]!r}" for key in differ)
            raise ConfigError(
                f"{path}: the folder holds another synthetic world ({what}); choose another folder or remove it"
            )
        if theirs != mine:
            raise ConfigError(
                f"{path}: expected a synthetic world's parameters, got {type(theirs).__name__}; remove this folder or "
                "choose another"
            )
        return
    if root.exists() and any(not path.name.endswith(".part") for path in root.iterdir()):
        raise ConfigError(f"{root}: is not empty and holds no {PARAMETERS}; choose another folder")
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{root}: cannot be made ({error.strerror}); choose another folder") from error
    _write(path, (json.dumps(mine, indent=1) + "\n").encode())


def _run(root: Path, world: World, jobs: list[tuple[int, int]], workers: int) -> Iterator[tuple[int, int]]:
    """Writes keyframes, here or in worker processes, and tells each (scene, keyframe) as it is done."""
    if workers <= 1 or len(jobs) <= 1:
        for number, k in jobs:
            write_keyframe(root, world, number, k)
            yield number, k
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(write_keyframe, root, world, number, k): (number, k) for number, k in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------------------ one keyframe


@lru_cache(maxsize=2)
def street_of(world: World, number: int) -> Street:
    """The street of a scene."""
    return build_street(np.random.default_rng([world.seed, number]), world.keyframes * KEYFRAME_SECONDS)


def see(world: World, number: int, keyframe: int, street: Street | None = None) -> Keyframe:
    """Casts one keyframe: six pictures, each at its camera's own moment, and a sweep."""
    street = street_of(world, number) if street is None else street
    seconds = keyframe * KEYFRAME_SECONDS
    height, width = world.image_size
    sun = cast_shadows(street.at(seconds), street.look, street.ego(seconds)[0])
    views = {}
    for position, (channel, camera) in enumerate(CAMERAS.items()):
        moment = seconds + camera["delay"] / 1e6
        pose = _street_from_ego(street, moment) @ _pose(camera["rotation"], camera["translation"])
        grid = pinhole(intrinsics(camera, world.scale), pose, height, width)
        rng = np.random.default_rng([world.seed, number, keyframe, position])
        views[channel] = render(street.at(moment), grid, street.look, sun, rng)
    pose = _street_from_ego(street, seconds) @ _pose(LIDAR["rotation"], LIDAR["translation"])
    rng = np.random.default_rng([world.seed, number, keyframe, len(CAMERAS)])
    return Keyframe(views, sweep(street.at(seconds), pose, rng))


def write_keyframe(root: Path, world: World, number: int, keyframe: int) -> None:
    """Casts and writes one keyframe; its mark in the folder of finished keyframes comes last."""
    street = street_of(world, number)
    seen = see(world, number, keyframe, street)
    files = _files(world, number, keyframe)
    for channel, view in seen.views.items():
        buffer = io.BytesIO()
        Image.fromarray(view.image).save(buffer, "JPEG", quality=90)
        _write(root / files[channel], buffer.getvalue())
    _write(root / files["LIDAR_TOP"], seen.sweep.points.tobytes())
    _write(root / files["lidarseg"], seen.sweep.label.tobytes())
    hits = np.bincount(seen.sweep.owner[seen.sweep.owner >= 0], minlength=len(street.category))
    boxes = {str(o): int(hits[o]) for o in np.flatnonzero(hits) if street.category[o]}
    _write(root / files["done"], json.dumps({"points_per_object": boxes}).encode())


def _finished(root: Path, world: World, number: int, keyframe: int) -> bool:
    """Whether a keyframe's files and its mark are there; one whose mark is damaged is rendered again."""
    files = _files(world, number, keyframe)
    if not all((root / path).is_file() for path in files.values()):
        return False
    try:
        _points_per_object(root / files["done"])
    except DataError:
        return False
    return True


def _points_per_object(path: Path, objects: int | None = None) -> dict[int, int]:
    """Lidar points of each object, from a finished keyframe's mark. Raises `DataError` for a damaged one."""
    counts = records.read_record(path, {"points_per_object": dict}, next_step=_RENDER)["points_per_object"]
    for key, points in counts.items():
        known = key.isascii() and key.isdigit() and (objects is None or int(key) < objects)
        if not (known and type(points) is int and 0 < points < 2**31):
            raise DataError(f"{path}: expected points of each object, got {key[:40]!r}: {points!r:.40}; {_RENDER}")
    return {int(key): points for key, points in counts.items()}


def _files(world: World, number: int, keyframe: int) -> dict[str, str]:
    """Paths of a keyframe's files, relative to the dataroot."""
    log = _log(number)
    files = {}
    for channel in CAMERAS:
        files[channel] = f"samples/{channel}/{log}__{channel}__{_time(number, keyframe, channel)}.jpg"
    files["LIDAR_TOP"] = f"samples/LIDAR_TOP/{log}__LIDAR_TOP__{_time(number, keyframe, 'LIDAR_TOP')}.pcd.bin"
    lidar = token(world, "sample_data", number, keyframe, "LIDAR_TOP")
    files["lidarseg"] = f"lidarseg/{world.version}/{lidar}_lidarseg.bin"
    files["done"] = f"{_DONE}/scene-{number:04d}_{keyframe:04d}.json"
    return files


def _write(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder, where a file of the synthetic world belongs; remove it") from None
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ poses and names


def intrinsics(camera: Mapping[str, Any], scale: float) -> Float64[np.ndarray, "3 3"]:
    """A camera's matrix for images of `scale` times 1600 x 900, pixels."""
    focal, (u, v) = camera["focal"] * scale, camera["centre"]
    return np.array([[focal, 0, u * scale], [0, focal, v * scale], [0, 0, 1]])


def _rotation(quaternion: tuple[float, float, float, float]) -> Float64[np.ndarray, "3 3"]:
    w, x, y, z = np.asarray(quaternion) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _pose(quaternion: tuple[float, float, float, float], translation: Any) -> Float64[np.ndarray, "4 4"]:
    pose = np.eye(4)
    pose[:3, :3] = _rotation(quaternion)
    pose[:3, 3] = translation
    return pose


def _upright(yaw: float) -> tuple[float, float, float, float]:
    return float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))


def _street_from_ego(street: Street, seconds: float) -> Float64[np.ndarray, "4 4"]:
    position, yaw = street.ego(seconds)
    return _pose(_upright(yaw), position)


def _map_place(world: World, number: int) -> tuple[Float64[np.ndarray, " 3"], float]:
    """Where a scene's street lies on the map, and its heading."""
    rng = np.random.default_rng([world.seed, number, 1_000_000])
    return np.array([*rng.uniform(200, 2000, 2), 0.0]), float(rng.uniform(-np.pi, np.pi))


def token(world: World, *parts: object) -> str:
    """A 32-digit token that names a record of this world, always the same."""
    return hashlib.md5("/".join(map(str, ("slidr", world.seed, world.version, *parts))).encode()).hexdigest()


def _time(number: int, keyframe: int, channel: str) -> int:
    start = 1_532_402_927_647_951 + number * 3_600_000_000
    delay = CAMERAS[channel]["delay"] if channel in CAMERAS else 0
    return start + round(keyframe * KEYFRAME_SECONDS * 1e6) + delay


def _log(number: int) -> str:
    moment = datetime.datetime.fromtimestamp(_time(number, 0, "LIDAR_TOP") // 1_000_000, datetime.UTC)
    return f"n015-{moment + datetime.timedelta(hours=8):%Y-%m-%d-%H-%M-%S}+0800"


# ------------------------------------------------------------------------------------------------ tables


def _write_tables(root: Path, world: World) -> None:
    tables = _static_tables(world)
    for number in world.scenes():
        for name, rows in _scene_tables(root, world, number).items():
            tables[name].extend(rows)
    picture = io.BytesIO()
    Image.new("L", (16, 16), 255).save(picture, "PNG")
    for row in tables["map"]:
        _write(root / row["filename"], picture.getvalue())
    for name, rows in tables.items():
        _write(root / world.version / f"{name}.json", json.dumps(rows, indent=1).encode())


def _static_tables(world: World) -> dict[str, list[dict[str, Any]]]:
    def named(kind: str, names: tuple[str, ...]) -> list[dict[str, Any]]:
        return [{"token": token(world, kind, name), "name": name, "description": ""} for name in names]

    logs = [
        {
            "token": token(world, "log", number),
            "logfile": _log(number),
            "vehicle": "n015",
            "date_captured": _log(number)[5:15],
            "location": "singapore-onenorth",
        }
        for number in world.scenes()
    ]
    map_token = token(world, "map")
    channels = ("LIDAR_TOP", *CAMERAS)
    return {
        "category": [{**row, "index": index} for index, row in enumerate(named("category", CATEGORIES))],
        "attribute": named("attribute", ATTRIBUTES),
        "visibility": [
            {
                "token": key,
                "level": level,
                "description": f"visibility of whole object is between {level[1:]} %",
            }
            for key, level in VISIBILITIES
        ],
        "sensor": [
            {
                "token": token(world, "sensor", channel),
                "channel": channel,
                "modality": "camera" if channel in CAMERAS else "lidar",
            }
            for channel in channels
        ],
        "log": logs,
        "map": [
            {
                "token": map_token,
                "category": "semantic_prior",
                "filename": f"maps/{map_token}.png",
                "log_tokens": [log["token"] for log in logs],
            }
        ],
        **{
            name: []
            for name in (
                *("scene", "sample", "sample_data", "ego_pose", "calibrated_sensor", "instance"),
                *("sample_annotation", "lidarseg"),
            )
        },
    }


def _scene_tables(root: Path, world: World, number: int) -> dict[str, list[dict[str, Any]]]:
    """The rows that one scene adds to the tables."""
    street = street_of(world, number)
    last = world.keyframes - 1

    def sample(k: int) -> str:
        return token(world, "sample", number, k) if 0 <= k <= last else ""

    def data(k: int, channel: str) -> str:
        return token(world, "sample_data", number, k, channel) if 0 <= k <= last else ""

    tables: dict[str, list[dict[str, Any]]] = {
        "sample": [],
        "sample_data": [],
        "ego_pose": [],
        "lidarseg": [],
    }
    tables["scene"] = [
        {
            "token": token(world, "scene", number),
            "log_token": token(world, "log", number),
            "nbr_samples": world.keyframes,
            "name": f"scene-{number:04d}",
            "description": "A synthetic street",
            "first_sample_token": sample(0),
            "last_sample_token": sample(last),
        }
    ]
    tables["calibrated_sensor"] = [
        {
            "token": token(world, "calibrated_sensor", number, channel),
            "sensor_token": token(world, "sensor", channel),
            "translation": list(spec["translation"]),
            "rotation": list(spec["rotation"]),
            "camera_intrinsic": intrinsics(spec, world.scale).tolist() if channel in CAMERAS else [],
        }
        for channel, spec in (("LIDAR_TOP", LIDAR), *CAMERAS.items())
    ]
    height, width = world.image_size
    for k in range(world.keyframes):
        files = _files(world, number, k)
        tables["sample"].append(
            {
                "token": sample(k),
                "timestamp": _time(number, k, "LIDAR_TOP"),
                "scene_token": token(world, "scene", number),
                "prev": sample(k - 1),
                "next": sample(k + 1),
            }
        )
        tables["lidarseg"].append(
            {
                "token": data(k, "LIDAR_TOP"),
                "sample_data_token": data(k, "LIDAR_TOP"),
                "filename": files["lidarseg"],
            }
        )
        for channel in ("LIDAR_TOP", *CAMERAS):
            camera = channel in CAMERAS
            delay = CAMERAS[channel]["delay"] / 1e6 if camera else 0.0
            tables["ego_pose"].append(
                {
                    "token": data(k, channel),
                    "timestamp": _time(number, k, channel),
                    **_ego_row(world, street, number, k * KEYFRAME_SECONDS + delay),
                }
            )
            tables["sample_data"].append(
                {
                    "token": data(k, channel),
                    "sample_token": sample(k),
                    "ego_pose_token": data(k, channel),
                    "calibrated_sensor_token": token(world, "calibrated_sensor", number, channel),
                    "timestamp": _time(number, k, channel),
                    "fileformat": "jpg" if camera else "pcd",
                    "is_key_frame": True,
                    "height": height if camera else 0,
                    "width": width if camera else 0,
                    "filename": files[channel],
                    "prev": data(k - 1, channel),
                    "next": data(k + 1, channel),
                }
            )
    return tables | _boxes(root, world, number, street)


def _ego_row(world: World, street: Street, number: int, seconds: float) -> dict[str, Any]:
    position, yaw = street.ego(seconds)
    where, heading = _map_place(world, number)
    return {
        "rotation": list(_upright(yaw + heading)),
        "translation": (_rotation(_upright(heading)) @ position + where).tolist(),
    }


def _boxes(root: Path, world: World, number: int, street: Street) -> dict[str, list[dict[str, Any]]]:
    """Instances and annotations: the true box of every object with a category, wherever the lidar hits it."""
    where, heading = _map_place(world, number)
    turned = _rotation(_upright(heading))
    seen: dict[int, list[tuple[int, int]]] = {}
    for k in range(world.keyframes):
        path = root / _files(world, number, k)["done"]
        for key, points in _points_per_object(path, len(street.category)).items():
            seen.setdefault(key, []).append((k, points))
    instances, annotations = [], []
    for o, moments in sorted(seen.items()):
        tokens = [token(world, "sample_annotation", number, o, k) for k, _ in moments]
        instances.append(
            {
                "token": token(world, "instance", number, o),
                "category_token": token(world, "category", street.category[o]),
                "nbr_annotations": len(tokens),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            }
        )
        length, width, height = street.size[o]
        for i, (k, points) in enumerate(moments):
            centre = street.positions(k * KEYFRAME_SECONDS)[o] + (0, 0, height / 2)
            annotations.append(
                {
                    "token": tokens[i],
                    "sample_token": token(world, "sample", number, k),
                    "instance_token": token(world, "instance", number, o),
                    "visibility_token": "4",
                    "attribute_tokens": _attributes(world, street.category[o], float(street.speed[o])),
                    "translation": (turned @ centre + where).tolist(),
                    "size": [float(width), float(length), float(height)],
                    "rotation": list(_upright(float(street.yaw[o]) + heading)),
                    "prev": tokens[i - 1] if i > 0 else "",
                    "next": tokens[i + 1] if i + 1 < len(tokens) else "",
                    "num_lidar_pts": points,
                    "num_radar_pts": 0,
                }
            )
    return {"instance": instances, "sample_annotation": annotations}


def _attributes(world: World, category: str, speed: float) -> list[str]:
    moving = speed > 0
    if category.startswith("human"):
        name = "pedestrian.moving" if moving else "pedestrian.standing"
    elif category in ("vehicle.bicycle", "vehicle.motorcycle"):
        name = "cycle.with_rider" if moving else "cycle.without_rider"
    elif category.startswith("vehicle"):
        name = "vehicle.moving" if moving else "vehicle.parked"
    else:
        return []
    return [token(world, "attribute", name)]
