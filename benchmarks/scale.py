"""Frame tables of nuScenes' size and of ten times that; the superpixel job's own cost; its use of a second core.

    python benchmarks/scale.py [--parts table overhead cores] [--images 200000]

Prints a table and writes results/scale.json. Nothing here needs a data set.

table     a made-up table (34,149 keyframes of 850 scenes, 204,894 images; 28,130 keyframes in `train`) and one ten
          times as long: opening, splitting, shuffling an epoch, and handing every one of 64 workers its micro-batches,
          in a fresh process each; then the list of all images, which the superpixel job starts from.
overhead  the superpixel job over images whose superpixels take no time: everything else is done, from listing over
          Ray's scheduling to a whole label map written under its final name, with fsync.
cores     the superpixel job with real SLIC on made-up images of nuScenes' size, confined to one core (driver, Ray's
          servers and the worker) and to two. Beside the clock, the CPU seconds of the maps alone: where two cores need
          more of those for the same maps, it is the machine that is slower with both at work, as a loop that touches
          no memory shows, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slidr.config import ClusterConfig, SuperpixelConfig
from slidr.data import images as files
from slidr.data import storage
from slidr.data.frames import FrameTable, write_frames
from slidr.data.image_list import ImageRef
from slidr.data.label_maps import map_path
from slidr.data.plan import TrainPlan
from slidr.types import CAMERA_CHANNELS, Camera, Frame

KEYFRAMES, SCENES, TRAIN_SCENES = 34_149, 850, 700
SHARDS = 64
PARTS = ("table", "overhead", "cores")


def made_up_frames(count: int, scenes: int) -> Iterator[Frame]:
    """Keyframes with nuScenes' columns; the first 700 of 850 scenes (28,130 of 34,149 keyframes) are `train`."""
    eye, intrinsics = np.eye(4), np.eye(3)
    train = round(count * 28_130 / KEYFRAMES)
    for i in range(count):
        in_train = i < train
        scene = i * TRAIN_SCENES * scenes // SCENES // train if in_train else TRAIN_SCENES * scenes // SCENES + i
        cameras = tuple(
            Camera(
                channel=channel,
                token=f"{i:026x}cam{number:03x}",
                image_path=f"samples/{channel}/{i:026x}.jpg",
                width=1600,
                height=900,
                timestamp=i,
                intrinsics=intrinsics,
                ego_from_camera=eye,
                global_from_ego=eye,
                camera_from_lidar=eye,
            )
            for number, channel in enumerate(CAMERA_CHANNELS)
        )
        yield Frame(
            token=f"{i:032x}",
            scene=f"scene-{scene:06d}",
            timestamp=i,
            lidar_token=f"{i:026x}lidar0",
            lidar_path=f"samples/LIDAR_TOP/{i:026x}.bin",
            label_path=None,
            ego_from_lidar=eye,
            global_from_ego=eye,
            cameras=cameras,
            previous=None,
            next=None,
            splits=("train", "parametrize" if i % 7 else "verify") if in_train else ("val",),
        )


def repeat(source: Path, target: Path, times: int) -> None:
    """A table of so many times the rows, with tokens and scenes of their own (the cameras repeat)."""
    table = FrameTable.open(source)
    frames = (
        replace(frame, token=f"{frame.token}-{turn}", scene=f"{frame.scene}-{turn}")
        for turn in range(times)
        for frame in table
    )
    write_frames(frames, str(target), table.dataset)


def peak_bytes() -> int:
    """This process's; Linux counts KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_of_tree() -> float:
    """CPU seconds so far of this process and all below it: Ray's servers and workers, too. Linux only."""
    stats = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            # parent; then user and system time, its own and that of its children that have ended
            stats.append((int(folder.name), int(fields[1]), sum(int(field) for field in fields[11:15])))
    inside = {os.getpid()}
    while more := {pid for pid, parent, _ in stats if parent in inside} - inside:
        inside |= more
    return sum(ticks for pid, _, ticks in stats if pid in inside) / os.sysconf("SC_CLK_TCK")


