"""Inputs that describe data: the frame table, nuScenes' tables, SemanticKITTI's sequences."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from slidr.data import nuscenes, semantic_kitti
from slidr.data.frames import FrameTable, write_frames
from slidr.data.samples import scan_sample
from slidr.types import Frame

from . import formats, trees
from .harness import Input
from .shared import KITTI_DATA, frame, labels_say, numbers_are_sane, points, put, shape, sweep_says, write_unrendered

# ---------------------------------------------------------------------------------------------- frame table


def make_table(variant: int) -> None:
    write_frames([frame(number, variant=variant) for number in range(4)], "frames.parquet")


def read_table() -> Any:
    table = FrameTable.open("frames.parquet")
    chosen = table.select(("parametrize", "verify"))
    paths = (table.lidar_paths, table.label_paths, table.scenes, table.unlabelled)
    return [*table], chosen.tokens, chosen.images(["CAM_FRONT"]), paths, table.dataset, table.fingerprint


# ---------------------------------------------------------------------------------------------- nuScenes' tables

TABLES = ("category", "sensor", "calibrated_sensor", "log", "map", "scene", "sample", "sample_data", "ego_pose")


@cache
def world(variant: int) -> Path:
    """The tables of a synthetic world of two scenes of two keyframes; its samples' files are empty."""
    root = Path(tempfile.mkdtemp(dir=Path.cwd().parent), "root")
    splits = {"mini_train": 1, "mini_val": 1}
    write_unrendered(root, splits=splits, keyframes=2, scale=0.02, seed=variant, version="v1.0-mini")
    return root


def make_nuscenes(variant: int) -> None:
    for name in (*TABLES, "lidarseg"):
        table = (world(variant) / "v1.0-mini" / f"{name}.json").read_bytes()
        put(f"root/v1.0-mini/{name}.json", table)
        put(f"intact/{name}.json", table)
    for folder in ("samples", "lidarseg"):
        shutil.copytree(world(variant) / folder, f"root/{folder}")


def read_nuscenes() -> Any:
    return nuscenes.read_frames("root", "v1.0-mini")


def tables_say(name: str) -> Callable[[Any], bool]:
    """Whether a table is JSON of the undamaged one's keys and types, and its frames are possible ones."""

    def says(frames: Any) -> bool:
        intact = json.loads(Path(f"intact/{name}.json").read_bytes())
        damaged = json.loads(Path(f"root/v1.0-mini/{name}.json").read_bytes())
        shapes = {shape(row) for row in intact}
        return (
            all(shape(row) in shapes for row in damaged) and numbers_are_sane(damaged) and all(map(_possible, frames))
        )

    return says


def _possible(each: Frame) -> bool:
    matrices = [each.ego_from_lidar, each.global_from_ego]
    for camera in each.cameras:
        matrices += [camera.ego_from_camera, camera.global_from_ego, camera.camera_from_lidar]
        if not (camera.width > 0 and camera.height > 0 and np.linalg.det(camera.intrinsics) > 0):
            return False
    return all(np.isfinite(m).all() and np.allclose(m[:3, :3] @ m[:3, :3].T, np.eye(3), atol=1e-3) for m in matrices)


# ---------------------------------------------------------------------------------------------- SemanticKITTI


def make_kitti(variant: int) -> None:
    for sequence, scans in {"00": 3, "08": 2}.items():
        folder = f"root/sequences/{sequence}"
        for number in range(scans):
            put(f"{folder}/velodyne/{number:06d}.bin", points(10 * variant + number, 4).tobytes())
            labels = np.random.default_rng([7, variant, number]).choice([10, 11, 40, 50, 70, 81], 300).astype(np.uint32)
            put(f"{folder}/labels/{number:06d}.label", (labels | (3 << 16)).tobytes())
        projection = "7.070912e+02 0 6.018873e+02 0 0 7.070912e+02 1.831104e+02 0 0 0 1 0"
        place = f"0.0 -1.0 0.0 0.{variant}12 0.0 0.0 -1.0 -0.0765 1.0 0.0 0.0 -0.2701"
        rows = [f"P{i}: {projection}" for i in range(4)] + [f"Tr: {place}"]
        put(f"{folder}/calib.txt", ("\n".join(rows) + "\n").encode())
        poses = [f"1 0 0 {0.1 * i:.6f} 0 1 0 {variant} 0 0 1 {1.25 * i:.6f}" for i in range(scans)]
        put(f"{folder}/poses.txt", ("\n".join(poses) + "\n").encode())
        put(f"{folder}/times.txt", "".join(f"{(0.1 + variant) * i:.6e}\n" for i in range(scans)).encode())


