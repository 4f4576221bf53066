"""Measures the unit costs of a config on this machine, in this process, on its own data."""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slidr.config import Config
from slidr.data import images as files
from slidr.data import storage
from slidr.data.frames import FrameTable
from slidr.data.label_maps import map_path
from slidr.data.loading import PairSource, ScanSource, subset_frames
from slidr.data.samples import read_camera
from slidr.ops.superpixels import slic
from slidr.planning.costs import CostName, UnitCost
from slidr.planning.estimate import TrainingName, train_setting
from slidr.training.distill import DistillTask
from slidr.training.loop import Task
from slidr.training.optim import build_optimizer
from slidr.training.segment import SegmentTask
from slidr.types import Frame

_FRAMES = 3  # keyframes that are measured; the median counts
_STEPS = 3  # the first warms up


def measure(
    config: Config, job: TrainingName, command: str, report: Callable[[str], Any] = lambda text: None
) -> list[UnitCost]:
    """The unit costs of the superpixel job and of `job` ("pretrain" or "finetune"), measured here and now.

    CPU figures are CPU time, so that other work on the machine counts little; those of a training step are CPU time
    divided by `cluster.cpus_per_worker`, its threads. Networks have random weights: their speed is the same. `report`
    hears what is measured next. Training on a GPU is left out where there is none.
    """
    machine = describe_machine(config)
    date = time.strftime("%Y-%m-%d", time.gmtime())

    def cost(name: CostName, value: float, **setting: Any) -> UnitCost:
        return UnitCost(name, float(f"{value:.4g}"), setting, machine, date, command)

    frames = _spread(subset_frames(config, "train"), _FRAMES)
    with tempfile.TemporaryDirectory() as folder:
        entries: list[UnitCost] = []
        setting: dict[str, Any] = {"dataset": config.data.dataset}
        if job == "pretrain":
            report("superpixels")
            seconds, sizes, pixels = _superpixels(frames, config, folder)
            setting = {"pixels": pixels, "cameras": len(config.data.cameras)}
            entries += [
                cost("slic", seconds, pixels=pixels, segments=config.superpixels.segments),
                cost("label_map", sizes, pixels=pixels, segments=config.superpixels.segments),
            ]
        report("loading")
        source: Any = PairSource(config, folder) if job == "pretrain" else ScanSource(config)
        samples, seconds = _samples(source, config, len(frames))
        entries.append(cost("sample", seconds, job=job, **setting))
    if config.cluster.use_gpu and not torch.cuda.is_available():
        return entries
    report("training steps")
    train, validate, memory = _steps(config, job, source.collate([samples[0]]))
    setting = train_setting(job, config) | {"threads": config.cluster.cpus_per_worker}
    return [
        *entries,
        cost("train_frame", train, **setting),
        cost("validate_frame", validate, **setting),
        cost("worker_memory", memory, **setting),
    ]


def describe_machine(config: Config) -> str:
    """The processor, or the GPU where the config uses one."""
    if config.cluster.use_gpu and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, torch {torch.__version__}"


def _spread(table: FrameTable, count: int) -> list[Frame]:
    """The frames that `_samples` takes, too: the first of the training subset."""
    return [table[index] for index in range(min(count, len(table)))]


def _superpixels(frames: list[Frame], config: Config, folder: str) -> tuple[float, float, int]:
    """Median CPU s and bytes of an image's map, and an image's pixels; writes the maps that samples need."""
    seconds, sizes, pixels = [], [], []
    wanted = config.superpixels
    for camera in (c for frame in frames for c in frame.cameras if c.channel in config.data.cameras):
        image = read_camera(camera, config.data)
        start = time.process_time()
        labels = slic(image, wanted.segments, wanted.compactness, wanted.sigma, wanted.engine)
        seconds.append(time.process_time() - start)
        encoded = files.encode_label_map(labels)
        storage.write_bytes_atomic(map_path(folder, camera.token), encoded)
        sizes.append(len(encoded))
        pixels.append(camera.width * camera.height)
    return statistics.median(seconds), statistics.median(sizes), int(statistics.median(pixels))


def _samples(source: Any, config: Config, count: int) -> tuple[list[Any], float]:
    """The first training samples and the median CPU s of one."""
    samples, seconds = [], []
    source.sample("train", 0, 0)  # reads files and imports for the first time
    for index in range(count):
        start = time.process_time()
        samples.append(source.sample("train", index, 0))
        seconds.append(time.process_time() - start)
    return samples, statistics.median(seconds)


def _steps(config: Config, job: TrainingName, batch: Any) -> tuple[float, float, float]:
    """Seconds of a training step and of a forward pass over one keyframe, and the process's peak memory in bytes."""
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(config.cluster.cpus_per_worker)
    try:
        task = _task(config, job)
        task.model.to(device)
        batch = batch.to(device)
        optimizer = build_optimizer(task.parameter_groups(), config.optim)
        dtype = getattr(torch, config.optim.precision)
        clock = _clock(device, config.cluster.cpus_per_worker)

        def step() -> None:
            task.model.train()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype, dtype != torch.float32):
                outputs = task.model(batch)
            task.loss(outputs, batch)[0].backward()
            optimizer.step()

        def validation() -> None:
            task.validate([batch])

        return _median(step, clock), _median(validation, clock), _peak_memory()
    finally:
        torch.set_num_threads(threads)


def _task(config: Config, job: TrainingName) -> Task:
    bare = replace(
        config,
        student=replace(config.student, weights=None),
        teacher=replace(config.teacher, weights=None, sha256=None),
    )
    return DistillTask(bare) if job == "pretrain" else SegmentTask(bare)


def _clock(device: torch.device, threads: int) -> Callable[[], float]:
    if device.type == "cpu":
        return lambda: time.process_time() / threads

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def _median(call: Callable[[], None], clock: Callable[[], float]) -> float:
    times = []
    for _ in range(_STEPS):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times[1:])


def _peak_memory() -> float:
    """Bytes; Linux counts KiB here, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
