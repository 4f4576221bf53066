"""What several inputs share: a keyframe without files, its points, and what bare rows of numbers say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slidr.config import AugmentConfig, DataConfig, SuperpixelConfig, VoxelConfig
from slidr.data.labels import CLASS_OF_RAW
from slidr.data.synthetic import dataroot
from slidr.types import Camera, Frame

WIDTH, HEIGHT = 48, 32
SUPERPIXELS = SuperpixelConfig(folder="superpixels", segments=6, sigma=0.0)
DATA = DataConfig(
    root="root",
    frames="frames.parquet",
    cameras=("CAM_FRONT",),
    image_size=(16, 24),
    voxel=VoxelConfig(size=(0.5, 2.0, 0.5)),
    augment=AugmentConfig(crop=False, drop_cuboid=False),
)
KITTI_DATA = replace(DATA, dataset="semantic_kitti")


def frame(number: int = 0, image: str = "jpg", variant: int = 0) -> Frame:
    """A keyframe whose one camera looks along the lidar's x axis."""
    camera_from_lidar = np.array([[0, -1, 0, 0], [0, 0, -1, 0.1], [1, 0, 0, 0.2], [0, 0, 0, 1]], float)
    moved = np.eye(4)
    moved[:3, 3] = (number + 0.5, variant, 0.25)
    camera = Camera(
        channel="CAM_FRONT",
        token=f"image{variant}{number}",
        image_path=f"samples/CAM_FRONT/{number}.{image}",
        width=WIDTH,
        height=HEIGHT,
        timestamp=1000 * number,
        intrinsics=np.array([[40, 0, WIDTH / 2], [0, 40, HEIGHT / 2], [0, 0, 1]], float),
        ego_from_camera=np.linalg.inv(camera_from_lidar) + 0.0,
        global_from_ego=moved,
        camera_from_lidar=camera_from_lidar,
    )
    return Frame(
        token=f"frame{variant}{number}",
        scene=f"scene-000{number}",
        timestamp=1000 * number + 7,
        lidar_token=f"lidar{variant}{number}",
        lidar_path=f"samples/LIDAR_TOP/{number}.bin",
        label_path=f"lidarseg/{number}.bin",
        ego_from_lidar=np.eye(4),
        global_from_ego=moved,
        cameras=(camera,),
        previous=None,
        next=None,
        splits=("train", "parametrize" if number % 2 == 0 else "verify"),
    )


def points(variant: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng([3, variant])
    xyz = rng.uniform((2, -3, -1), (12, 3, 1), (300, 3))
    more = rng.uniform(0, 1 if columns == 4 else 255, (300, columns - 3))
    return np.concatenate([xyz, more], axis=1).astype(np.float32)


def put(path: str, data: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(data)


def sweep_says(path: str, columns: int, value: Any) -> bool:
    """Whether a sample's points are a file's rows, all of them near the car, with an intensity that exists."""
    rows = np.frombuffer(Path(path).read_bytes(), np.float32).reshape(-1, columns)
    most = 255.0 if columns == 5 else 1.0
    sane = (
        np.isfinite(rows).all()
        and np.abs(rows[:, :3]).max() < 1e4
        and 0 <= rows[:, 3].min() <= rows[:, 3].max() <= most
    )
    if not sane:
        return False
    known = {tuple(row) for row in rows[:, :3].tolist()}
    if hasattr(value, "points"):
        return all(tuple(row) in known for row in value.points.tolist())
    return bool(np.array_equal(value.distance, np.hypot(rows[:, 0], rows[:, 1])))


def labels_say(path: str, dataset: str, value: Any) -> bool:
    raw = np.frombuffer(Path(path).read_bytes(), np.uint32 if dataset == "semantic_kitti" else np.uint8)
    table = CLASS_OF_RAW[dataset]  # type: ignore[index]
    kept = raw & 0xFFFF if dataset == "semantic_kitti" else raw
    if kept.max() >= len(table) or (table[kept] < 0).any():
        return False
    return bool(np.array_equal(value.point_labels, table[kept]))


def shape(value: Any) -> Any:
    """A JSON value's structure: keys and types, not values; lists of numbers by their length."""
    if isinstance(value, dict):
        return tuple(sorted((key, shape(inner)) for key, inner in value.items()))
    if isinstance(value, list):
        return ("list", *(shape(inner) for inner in value))
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def numbers_are_sane(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(numbers_are_sane, value.values()))
    if isinstance(value, list):
        return all(map(numbers_are_sane, value))
    return not isinstance(value, int | float) or abs(value) < 1e17


def write_unrendered(root: Path, **world: Any) -> Path:
    """A synthetic dataroot without its seconds of rendering: true tables, no annotations, empty files."""

    def write(folder: Path, made: dataroot.World, number: int, keyframe: int) -> None:
        for name, path in dataroot._files(made, number, keyframe).items():
            put(str(folder / path), b'{"points_per_object": {}}' if name == "done" else b"")

    rendered, dataroot.write_keyframe = dataroot.write_keyframe, write
    try:
        return dataroot.write_dataroot(root, **world)
    finally:
        dataroot.write_keyframe = rendered


def json_says(path: str) -> Callable[[Any], bool]:
    """Whether a file is JSON with the undamaged one's keys and types (a copy of it is in `intact`)."""

    def says(value: Any) -> bool:
        read = json.loads(Path(path).read_bytes(), parse_constant=_no_constant)
        wanted = json.loads(Path("intact").read_bytes())
        return shape(read) == shape(wanted) and numbers_are_sane(read)

    return says


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def keeping(path: str, make: Callable[[int], None]) -> Callable[[int], None]:
    """`make`, with a copy of what it makes for `json_says`."""

    def kept(variant: int) -> None:
        make(variant)
        shutil.copyfile(path, "intact")

    return kept
