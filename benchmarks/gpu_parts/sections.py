"""The benchmark's sections, in the order in which they run. Nothing heavy is imported before a section begins."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Section:
    """A generator of rows, `gpu_parts.MODULE.FUNCTION`, and about how long it takes on one GPU at full size."""

    group: Literal["correct", "time", "loader"]
    seconds: float
    module: str
    function: str

    def load(self) -> Callable[[Any], Iterable[Any]]:
        return getattr(importlib.import_module(f"gpu_parts.{self.module}"), self.function)


SECTIONS: dict[str, Section] = {
    "minkunet": Section("correct", 30, "students", "minkunet"),
    "voxelnet": Section("correct", 15, "students", "voxelnet"),
    "blocks": Section("correct", 10, "students", "blocks"),
    "triton": Section("correct", 25, "kernels", "triton_against_gathering"),
    "losses": Section("correct", 6, "objectives", "losses"),
    "teacher": Section("correct", 8, "objectives", "teacher"),
    "float16": Section("correct", 8, "steps", "float16"),
    "edges": Section("correct", 20, "limits", "edges"),
    "rates": Section("time", 5, "times", "rates"),
    "copy": Section("time", 3, "times", "host_to_device"),
    "maps": Section("time", 4, "times", "kernel_maps"),
    "student": Section("time", 20, "times", "student"),
    "encoder": Section("time", 20, "encoder", "teacher"),
    "loss": Section("time", 5, "times", "loss"),
    "optimizer": Section("time", 3, "times", "optimizer"),
    "step": Section("time", 25, "steps", "whole_step"),
    "batches": Section("time", 25, "steps", "batches"),
    "repeat": Section("correct", 20, "steps", "repeat"),
    "loader": Section("loader", 40, "loading", "loader"),
    "memory": Section("correct", 5, "limits", "out_of_memory"),
    "compile": Section("time", 70, "encoder", "compiled"),
    "others": Section("time", 40, "others", "spconv"),
}
GROUPS = ("correct", "time", "loader")


def chosen(parts: str) -> list[str]:
    """The sections that a comma-separated list of sections and groups names, in running order.

    Raises `ValueError` for a name that is neither.
    """
    names = [name.strip() for name in parts.split(",") if name.strip()]
    unknown = [name for name in names if name not in SECTIONS and name not in (*GROUPS, "all")]
    if unknown or not names:
        raise ValueError(
            f"--parts: got {', '.join(unknown) or 'nothing'}, expected some of all, {', '.join((*GROUPS, *SECTIONS))}"
        )
    return [name for name, section in SECTIONS.items() if {"all", name, section.group} & set(names)]
