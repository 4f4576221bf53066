"""The compiled kernels' threads are those that torch has already, whichever OpenMP library it runs on."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import subprocess
import sys
import threading

import pytest
import torch

from slidr.sparse import cpu_threads

# In a process of its own, where no earlier test has started threads: those after a parallel operation of torch are its
# team; its kernels must be entered by two of them and start no others.
PROBE = """
import ctypes, os, sys, threading
import torch
from slidr.sparse import Convolution, SparseTensor, cpu_kernels, cpu_threads
assert "llvmlite" not in sys.modules, "compiled at import"

torch.set_num_threads(2)
torch.randn(2_000_000).exp()
threads = lambda: {int(name) for name in os.listdir("/proc/self/task")}
team, entered, calls, both = threads(), [], [], threading.Barrier(2)
run = cpu_kernels.in_parallel

def spied(function, argument, arrays):
    kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def entry(argument):
        entered.append(threading.get_native_id())
        both.wait(60)
        kernel(argument)

    calls.append(entry)
    run(ctypes.cast(entry, ctypes.c_void_p).value, argument, arrays)

cpu_kernels.in_parallel = spied
places = torch.stack(torch.meshgrid(torch.arange(2), *[torch.arange(9)] * 3, indexing="ij"), -1).reshape(-1, 4).int()
x = torch.randn(len(places), 16)
layer = Convolution(16, 24)
layer(SparseTensor(x, places)).features.sum().backward()
assert len(calls) >= 2, "the kernels did not run"
assert len(set(entered)) == 2, entered
assert set(entered) <= team, "not torch's team"
assert threads() == team, "new threads"
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and LD_PRELOAD is Linux's")


def probe(**environment: str) -> None:
    given = {name: value for name, value in os.environ.items() if name not in ("SLIDR_SPARSE", "LD_PRELOAD")}
    done = subprocess.run([sys.executable, "-c", PROBE], env=given | environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@linux
def test_kernels_run_on_two_threads_of_torchs_own_team() -> None:
    probe()


@linux
@pytest.mark.parametrize("name", ["gomp", "omp", "iomp5"])  # GNU's as the system has it, LLVM's, Intel's
def test_kernels_run_on_torchs_team_where_another_openmp_library_is_preloaded(name: str) -> None:
    library = ctypes.util.find_library(name)
    if library is None:
        pytest.skip(f"lib{name} is not installed on this system")
    probe(LD_PRELOAD=library)


def test_a_library_is_looked_for_only_where_torch_has_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (cpu_threads.openmp_team.__wrapped__() is not None) == torch.backends.openmp.is_available()
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert cpu_threads.openmp_team.__wrapped__() is None


def test_without_a_library_every_thread_is_one_of_pythons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_threads, "_scopes", lambda: iter(()))
    monkeypatch.setattr(cpu_threads, "openmp_team", cpu_threads.openmp_team.__wrapped__)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    entered: list[int] = []
    all_three = threading.Barrier(3)

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def entry(argument: int) -> None:
        entered.append(argument)
        all_three.wait(60)

    address = ctypes.cast(entry, ctypes.c_void_p).value
    assert address is not None
    cpu_threads.in_parallel(address, 7, None)
    assert entered == [7, 7, 7]
