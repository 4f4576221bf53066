"""The machine and the sizes that every section works with, and how it takes times."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpu_parts import street
from gpu_parts.rows import NO_GPU, Cell
from slidr.config import (
    ClusterConfig,
    Config,
    DataConfig,
    OptimConfig,
    Precision,
    RunConfig,
    StudentConfig,
    StudentName,
    TeacherConfig,
    TeacherName,
)
from slidr.types import PairBatch

Mode = Literal["float32", "tf32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Size:
    """How large the clouds, images and networks are: as published, or small enough for a test."""

    beams: int = 32
    columns: int = 1084
    cameras: int = 6
    image: tuple[int, int] = (224, 416)
    clouds: int = 4
    student: StudentName = "minkunet34c"
    width: float = 1.0
    teacher: TeacherName = "dilation_resnet50"
    many_voxels: int = 500_000
    runs: int = 20  # timed repetitions on a GPU
    warm_up: int = 3  # steps that are not counted: kernels are compiled, algorithms chosen, memory is asked for
    steps: int = 10  # training steps that are counted, or run twice

    @property
    def pixels(self) -> int:
        return self.image[0] * self.image[1]


FULL = Size()
SMALL = Size(6, 60, 2, (32, 64), 1, "minkunet14", 0.25, "ppkt_resnet18", 1000, 1, 1, 1)


@dataclass(frozen=True)
class Ceilings:
    """Rates measured on this machine: 1e12 operations/s of matrix products by mode, GB/s of copies."""

    matrix: dict[str, float]
    copy: float  # device to device, bytes read and written
    pinned: float  # from page-locked host memory to the device
    pageable: float  # from ordinary host memory to the device

    def floor(self, flop: float, bytes_moved: float, mode: Mode) -> float:
        """Least ms for so many operations and so many bytes of device memory read and written."""
        rate = self.matrix.get(mode)
        arithmetic = flop / rate / 1e9 if rate else 0.0
        return max(arithmetic, bytes_moved / self.copy / 1e6)


class Bench:
    """What a section is given. `deadline` is in seconds since 1970."""

    def __init__(self, size: Size, deadline: float, root: Path | None, cost: Callable[[dict[str, Any]], Any]) -> None:
        self.size, self.deadline, self.root, self.cost = size, deadline, root, cost
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")

    def left(self) -> float:
        return self.deadline - time.time()

    @property
    def modes(self) -> list[Mode]:
        """Arithmetic that training is timed in: all on a GPU, float32 on a CPU."""
        return ["float32", "tf32", "bfloat16"] if self.gpu else ["float32"]

    def cells(self, value: Cell) -> dict[str, Cell]:
        """A value measured on this machine's device, in its column; the GPU's says where there is none."""
        return {"gpu": value} if self.gpu else {"cpu": value, "gpu": NO_GPU}

    def sweeps(self, clouds: int) -> list[np.ndarray]:
        """So many different sweeps: of streets, or turned copies of the real one of `--root`."""
        if self.root is not None:
            return [_real(self.root)] * clouds  # every sample turns its own
        streets = [_street(seed, self.size.beams, self.size.columns) for seed in range(min(clouds, 4))]
        return [streets[number % 4] for number in range(clouds)]

    def batch(self, clouds: int | None = None, student: str | None = None) -> PairBatch:
        """A batch on the CPU, of the size's clouds for the size's student unless others are asked for."""
        size = self.size
        clouds, student = clouds or size.clouds, student or size.student
        key = (clouds, student)
        if key not in self._batches:
            self._batches[key] = street.batch(self.sweeps(clouds), student, size.cameras, size.image)
        return self._batches[key]

    @cached_property
    def _batches(self) -> dict[tuple[int, str], PairBatch]:
        return {}

    def config(self, mode: Mode = "float32", batch: int | None = None, steps: int = 10) -> Config:
        """The published row at this size, with random weights: their speed is the same."""
        precision: Precision = "float32" if mode in ("float32", "tf32") else mode  # type: ignore[assignment]
        size = self.size
        return Config(
            data=DataConfig(image_size=size.image),
            student=StudentConfig(name=size.student, width=size.width),
            teacher=TeacherConfig(name=size.teacher, weights=None),
            optim=OptimConfig(precision=precision, batch_size=batch or size.clouds, max_steps=steps),
            run=RunConfig(log_every=1),
            cluster=ClusterConfig(use_gpu=self.gpu),
        )

    @contextlib.contextmanager
    def arithmetic(self, mode: Mode) -> Iterator[None]:
        """Float32 products whole or in TF32; the other modes run under autocast."""
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = mode == "tf32"
        half = mode in ("bfloat16", "float16")
        try:
            with torch.autocast(self.device.type, getattr(torch, mode) if half else torch.bfloat16, half):
                yield
        finally:
            torch.set_float32_matmul_precision(before[0])
            torch.backends.cudnn.allow_tf32 = before[1]

    def milliseconds(self, call: Callable[[], Any], runs: int | None = None, most_s: float = 3.0) -> float:
        """Median time of a call after warm-up: between CUDA events, or by the clock on a CPU."""
        call()  # compiles, allocates, chooses algorithms
        if not self.gpu:
            times = []
            start = time.perf_counter()
            while len(times) < min(runs or 3, self.size.runs) and (not times or time.perf_counter() - start < most_s):
                before = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - before))
            return statistics.median(times)
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        count = max(min(3, self.size.runs), min(runs or self.size.runs, int(most_s / max(once, 1e-6))))
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in events)

    def peak_bytes(self, call: Callable[[], Any]) -> float | None:
        """Most bytes of GPU memory allocated at once during a call; None on a CPU."""
        if not self.gpu:
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated())

    def free(self) -> None:
        """Gives back what the last section left in memory."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()

    @cached_property
    def ceilings(self) -> Ceilings:
        """Measured once, on random data."""
        tiny = self.size.student != FULL.student
        side, many = (256, 2**20) if tiny else (8192, 2**29) if self.gpu else (2048, 2**26)
        modes: tuple[Mode, ...] = ("float32", "tf32", "bfloat16") if self.gpu else ("float32",)
        matrix = {mode: self._matrix_rate(mode, side) for mode in modes}
        source = torch.randn(many, device=self.device)  # on a GPU 2 GiB, well beyond every cache
        target = torch.empty_like(source)
        copy = 8 * many / self.milliseconds(lambda: target.copy_(source)) / 1e6
        if not self.gpu:
            return Ceilings(matrix, copy, float("nan"), float("nan"))
        host = torch.randn(many // 8)
        part = target[: len(host)]
        pageable = 4 * len(host) / self.milliseconds(lambda: part.copy_(host)) / 1e6
        locked = host.pin_memory()
        pinned = 4 * len(host) / self.milliseconds(lambda: part.copy_(locked, non_blocking=True)) / 1e6
        return Ceilings(matrix, copy, pinned, pageable)

    def _matrix_rate(self, mode: Mode, side: int) -> float:
        dtype = torch.bfloat16 if mode == "bfloat16" else torch.float32
        a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
        with self.arithmetic("tf32" if mode == "tf32" else "float32"):
            return 2 * side**3 / self.milliseconds(lambda: torch.mm(a, b)) / 1e9


def relative(got: Tensor, reference: Tensor) -> float:
    """‖got - reference‖ / ‖reference‖ in float64; NaN where shapes differ, 0 where both are empty or zero."""
    if got.shape != reference.shape:
        return float("nan")
    got, reference = got.detach().double().cpu(), reference.detach().double().cpu()
    difference, length = (got - reference).norm(), reference.norm()
    return float(difference / length) if length > 0 else float(difference)


@lru_cache
def _street(seed: int, beams: int, columns: int) -> np.ndarray:
    return street.sweep(seed, beams, columns)


@lru_cache
def _real(root: Path) -> np.ndarray:
    return street.read_sweep(root)
