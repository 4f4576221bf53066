"""Runs sections one after the other and sends their rows; a section that fails is a row, and the next one begins."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from gpu_parts.rows import NO_GPU, Channel, Row
from gpu_parts.sections import SECTIONS

BROKEN = 70  # exit status: the GPU answers no more in this process


class OutOfTime(BaseException):
    """The time that the benchmark may take is over. Not an `Exception`: no handler of a section may catch it."""


def prepare(small: bool) -> None:
    """Without a GPU, Triton's kernels run in its interpreter, from its import on; tiny sizes need one thread only."""
    import torch

    if small:
        torch.set_num_threads(1)

    if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def run(names: list[str], deadline: float, small: bool, root: Path | None, channel: Channel) -> int:
    """Runs the sections; returns the exit status."""
    prepare(small)
    from gpu_parts.bench import FULL, SMALL, Bench

    bench = Bench(SMALL if small else FULL, deadline, root, lambda entry: channel.send("cost", entry))
    channel.send("machine", describe(bench))
    for name in names:
        channel.send("begin", name)
        started = time.perf_counter()
        for row in rows_of(name, bench, small):
            channel.send("row", row)
            print(f"{time.strftime('%H:%M:%S')} {name}: {row.what} {row.note}", file=sys.stderr)
        channel.send("end", [name, time.perf_counter() - started])
        if not usable(bench):
            return BROKEN
    return 0


def rows_of(name: str, bench: Any, small: bool) -> Iterator[Row]:
    """The rows of one section; a last one says what ended it early."""
    section = SECTIONS[name]
    # Without a GPU the estimates say nothing: each section begins while there is time.
    wanted = section.seconds if bench.gpu and not small else 0.0
    if bench.left() < max(wanted, 1.0):
        note = f"{max(bench.left(), 0):.0f} s left, takes about {section.seconds:.0f} s; raise --minutes"
        yield Row(name, "not begun", note=note, state="skipped")
        return
    try:
        with alarm(bench.left()):
            yield from section.load()(bench)
    except OutOfTime:
        yield Row(name, "not finished", note="out of time; raise --minutes or choose it alone", state="skipped")
    except MemoryError as error:
        yield Row(name, "failed", note=f"out of memory on the host: {error}", state="failed")
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())
        yield Row(name, "failed", note=f"{type(error).__name__}: {text[:160]}", state="failed")
    finally:
        with contextlib.suppress(Exception):
            bench.free()


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the block after so many seconds."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def usable(bench: Any) -> bool:
    """Whether the GPU still answers: an illegal access makes every later call of its process fail."""
    if not bench.gpu:
        return True
    import torch

    try:
        return float(torch.ones(2, device=bench.device).sum()) == 2.0
    except RuntimeError:
        return False


def describe(bench: Any) -> dict[str, Any]:
    """What the numbers were measured on."""
    import numpy
    import torch

    triton = importlib.util.find_spec("triton")
    return {
        "gpu": torch.cuda.get_device_name() if bench.gpu else NO_GPU,
        "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if bench.gpu else None,
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton is not None else "not installed",
        "numpy": numpy.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.machine()
