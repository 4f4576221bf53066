"""Jobs as a user runs them, driven through faults: what each fault cost them is written into the book."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fault_book import Entry, FaultBook
from faults import FaultCluster, clean_environment, kill_tree

from slidr.config import Config, dump
from slidr.data.storage import DataError
from slidr.training.checkpoint import CheckpointError, CheckpointFolder

_POLL_S = 0.02


class Job:
    """A `slidr` command in a process of its own; `output` is what a user would have seen."""

    def __init__(self, command: str, config: Config, cluster: FaultCluster | None = None) -> None:
        """Starts it on `cluster`, else on a private one of its own, as on a laptop."""
        if cluster is not None:
            config = replace(config, cluster=replace(config.cluster, address=cluster.address))
        self._folder = Path(tempfile.mkdtemp(prefix="slidr-job-"))
        (self._folder / "config.yaml").write_text(dump(config))
        self._log = self._folder / "output.txt"
        with self._log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "slidr.cli", command, str(self._folder / "config.yaml")],
                env=clean_environment() if cluster is None else cluster.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def until(self, what: str, reached: Callable[[], bool], timeout_s: float = 300) -> float:
        """Waits for something that the job does; returns the time (`time.monotonic`) at which it was seen.

        Raises `AssertionError`, with the job's output, where the job ends or the time is up before.
        """
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert self.running, f"ended before {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}\n{self.output}"
            time.sleep(_POLL_S)
        return time.monotonic()

    def kill(self) -> None:
        """SIGKILL to the driver alone."""
        assert self.running, f"ended before it was killed:\n{self.output}"
        self.process.kill()
        self.process.wait()

    def wait(self, timeout_s: float = 300) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended within {timeout_s:g} s:\n{self.output}") from None

    def close(self) -> None:
        """Ends it, if it still runs, and all below it."""
        kill_tree(self.process)
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True)
class Fault:
    """A fault to come, once the job's progress has reached `number`.

    `strike` makes it happen. It may return a time (`time.monotonic`) from which the seconds count; else they count from
    its call. `ended` returns when nothing that it ended is left; where that was the driver, the next one has been
    started by then.
    """

    kind: str
    number: int
    strike: Callable[[Job], float | None]
    ended: Callable[[], None] = lambda: None


def run_through(
    command: str,
    config: Config,
    cluster: FaultCluster | None,
    work: Work,
    faults: Sequence[Fault],
    book: FaultBook,
) -> tuple[list[Entry], str]:
    """Runs a command to its good end, and makes the faults happen on the way.

    Where a fault ended the driver, the same command is started again at once, with `run.resume`. Returns the faults'
    entries, costs included, and what the last driver printed. Raises `AssertionError` where the job ended before a
    fault could happen, or did not go on.
    """
    entries: list[Entry] = []
    job = Job(command, config, cluster)
    try:
        for fault in faults:
            job.until(f"progress of {fault.number}", lambda number=fault.number: work.progress() >= number)  # type: ignore[misc]
            entry = book.open(fault.kind, work.unit)
            entries.append(entry)
            began = time.monotonic()
            began = fault.strike(job) or began
            if not job.running:
                job.close()
                job = Job(command, replace(config, run=replace(config.run, resume=True)), cluster)
            fault.ended()
            entry.at, entry.before = work.progress(), work.kept()
            recovered = job.until(f"progress beyond {entry.at}", lambda at=entry.at: work.progress() > at)  # type: ignore[misc]
            entry.seconds = recovered - began
        status = job.wait()
        assert status == 0, job.output
        for entry in entries:
            entry.lost, entry.again = work.cost(entry)
        return entries, job.output
    finally:
        job.close()


class Work(Protocol):
    """What a job does, as its files show it."""

    unit: str

    def progress(self) -> int:
        """How far it has come."""

    def kept(self) -> Any:
        """What there is that a fault must not take."""

    def cost(self, entry: Entry) -> tuple[int, int]:
        """After the job's end: what of `entry.before` was lost, and what was done again; see `fault_book`."""


class MapsWork:
    """A superpixel job's maps."""

    unit = "images"

    def __init__(self, folder: Path, undisturbed: dict[str, bytes]) -> None:
        self.folder, self.undisturbed = folder, undisturbed

    def progress(self) -> int:
        return len(self.kept())

    def kept(self) -> dict[str, int]:
        """The maps there are, and when each was written."""
        return {path.name: path.stat().st_mtime_ns for path in self.folder.glob("*.png")}

    def cost(self, entry: Entry) -> tuple[int, int]:
        now = self.kept()
        whole = {name for name in now if (self.folder / name).read_bytes() == self.undisturbed.get(name)}
        return len(entry.before.keys() - whole), sum(now.get(name) != written for name, written in entry.before.items())


class TrainingWork:
    """A training's steps."""

    unit = "steps"

    def __init__(self, config: Config) -> None:
        folder = Path(config.run.folder, config.run.name)
        self.journal = folder / "metrics.jsonl"
        self.checkpoints = CheckpointFolder(str(folder / "checkpoints"))

    def progress(self) -> int:
        return max(logged_steps(self.journal), default=0)

    def kept(self) -> tuple[int, int]:
        """The step of the newest checkpoint that can be read, and how many steps were logged."""
        for step in reversed(self.checkpoints.steps()):
            try:
                return self.checkpoints.read(step)["step"], len(logged_steps(self.journal))
            except (CheckpointError, DataError):
                continue
        return 0, len(logged_steps(self.journal))

    def cost(self, entry: Entry) -> tuple[int, int]:
        checkpoint, logged = entry.before
        first = logged_steps(self.journal)[logged]  # of the workers that came after
        return max(0, checkpoint + 1 - first), max(0, entry.at - max(checkpoint, first - 1))


def logged_steps(journal: Path) -> list[int]:
    """The steps whose loss a run's journal holds, in the order in which they were written."""
    entries = []
    for line in journal.read_bytes().splitlines() if journal.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:  # being written, or cut short by a kill
            continue
    return [entry["step"] for entry in entries if "loss" in entry.get("metrics", {})]


def truncate(path: Path) -> None:
    """Cuts a file to half its size, as a crash of a machine or of its storage may leave it."""
    os.truncate(path, path.stat().st_size // 2)