def read_kitti() -> Any:
    return semantic_kitti.read_frames("root")


def read_scan() -> Any:
    first = semantic_kitti.read_frames("root")[0]
    return scan_sample(first, KITTI_DATA, student="minkunet34c", seed=0, epoch=0, training=False)


def text_says(name: str) -> Callable[[Any], bool]:
    """Whether the numbers of frames are those of a text file, read by numpy alone, and possible ones."""

    def says(frames: Any) -> bool:
        own = [each for each in frames if each.scene == "00"]
        rows = [line.split() for line in Path(f"root/sequences/00/{name}.txt").read_text().splitlines() if line.strip()]
        if name == "calib":
            (row,) = [row[1:] for row in rows if row[0] == "Tr:"]
            return _are([each.ego_from_lidar[:3] for each in own], [row] * 3) and all(map(_possible, own))
        if name == "poses":
            return _are([each.global_from_ego[:3] for each in own], rows[:3]) and all(map(_possible, own))
        return _are([np.float64(each.timestamp / 1e6) for each in own], rows[:3])

    return says


def poses_are_left_out(frames: Any) -> bool:
    """Whether a sequence has no poses, which nothing but a map needs, where poses.txt is too short for its scans."""
    rows = Path("root/sequences/00/poses.txt").read_text().split("\n")
    own = [each for each in frames if each.scene == "00"]
    short = sum(1 for row in rows if row.strip()) < len(own)
    return short and all(np.array_equal(each.global_from_ego, np.eye(4)) for each in own)


def _are(values: list[Any], rows: list[list[str]]) -> bool:
    wanted = [np.array([float(word) for word in row]) for row in rows]
    return all(
        np.allclose(np.ravel(v), w, atol=1e-6) and np.isfinite(w).all() for v, w in zip(values, wanted, strict=True)
    )


INPUTS = (
    Input("frame table", make_table, "frames.parquet", read_table, formats.PARQUET),
    *(
        Input(
            f"nuScenes {name}.json",
            make_nuscenes,
            f"root/v1.0-mini/{name}.json",
            read_nuscenes,
            trees.JSON,
            says=tables_say(name),
            also=("root/v1.0-mini",),
        )
        for name in (*TABLES, "lidarseg")
    ),
    *(
        Input(
            f"KITTI {name}.txt",
            make_kitti,
            f"root/sequences/00/{name}.txt",
            read_kitti,
            formats.TEXT,
            text_says(name),
            poses_are_left_out if name == "poses" else lambda frames: False,
        )
        for name in ("calib", "poses", "times")
    ),
    Input(
        "KITTI sweep",
        make_kitti,
        "root/sequences/00/velodyne/000000.bin",
        read_scan,
        formats.numbers(np.float32, 4),
        says=lambda value: sweep_says("root/sequences/00/velodyne/000000.bin", 4, value),
        also=("labels/000000.label: holds 300 labels for a sweep of",),  # which of the two is damaged, nobody knows
    ),
    Input(
        "KITTI labels",
        make_kitti,
        "root/sequences/00/labels/000000.label",
        read_scan,
        formats.numbers(np.uint32, 1),
        says=lambda value: labels_say("root/sequences/00/labels/000000.label", "semantic_kitti", value),
    ),
)
