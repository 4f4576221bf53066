"""Runs cases in a process that may be killed: where one hangs, fills the memory or dies, the next process goes on."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .harness import Case, Input, Outcome, Runner, build, damage, folder_of, inside, short

DEADLINE_S = 20.0  # a reader takes milliseconds; a loaded machine may take longer
MEMORY_BYTES = 2 * 10**9
_STARTING_S = 300.0  # until a process has made the undamaged files and read them


def run_cases(
    cases: Sequence[Case],
    module: str,
    store: Path,
    deadline_s: float = DEADLINE_S,
    memory_bytes: int = MEMORY_BYTES,
) -> dict[Case, Outcome]:
    """Runs cases in processes of their own, which are killed where one hangs or fills the memory.

    `module` has the table `INPUTS`. The first process also makes the undamaged files, where `store` is empty.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", module])
    outcomes: dict[Case, Outcome] = {}
    todo = list(cases)
    while todo:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, module, store, todo, memory_bytes), daemon=True)
        process.start()
        theirs.close()
        try:
            ended = _collect(process, ours, len(todo), deadline_s)
        finally:
            process.kill()
            process.join()
            ours.close()
        outcomes |= ended
        todo = [case for case in todo if case not in outcomes]
    return outcomes


def _collect(process: Any, pipe: Any, count: int, deadline_s: float) -> dict[Case, Outcome]:
    """What one process says of its cases, until it has done all or must be killed."""
    outcomes: dict[Case, Outcome] = {}
    current, started = None, time.monotonic()
    while len(outcomes) < count:
        waited = time.monotonic() - started
        if pipe.poll(0.02):
            try:
                current, outcome = pipe.recv()
            except EOFError:
                process.join(5)
                outcome = Outcome("crash", f"the process ended with {process.exitcode}")
            if current is None:
                assert outcome is None, f"the cases cannot be prepared: {outcome.detail}"
            elif outcome is not None:
                outcomes[current], current = outcome, None
                if outcome.kind == "crash":
                    break
            started = time.monotonic()
        elif current is None:
            assert waited < _STARTING_S, "the process does not begin"
        elif waited > deadline_s:
            outcomes[current] = Outcome("hang", f"no end after {deadline_s:g} s")
            break
        elif _resident(process.pid) > 2 * MEMORY_BYTES:
            outcomes[current] = Outcome("memory", f"more than {2 * MEMORY_BYTES / 1e9:g} GB")
            break
    return outcomes


def _serve(pipe: Any, module: str, store: Path, cases: Sequence[Case], memory_bytes: int) -> None:
    """The body of a process that runs cases. It sends (case, None) before each and (case, outcome) after it."""
    import torch

    torch.set_num_threads(1)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    # Of private memory only: a mapped file of 10 GB costs nothing.
    resource.setrlimit(resource.RLIMIT_DATA, (3 * MEMORY_BYTES, 3 * MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        inputs = inputs_of(module)
        if not store.exists():
            build(inputs.values(), store)
        runner = Runner(inputs, store)
        for name in dict.fromkeys(case.input for case in cases):
            runner.intact(name), runner.intact(name, 1)
    except BaseException:
        pipe.send((None, Outcome("failed", traceback.format_exc())))
        return
    for case in cases:
        pipe.send((case, None))
        before = _forget_peak()
        outcome = runner.run(case)
        grown = _peak() - before
        if grown > memory_bytes:
            outcome = Outcome("memory", f"{grown / 1e9:.1f} GB, then {outcome.kind}: {outcome.detail}", outcome.where)
        pipe.send((case, outcome))


def inputs_of(module: str) -> dict[str, Input]:
    """The table `INPUTS` of a module, by name."""
    return {each.name: each for each in importlib.import_module(module).INPUTS}


def _resident(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _forget_peak() -> int:
    """Sets the kernel's record of this process's peak back to what it uses now; returns that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main(module: str, arguments: Sequence[str]) -> int:
    """Repeats one case and shows its traceback."""
    inputs = inputs_of(module)
    if len(arguments) != 3 or arguments[0] not in inputs:
        print(f"usage: python -m fuzz INPUT MUTATION SEED; inputs: {', '.join(inputs)}", file=sys.stderr)
        return 2
    case = Case(arguments[0], arguments[1], int(arguments[2]))
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch, "store")
        build(inputs.values(), store)
        runner = Runner(inputs, store)
        runner.intact(case.input), runner.intact(case.input, 1)
        folder = Path(scratch, "shown")
        shutil.copytree(folder_of(store, case.input, 0), folder, symlinks=True)
        damage(case, inputs, store, folder)
        with inside(folder):
            try:
                print(f"read: {short(inputs[case.input].read())}")
            except Exception:
                traceback.print_exc()
        outcome = runner.run(case)
    print(f"{outcome.kind}: {outcome.detail} {outcome.where}")
    return int(not outcome.good)
