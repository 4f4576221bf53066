"""Whether a tensor can be a weight or a statistic: dense, of a floating-point type, finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_COUNTER = "num_batches_tracked"  # of a batch norm: the one integer in a network
_VARIANCE = "running_var"


def first_problem(state: Mapping[str, Tensor], own: Mapping[str, Tensor] | None = None) -> str | None:
    """The first tensor of `state` that cannot be used, why, and how many others cannot; None where all can.

    `own` is the module's state dict: values are checked after conversion to its types.
    """
    found = [(name, problem_of(name, value, (own or {}).get(name))) for name, value in state.items()]
    problems = [(name, problem) for name, problem in found if problem is not None]
    if not problems:
        return None
    name, problem = problems[0]
    others = f" (and {len(problems) - 1} more tensors cannot be used)" if len(problems) > 1 else ""
    return f"{name}: {problem}{others}"


def problem_of(name: str, value: Tensor, own: Tensor | None = None) -> str | None:
    """Why `value` cannot be the parameter or statistic called `name`, or None where it can."""
    if value.layout != torch.strided or value.device.type == "meta":
        return f"is a {value.layout} tensor on {value.device.type}, expected a dense one"
    counts = name.endswith(_COUNTER) if own is None else not own.is_floating_point()
    if value.dtype not in (*_FLOATS, *(_INTEGERS if counts else ())):
        return f"holds {value.dtype}, expected {'integers' if counts else 'floating-point numbers'}"
    used = value.detach() if own is None or counts else value.detach().to(own.dtype)
    bad = int((~torch.isfinite(used)).sum())
    if bad:
        return f"{bad} of {used.numel()} values are NaN or infinite"
    if counts and bool(((used < 0) | (used != used.floor() if used.is_floating_point() else used < 0)).any()):
        return "is a count, got a negative number or a fraction"
    if name.endswith(_VARIANCE) and bool((used < 0).any()):
        return f"{int((used < 0).sum())} of {used.numel()} variances are negative"
    return None
