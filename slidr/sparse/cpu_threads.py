"""Calling compiled code on the threads of torch's own OpenMP team.

Members of that team spin for a while after every operation of torch, so threads of our own would share their cores.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def in_parallel(function: int, argument: int, arrays: object) -> None:
    """Calls ``void function(void *argument)``, an address, on as many threads as torch uses; returns when all have.

    `arrays` are what it reads and writes: a thread that an interrupt leaves behind keeps them alive.
    """
    threads = torch.get_num_threads()
    team = openmp_team()
    if threads == 1:
        _callable(function)(argument)
    elif team is not None:
        team(function, argument, threads, 0)
    else:
        call = _callable(function)
        others = [threading.Thread(target=lambda kept: call(argument), args=(arrays,)) for _ in range(threads - 1)]
        for other in others:
            other.start()
        call(argument)
        for other in others:
            other.join()


@functools.cache
def _callable(function: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


@functools.cache
def openmp_team() -> Any | None:
    """``GOMP_parallel(function, argument, threads, flags)`` of the OpenMP library that torch itself calls, if any.

    GNU's, LLVM's and Intel's libraries all have it.
    """
    if not torch.backends.openmp.is_available():
        return None
    for scope in _scopes():
        call = getattr(scope, "GOMP_parallel", None)
        if call is not None:
            call.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            call.restype = None
            return call
    return None


def _scopes() -> Iterator[ctypes.CDLL]:
    """Where the loader found torch's own calls, in its order. Loads nothing: another library would be another team."""
    if sys.platform == "linux":
        yield ctypes.CDLL(None)  # there what is loaded for all comes first, LD_PRELOAD's libraries before torch's
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / name
        if path.exists():
            yield ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)  # with all that it depends on
