"""Names and readings of the runs that the tests here make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slidr.config import Config
from slidr.tracking import read_journal
from slidr.training.checkpoint import CheckpointFolder


def named(config: Config, name: str, workers: int = 0, **run: Any) -> Config:
    """The config of another run, on that many Ray workers; 0: in this process."""
    return replace(
        config,
        run=replace(config.run, name=name, **run),
        cluster=replace(config.cluster, num_workers=workers),
    )


def losses(config: Config) -> list[float]:
    """The loss of every step."""
    journal = read_journal(Path(config.run.folder, config.run.name, "metrics.jsonl"))
    return [metrics["loss"] for _, metrics in sorted(journal.items()) if "loss" in metrics]


def weights(config: Config) -> dict[str, torch.Tensor]:
    """The student and the teacher's head at the end."""
    state = CheckpointFolder(str(Path(config.run.folder, config.run.name, "checkpoints"))).newest()
    assert state is not None
    return {**state["student"], **{f"head.{name}": value for name, value in state["head"].items()}}
