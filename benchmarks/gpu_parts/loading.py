"""How many training samples a second the CPUs make, without Ray: JPEGs decoded, paired, augmented, voxelized.

The keyframes are made up and written as a nuScenes root holds them: a sweep, six JPEGs, six superpixel maps. A
process makes samples one after the other on a core of its own; samples are not handed over.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_parts import street
from gpu_parts.bench import Bench
from gpu_parts.rows import Row
from slidr.config import DataConfig
from slidr.data.collate import collate_pairs
from slidr.types import Frame

CORES = (1, 4, 16)
KEYFRAMES = 3
SECONDS = 4.0  # of each measurement at full size


def loader(bench: Bench) -> Iterator[Row]:
    if importlib.util.find_spec("PIL") is None:
        yield Row("loader", "samples a second", note="Pillow is not installed", state="skipped")
        return
    small = bench.size.beams < 32
    seconds = 0.2 if small else SECONDS
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        photograph = (90, 160) if small else street.PHOTOGRAPH
        frames = write_keyframes(Path(folder), bench.size.beams, bench.size.columns, photograph)
        data = replace(bench.config().data, root=folder)
        alone = _alone(frames, data, seconds)
        yield Row("loader", "one sample on one core", "ms", cpu=1e3 * alone, note="CPU time")
        if not small:
            setting = {"job": "pretrain", "pixels": photograph[0] * photograph[1], "cameras": len(frames[0].cameras)}
            bench.cost({"name": "sample", "value": float(f"{alone:.4g}"), "setting": setting})
        for many in CORES:
            for how in ("processes", "threads"):
                what = f"{many} {how if many > 1 else how.removesuffix('es').removesuffix('s')}"
                if many > len(cores):
                    note = f"this machine has {len(cores)} cores"
                    yield Row("loader", what, "samples/s", note=note, state="skipped")
                elif how == "processes":
                    yield Row("loader", what, "samples/s", cpu=_processes(many, cores, frames, data, alone, seconds))
                elif many > 1 or small:
                    rate = _threads(many, frames, data, alone, seconds)
                    yield Row("loader", f"{what}, collated", "samples/s", cpu=rate)


def write_keyframes(root: Path, beams: int, columns: int, photograph: tuple[int, int]) -> list[Frame]:
    """Keyframes under `root`, their superpixel maps in its folder "labels"."""
    from PIL import Image

    from slidr.data.images import encode_label_map

    height, width = photograph
    frames = []
    for number in range(KEYFRAMES):
        rng = np.random.default_rng(number)
        cloud = street.sweep(number, beams, columns)
        lidar = root / "samples" / "LIDAR_TOP" / f"{number}.pcd.bin"
        lidar.parent.mkdir(parents=True, exist_ok=True)
        np.column_stack([cloud, np.zeros(len(cloud))]).astype(np.float32).tofile(lidar)
        cameras = []
        for camera in street.cameras():
            path = Path("samples", camera.channel, f"{number}.jpg")
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(street.photograph(rng, photograph))
            image.save(root / path, quality=75)
            token = f"{camera.channel}-{number}"
            labels = root / "labels" / f"{token}.png"
            labels.parent.mkdir(exist_ok=True)
            labels.write_bytes(encode_label_map(street.superpixels(rng, photograph, 150)))
            scale = np.diag([width / street.PHOTOGRAPH[1], height / street.PHOTOGRAPH[0], 1.0])
            intrinsics = scale @ camera.intrinsics
            cameras.append(
                replace(camera, token=token, image_path=str(path), width=width, height=height, intrinsics=intrinsics)
            )
        eye, place = np.eye(4), str(lidar.relative_to(root))
        frames.append(
            Frame(f"keyframe-{number}", "street", 0, "", place, None, eye, eye, tuple(cameras), None, None, ("train",))
        )
    return frames


def make(frames: list[Frame], data: DataConfig, number: int) -> Any:
    """Training sample `number`: keyframes in turn, each time augmented in another way."""
    from slidr.data.samples import pair_sample

    frame, epoch = frames[number % len(frames)], number // len(frames)
    labels = str(Path(data.root, "labels"))
    return pair_sample(frame, data, labels, student="minkunet34c", seed=0, epoch=epoch, training=True)


def _alone(frames: list[Frame], data: DataConfig, seconds: float) -> float:
    """Median CPU seconds of a sample in this process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make(frames, data, 0)  # imports
        times: list[float] = []
        while len(times) < 3 or (sum(times) < seconds and len(times) < 30):
            start = time.process_time()
            make(frames, data, len(times))
            times.append(time.process_time() - start)
        return float(np.median(times))
    finally:
        torch.set_num_threads(threads)


def _processes(
    many: int, cores: list[int], frames: list[Frame], data: DataConfig, alone: float, seconds: float
) -> float:
    """Samples a second from so many processes, each on a core of its own."""
    context = multiprocessing.get_context("spawn")  # CUDA is in use in this one
    ready = context.Barrier(many + 1)
    each = max(2, round(seconds / alone))
    workers = [
        context.Process(target=_work, args=(core, frames, data, each, ready), daemon=True) for core in cores[:many]
    ]
    for worker in workers:
        worker.start()
    try:
        ready.wait(120)  # all have imported, and made one
        start = time.perf_counter()
        ready.wait(120 + 20 * seconds)  # all are done
        return many * each / (time.perf_counter() - start)
    finally:
        for worker in workers:
            worker.join(5)
            worker.terminate()


def _work(core: int, frames: list[Frame], data: DataConfig, each: int, ready: Any) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    try:
        make(frames, data, 0)
        ready.wait()
        for number in range(each):
            make(frames, data, number)
        ready.wait()
    except BaseException:
        ready.abort()  # or the others would wait for this one
        raise


def _threads(many: int, frames: list[Frame], data: DataConfig, alone: float, seconds: float) -> float:
    """Samples a second from so many threads of this process, whose batches of four it collates meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    total = 4 * max(1, round(many * seconds / alone / 8))  # threads share an interpreter: half of what cores could do
    try:
        with ThreadPoolExecutor(many) as pool:
            start = time.perf_counter()
            samples = pool.map(lambda number: make(frames, data, number), islice(count(), total))
            while batch := list(islice(samples, 4)):
                collate_pairs(batch)
            return total / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