def hand_out(path: str) -> dict[str, Any]:
    """What a driver does with a table before the first step, timed."""
    times: dict[str, float] = {}
    start = time.process_time()

    def lap(name: str) -> None:
        nonlocal start
        times[name], start = time.process_time() - start, time.process_time()

    table = FrameTable.open(path)
    lap("open_s")
    train = table.select("train")
    lap("split_s")
    plans = [TrainPlan(len(train), 4 * SHARDS, seed=0, rank=rank, world_size=SHARDS) for rank in range(SHARDS)]
    seen = [[i for batch in plan.micro_batches(0, plan.steps_per_epoch) for i in batch.frames] for plan in plans]
    lap("shuffle_and_hand_out_s")
    handed = [i for shard in seen for i in shard]
    assert len(set(handed)) == len(handed) == plans[0].steps_per_epoch * 4 * SHARDS
    memory = peak_bytes()
    start = time.process_time()
    images = table.images()
    lap("list_images_s")
    return {
        "keyframes": len(table),
        "train": len(train),
        "images": len(images),
        **{name: round(value, 3) for name, value in times.items()},
        "peak_gb": round(memory / 1e9, 3),
        "peak_with_images_gb": round(peak_bytes() / 1e9, 3),
    }


def measure_tables(folder: Path) -> list[dict[str, Any]]:
    """Each table in a process of its own, so that peaks are its own."""
    rows = []
    for factor in (1, 10):
        path = folder / f"frames-{factor}.parquet"
        if factor == 1:
            write_frames(made_up_frames(KEYFRAMES, SCENES), str(path))
        else:
            repeat(folder / "frames-1.parquet", path, factor)
        done = subprocess.run(
            [sys.executable, __file__, "--hand-out", str(path)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]) | {"file_mb": round(path.stat().st_size / 1e6, 1)})
    return rows


def trivial_map(image: ImageRef, root: str, folder: str, config: SuperpixelConfig) -> None:
    """Stands in for `compute_map`: no image is read, no superpixel cut; a small label map is written all the same."""
    labels = np.zeros((9, 16), np.uint16)
    storage.write_bytes_atomic(map_path(folder, image.token), files.encode_label_map(labels))


def measure_overhead(folder: Path, count: int) -> dict[str, Any]:
    """The job with `trivial_map` over images said to be of nuScenes' size, so that they make as many tasks; and a
    second time, over images of the maps' true size, when all is done already.
    """
    from slidr.cluster import session
    from slidr.cluster.superpixels import compute_images

    images = [ImageRef(f"{i:032x}", f"samples/{i:032x}.jpg", 1600, 900) for i in range(count)]
    config = SuperpixelConfig(folder=str(folder / "trivial"))
    session.start(ClusterConfig())
    warm = SuperpixelConfig(folder=str(folder / "warm"))
    compute_images(images[:200], str(folder), warm, ClusterConfig(), progress=False, compute=trivial_map)
    driver, everything = time.process_time(), cpu_of_tree()
    report = compute_images(images, str(folder), config, ClusterConfig(), progress=False, compute=trivial_map)
    driver, everything = time.process_time() - driver, cpu_of_tree() - everything
    small = [replace(image, width=16, height=9) for image in images]
    again = compute_images(small, str(folder), config, ClusterConfig(), progress=False, compute=trivial_map)
    session.stop()
    assert (report.computed, again.computed) == (count, 0)
    return {
        "images": count,
        "scratch": str(folder.parent),
        "ms_an_image": round(report.seconds / count * 1e3, 4),
        "cpu_ms_an_image": round(everything / count * 1e3, 4),
        "driver_cpu_ms_an_image": round(driver / count * 1e3, 4),
        "rerun_ms_an_image": round(again.seconds / count * 1e3, 4),
    }


def loop_seconds(turns: int) -> float:
    """Arithmetic on a handful of small numbers: neither caches nor memory to share with another core."""
    start, total = time.monotonic(), 0
    for i in range(turns):
        total += i & 7
    return time.monotonic() - start


def loops_seconds(processes: int) -> float:
    """So many such loops at once, each in a process of its own: the slowest one's time."""
    cores = sorted(os.sched_getaffinity(0))[:processes]
    spawn, confine = multiprocessing.get_context("spawn"), partial(os.sched_setaffinity, 0, cores)
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=confine) as pool:
        list(pool.map(loop_seconds, [1000] * 4 * processes))  # imports
        return max(pool.map(loop_seconds, [60_000_000] * processes))


def timed_map(image: ImageRef, root: str, folder: str, config: SuperpixelConfig) -> None:
    """`compute_map`, and a line with the CPU seconds it took."""
    from slidr.cluster.superpixels import compute_map

    start = time.process_time()
    compute_map(image, root, folder, config)
    with Path(root, f"cpu-{os.getpid()}.txt").open("a") as file:
        file.write(f"{time.process_time() - start}\n")


