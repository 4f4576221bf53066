"""Stand-ins for torch.cuda on a CPU: code that is written for a GPU runs on the CPU, in the same order.

Nothing is shown about a GPU; a name, an argument or a shape that is wrong is found.
"""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from slidr.training.distill import DistillTask


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Graph:
    def replay(self) -> None:
        """A CPU's forward pass was computed when it was captured."""


class Stream:
    def wait_stream(self, other: Any) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch, memory: int = 80 * 2**30) -> None:
    """Replaces what the benchmark uses of torch.cuda, but for the device itself."""
    full = [False]

    def fraction(share: float) -> None:
        full[0] = share < 1

    real = DistillTask.loss

    def loss(self: DistillTask, outputs: Any, batch: Any) -> Any:
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
        return real(self, outputs, batch)

    monkeypatch.setattr(DistillTask, "loss", loss)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    stand_ins: dict[str, Any] = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "graph": lambda graph: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: 2**30,
        "memory_allocated": lambda: 2**20,
        "set_per_process_memory_fraction": fraction,
        "get_device_properties": lambda device: SimpleNamespace(total_memory=memory),
        "get_device_name": lambda: "a stand-in",
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
