"""What a checkpoint must hold, and whether it fits the run that resumes from it.

Both functions answer with the first problem, or None; `slidr.training.checkpoint` makes errors of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slidr.models.archive import tensors_in
from slidr.models.numbers import first_problem, problem_of

_TYPES: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "student": dict,
    "optimizer": dict,
    "scaler": dict,
    "step": int,
    "epoch": int,
    "config": dict,
    "metrics": dict,
    "best": (int, float, type(None)),
}
# What an optimizer keeps of a parameter.
_MOMENTS = {"SGD": {"momentum_buffer"}, "AdamW": {"step", "exp_avg", "exp_avg_sq"}}


@dataclass(frozen=True)
class Expected:
    """The run that a checkpoint must fit."""

    kind: str
    parts: Mapping[str, Mapping[str, Tensor]]  # the state dicts of its networks, by their entry's name
    optimizer: torch.optim.Optimizer
    scaler: Mapping[str, Any]  # the gradient scaler's state; empty where it is not in use
    last_step: int

    def misfit(self, state: Mapping[str, Any]) -> str | None:
        """Why the run cannot go on from `state`, which has no `schema_problem`, or None where it can."""
        if state["kind"] != self.kind:
            return f"kind: is {state['kind']!r}, the run is {self.kind!r}"
        if state["step"] > self.last_step:
            return f"step: is {state['step']}, the run ends at step {self.last_step}"
        problem = weights_misfit(state, self.parts)
        if problem is None:
            problem = _optimizer_misfit(state["optimizer"], self.optimizer, state["step"])
        return problem or _scaler_misfit(state["scaler"], self.scaler)


def schema_problem(state: Any) -> str | None:
    """What is wrong with the entries of a checkpoint, whatever run it is from."""
    for key, types in _TYPES.items():
        if key not in state:
            return f"lacks the entry {key!r}"
        if not isinstance(state[key], types) or isinstance(state[key], bool):
            return f"{key}: is {type(state[key]).__name__}, which a checkpoint does not hold there"
    step, epoch, best = state["step"], state["epoch"], state["best"]
    if not 0 <= epoch <= step < 10**8:
        return f"step {step} and epoch {epoch}: expected 0 <= epoch <= step"
    if best is not None and not _is_finite(best):
        return f"best: is {best}, expected a finite number"
    for name, value in state["metrics"].items():
        if not isinstance(name, str) or not _is_finite(value):
            return f"metrics: {name} is {value!r}, expected a finite number"
    for part in ("student", "head"):
        if part in state and not _is_state_dict(state[part]):
            return f"{part}: is not a dict of names and tensors"
        problem = first_problem(state.get(part, {}))
        if problem is not None:
            return f"{part}: {problem}"
    for value in tensors_in(state["optimizer"]):
        problem = problem_of("", value)
        if problem is not None:
            return f"optimizer: a tensor of shape {tuple(value.shape)}: {problem}"
    return None


def weights_misfit(state: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """Why a checkpoint's weights cannot become those of a run's networks, or None where they can."""
    for part, own in parts.items():
        found = state.get(part)
        if found is None or not _is_state_dict(found):
            return f"{part}: is not a dict of names and tensors"
        strangers = sorted(found.keys() ^ own.keys())
        if strangers:
            return f"{part}: {strangers[0]} is in one of the checkpoint and the network only"
        for name, value in found.items():
            got, want = (tuple(value.shape), value.dtype), (tuple(own[name].shape), own[name].dtype)
            if got != want:
                return f"{part}: {name} is {got[1]} of shape {got[0]}, the network's is {want[1]} of shape {want[0]}"
        problem = first_problem(found, own)
        if problem is not None:
            return f"{part}: {problem}"
    return None


def _optimizer_misfit(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, step: int) -> str | None:
    own, groups, entries = optimizer.state_dict()["param_groups"], saved.get("param_groups"), saved.get("state")
    if not isinstance(groups, list) or not isinstance(entries, dict):
        return "optimizer: lacks param_groups or state"
    if len(groups) != len(own):
        return f"optimizer: holds {len(groups)} groups of parameters, the run has {len(own)}"
    for number, (group, mine) in enumerate(zip(groups, own, strict=True)):
        if not isinstance(group, dict) or group.get("params") != mine["params"]:
            return f"optimizer: group {number} holds other parameters than the run's"
        for key, value in mine.items():
            if key in ("lr", "peak_lr") and key not in group:
                return f"optimizer: group {number} lacks {key}"
            if not _is_alike(group.get(key, value), value):
                return f"optimizer: group {number}: {key} is {group[key]!r}, the run's is {value!r}"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, moments in entries.items():
        problem = _moments_problem(index, moments, parameters, type(optimizer).__name__, step)
        if problem is not None:
            return f"optimizer: state of parameter {index}: {problem}"
    return None


def _moments_problem(index: Any, moments: Any, parameters: list[Tensor], optimizer: str, step: int) -> str | None:
    if type(index) is not int or not 0 <= index < len(parameters):
        return f"the run has {len(parameters)} parameters"
    wanted = _MOMENTS[optimizer]
    if not isinstance(moments, dict) or moments.keys() != wanted:
        return f"expected the entries {', '.join(sorted(wanted))}"
    for name, value in moments.items():
        if name == "momentum_buffer" and value is None:
            continue
        shape = () if name == "step" else tuple(parameters[index].shape)
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            return f"{name}: expected a tensor of shape {shape}"
        problem = problem_of(name, value)
        if problem is not None:
            return f"{name}: {problem}"
        if name == "step" and not 0 <= float(value) <= step:
            return f"step: is {float(value)}, the checkpoint's is {step}"
        if name == "exp_avg_sq" and bool((value < 0).any()):
            return "exp_avg_sq: holds negative squares"
    return None


def _scaler_misfit(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    for key in own:
        if key not in saved or not _is_finite(saved[key]) or saved[key] < 0:
            return f"scaler: {key} is {saved.get(key)!r}, expected a finite number"
    return None


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items()
    )


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_alike(value: Any, own: Any) -> bool:
    """Whether an optimizer's setting has the type of the run's, and numbers in it are finite."""
    if isinstance(own, tuple | list):
        return (
            isinstance(value, tuple | list)
            and len(value) == len(own)
            and all(_is_alike(one, other) for one, other in zip(value, own, strict=True))
        )
    if isinstance(own, bool) or own is None:
        return type(value) is type(own)
    return _is_finite(value) and not isinstance(value, bool) if isinstance(own, int | float) else value == own
