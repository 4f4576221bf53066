"""Which algorithm computes a sparse convolution.

Every device can gather. On the CPU its own kernels run wherever they can (`cpu_kernels.suits`): a rule, not a
measurement, so that runs repeat. Triton's kernels run on CUDA from compute capability 8 on, where triton is installed;
there the first call of every (direction, dtype, kernel, channels, size class) times both and keeps the faster one for
the life of the process. SLIDR_SPARSE=gather, =cpu or =triton forces one: on CUDA a forced choice makes runs repeat.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from slidr.sparse import cpu_kernels
from slidr.sparse.kernel_map import KernelMap
from slidr.urls import redacting_logger

Algorithm = Literal["gather", "cpu", "triton"]
Direction = Literal["forward", "input gradient", "weight gradient"]
SWITCH = "SLIDR_SPARSE"
_RUNS = 5

_log = redacting_logger(__name__)
_fastest: dict[tuple, Algorithm] = {}


def choose(
    direction: Direction,
    x: Tensor,
    weight: Tensor,
    kernel_map: KernelMap,
    candidates: dict[Algorithm, Callable[[], object]],
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> Algorithm:
    """The algorithm to use; `candidates` run the computation at hand, `measure` (default: CUDA events) times them.

    Raises `ValueError` where the environment forces an algorithm that does not exist or cannot run here.
    """
    if measure is None and by_cpu_kernels(x, weight):
        return "cpu"
    forced = _forced(x)
    if forced is not None:
        return forced if forced != "cpu" else "gather"  # what the CPU's kernels cannot run, gathering can
    if measure is None:
        if not runs_triton(x, weight, kernel_map):
            return "gather"
        measure = functools.partial(_milliseconds, device=x.device)
    key = _class_of(direction, x, weight, kernel_map)
    if key not in _fastest:
        times: dict[Algorithm, float] = {"gather": math.inf}
        with contextlib.suppress(torch.OutOfMemoryError):  # gathering keeps all products; Triton's kernels keep none
            times["gather"] = measure(candidates["gather"])
        try:
            times["triton"] = measure(candidates["triton"])
        except torch.OutOfMemoryError:
            return "gather"  # for now: what another part of the process holds is no property of the convolution
        except Exception as error:  # no C compiler for its launcher, a driver too old, too few registers
            _tell_once(f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}")
        _fastest[key] = min(times, key=times.__getitem__)
        _log.debug("%s: %s", key, times)
    return _fastest[key]


def chosen() -> dict[tuple, Algorithm]:
    """What was chosen by measurement in this process so far: the algorithm of every class of convolutions."""
    return dict(_fastest)


def by_cpu_kernels(x: Tensor, weight: Tensor) -> bool:
    """Whether the CPU's kernels compute this convolution: wherever they can, unless another algorithm is forced."""
    return _forced(x) in (None, "cpu") and cpu_kernels.suits(x, weight)


def runs_triton(x: Tensor, weight: Tensor, kernel_map: KernelMap) -> bool:
    """Whether the Triton kernels suit this convolution: a recent GPU, no float64, 32-bit indices within range."""
    most = max(kernel_map.num_inputs, kernel_map.num_outputs) * max(weight.shape[1:])
    return (
        x.is_cuda
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and most < 2**31
        and _has_triton()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def _forced(x: Tensor) -> Algorithm | None:
    value = os.environ.get(SWITCH)
    if not value:
        return None
    if value not in get_args(Algorithm):
        raise ValueError(f"{SWITCH}: got {value!r}, expected one of {list(get_args(Algorithm))}, or leave it unset")
    if value == "cpu":
        obstacle = cpu_kernels.obstacle()
        if obstacle is not None:
            raise ValueError(f"{SWITCH}=cpu: {obstacle.what}; {obstacle.next}, or leave {SWITCH} unset to gather")
    if value == "triton" and not _has_triton():
        raise ValueError(f"{SWITCH}=triton: triton is not installed; install it or leave {SWITCH} unset")
    if value == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"{SWITCH}=triton: got tensors on {x.device}; Triton compiles for GPUs, leave {SWITCH} unset elsewhere"
        )
    return value  # type: ignore[return-value]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _tell_once(reason: str) -> None:
    _log.warning("sparse convolutions gather where Triton's kernels do not run (%s); they may be slower for it", reason)


def _class_of(direction: Direction, x: Tensor, weight: Tensor, kernel_map: KernelMap) -> tuple:
    """What a measurement holds for: sizes count in powers of two."""
    sizes = (kernel_map.num_pairs.bit_length(), kernel_map.num_outputs.bit_length())
    products = torch.backends.cuda.matmul.fp32_precision if x.dtype == torch.float32 else ""  # whole, or TF32
    return (direction, x.device, x.dtype, products, *weight.shape, *sizes)


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The best of a few runs on the current stream of `device`, after one that compiles."""
    with torch.cuda.device(device):
        run()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times = []
        for _ in range(_RUNS):
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return min(times)