def cut(folder: Path, count: int, cores: int) -> dict[str, float]:
    """The superpixel job over the made-up images of `folder`, by this process and all it starts, on so many cores."""
    from slidr.cluster import session
    from slidr.cluster.superpixels import compute_images

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    images = [ImageRef(f"{i:032x}", f"{i}.png", 1600, 900) for i in range(count)]
    session.start(ClusterConfig(), num_cpus=cores)

    def job(some: list[ImageRef], target: str) -> float:
        config = SuperpixelConfig(folder=str(folder / f"{target}-{os.getpid()}"))
        report = compute_images(some, str(folder), config, ClusterConfig(), progress=False, compute=timed_map)
        assert report.computed == len(some)
        for file in folder.glob("cpu-*.txt"):
            maps.extend(float(line) for line in file.read_text().splitlines())
            file.unlink()
        return report.seconds

    maps: list[float] = []
    job(images[: 4 * cores], "warm")
    maps.clear()
    everything = cpu_of_tree()
    seconds = job(images, "maps")
    everything = cpu_of_tree() - everything
    session.stop()
    return {"seconds": seconds, "maps": sum(maps), "rest": everything - sum(maps)}


def measure_cores(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """The same images on one core and on two.

    In turn, round after round, as a shared machine's speed changes by more than what is asked here: medians count.
    `efficiency_of_all` is that of the sums over all rounds; `efficiency_at_equal_maps` what it would be if a map took
    as many CPU seconds with both cores at work as with one.
    """
    rng = np.random.default_rng(0)
    for i in range(count):
        small = rng.integers(0, 256, (18, 32, 3), np.uint8)
        Image.fromarray(small).resize((1600, 900)).save(folder / f"{i}.png")
    load = os.getloadavg()[0]
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        for name, cores in (("one", 1), ("two", 2)):
            command = [sys.executable, __file__, "--cut", str(folder), str(count), str(cores)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                found.setdefault(f"{name}_{key}", []).append(round(value, 2))
            found.setdefault(f"{name}_loop", []).append(round(loops_seconds(cores), 2))
        print(f"round {turn + 1} of {rounds}:", {name: values[-1] for name, values in found.items()}, flush=True)
    median = {name: statistics.median(values) for name, values in found.items()}
    total = {name: sum(values) for name, values in found.items()}
    of_all = total["one_seconds"] / (2 * total["two_seconds"])
    return {
        "images": count,
        "rounds": rounds,
        **found,
        "efficiency": round(median["one_seconds"] / (2 * median["two_seconds"]), 3),
        "efficiency_of_all": round(of_all, 3),
        "efficiency_at_equal_maps": round(of_all * total["two_maps"] / total["one_maps"], 3),
        "efficiency_of_loops": round(total["one_loop"] / total["two_loop"], 3),
        "load_average_before": round(load, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=200_000, help="of the overhead part")
    parser.add_argument("--slic-images", type=int, default=120, help="of the cores part")
    parser.add_argument("--rounds", type=int, default=5, help="of the cores part")
    parser.add_argument("--scratch", help="folder for temporary files; /dev/shm leaves the disk's fsync out")
    parser.add_argument("--out", type=Path, default=Path("results/scale.json"))
    parser.add_argument("--hand-out", help=argparse.SUPPRESS)
    parser.add_argument("--cut", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hand_out is not None:
        print(json.dumps(hand_out(arguments.hand_out)))
        return
    if arguments.cut is not None:
        folder, count, cores = arguments.cut
        print(json.dumps(cut(Path(folder), int(count), int(cores))))
        return
    results = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        folder = Path(scratch)
        if "table" in arguments.parts:
            results["table"] = measure_tables(folder)
        if "overhead" in arguments.parts:
            results["overhead"] = measure_overhead(folder, arguments.images)
        if "cores" in arguments.parts:
            results["cores"] = measure_cores(folder, arguments.slic_images, arguments.rounds)
    for part in PARTS:
        found = results.get(part, [])
        for row in found if isinstance(found, list) else [found]:
            print(part, *(f"{name}={value}" for name, value in row.items()))
    results["on"] = f"{platform.machine()}, {os.cpu_count()} cores"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
