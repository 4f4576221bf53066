"""A small real run whose checkpoints tests damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slidr.config import OptimConfig
from slidr.training.checkpoint import CheckpointFolder
from slidr.training.optim import build_optimizer
from slidr.training.schema import Expected

STEP = 6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def optimizer_of(student: nn.Module, name: str) -> torch.optim.Optimizer:
    config = OptimConfig(name=name, lr=0.01)  # type: ignore[arg-type]
    return build_optimizer([{"params": list(student.parameters())}], config)


def trained(optimizer_name: str = "adamw", steps: int = STEP) -> dict[str, Any]:
    """What a run keeps after some steps."""
    student = network()
    optimizer = optimizer_of(student, optimizer_name)
    for _ in range(steps):
        optimizer.zero_grad()
        student(torch.randn(16, 3)).square().mean().backward()
        optimizer.step()
    return {
        "kind": "toy",
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": {},
        "step": steps,
        "epoch": 2,
        "config": {"run": {"name": "toy"}},
        "metrics": {"val_loss": 0.25, "loss": 0.5},
        "best": 0.25,
    }


def expected(optimizer_name: str = "adamw", scaler: dict[str, Any] | None = None) -> Expected:
    """The run that such a checkpoint fits."""
    student = network()
    optimizer = optimizer_of(student, optimizer_name)
    return Expected("toy", {"student": student.state_dict()}, optimizer, scaler or {}, last_step=10)


def equal(one: Any, other: Any) -> bool:
    """Whether nested containers hold the same types, names and values, tensors bit for bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(equal, one, other))
    return type(one) is type(other) and one == other


def two_checkpoints(folder: Path, spoil: Callable[[dict[str, Any]], None]) -> CheckpointFolder:
    """A folder with an intact checkpoint of step 5 and one of step 6 whose entries `spoil` has changed."""
    checkpoints = CheckpointFolder(str(folder))
    checkpoints.save(trained(steps=STEP - 1))
    state = trained()
    spoil(state)
    if "step" in state and state["step"] == STEP:
        checkpoints.save(state)
    else:
        torch.save({"format": 1, **state}, folder / f"step-{STEP:08d}.pt")
    return checkpoints
