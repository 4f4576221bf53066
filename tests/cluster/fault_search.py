"""A search as its files and processes show it: what there is of its jobs, who works on them, how to kill those."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fault_book import Entry
from fault_jobs import Job
from faults import FaultCluster, process_tree

from slidr.config import Config
from slidr.tracking import read_journal
from slidr.training.checkpoint import CheckpointFolder

PATIENCE_S = 240.0


@dataclass(frozen=True)
class Left:
    """What there is of a job at a moment."""

    ended: tuple[int, int] | None  # inode and time of its record
    checkpoint: int  # its newest's step; 0: none
    journal: int  # bytes


def left(config: Config) -> dict[Path, Left]:
    """What there is of every job that was begun."""
    found = {}
    for folder in folders(config):
        end = folder / "end.json"
        ended = (end.stat().st_ino, end.stat().st_mtime_ns) if end.exists() else None
        # In this order: a process that lives a moment longer than its driver writes on.
        steps = CheckpointFolder(str(folder / "checkpoints")).steps()
        found[folder] = Left(ended, steps[-1] if steps else 0, (folder / "metrics.jsonl").stat().st_size)
    return found


def settle(entry: Entry, after: dict[Path, Left]) -> None:
    """What a fault cost: ended jobs keep their records untouched; the others went on from the checkpoints they had."""
    entry.lost = entry.again = 0
    for folder, job in entry.before.items():
        journal = (folder / "metrics.jsonl").read_bytes()
        if job.ended is not None:
            untouched = after[folder] == replace(job, checkpoint=0)
            entry.lost += 0 if untouched else max(steps_in(journal), default=1)
            continue
        before, new = steps_in(journal[: job.journal]), steps_in(journal[job.journal :])
        entry.lost += sum(step <= job.checkpoint for step in new)
        entry.again += len({step for step in new if step > job.checkpoint} & set(before))


def steps_in(journal: bytes) -> list[int]:
    """The optimizer steps that lines of a journal tell of."""
    return [entry["step"] for entry in map(parsed, journal.splitlines()) if "loss" in entry.get("metrics", {})]


def parsed(line: bytes) -> dict[str, Any]:
    """A journal's entry; nothing for one cut short."""
    with contextlib.suppress(ValueError):
        return json.loads(line)
    return {}


def count_ended(jobs: dict[Path, Left]) -> int:
    return sum(job.ended is not None for job in jobs.values())


def folders(config: Config) -> list[Path]:
    return sorted(path.parent for path in Path(config.run.folder, "search").glob("*/*/*/metrics.jsonl"))


def trained(config: Config) -> dict[Path, list[int]]:
    """The optimizer steps that each job did."""
    journals = {folder: read_journal(folder / "metrics.jsonl") for folder in folders(config)}
    return {
        folder: [step for step, metrics in journal.items() if "loss" in metrics] for folder, journal in journals.items()
    }


def progress(config: Config) -> int:
    """The optimizer steps done in all jobs."""
    return sum(map(len, trained(config).values()))


def await_more_of(folder: Path, driver: subprocess.Popen[bytes] | None, log: Path | None) -> None:
    """Waits until a job has done a step that it had not done, or has ended."""
    done = max(read_journal(folder / "metrics.jsonl"))
    wait(lambda: (folder / "end.json").exists() or max(read_journal(folder / "metrics.jsonl")) > done, driver, log)


def await_work_of(driver: subprocess.Popen[bytes], config: Config, log: Path) -> None:
    """Waits until a process of this very driver has done a step: those of a killed one work on for a while."""
    begun_at: dict[Path, int] = {}

    def worked() -> bool:
        own = session_of(driver.pid)
        for folder in folders(config):
            done = max(read_journal(folder / "metrics.jsonl"), default=0)
            if folder in begun_at and done > begun_at[folder]:
                return True
            here = set(holders(folder / "lock"))
            if here and here <= own:  # a killed one's has let go
                begun_at.setdefault(folder, done)
        return False

    wait(worked, driver, log)


def session_of(leader: int) -> set[int]:
    """The living processes of a session."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                # After the name in brackets: state, parent, group, session.
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) == leader and state != "Z":
                    found.add(int(entry.name))
    return found


def wait(until: Callable[[], bool], driver: subprocess.Popen[bytes] | None, log: Path | None) -> None:
    """Polls; fails where the driver has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        assert driver is None or driver.poll() is None, log and log.read_text()
        assert time.monotonic() < deadline, log and log.read_text()
        time.sleep(0.01)


def kill_a_worker(
    config: Config, driver: subprocess.Popen[bytes] | None, log: Path | None, only: Path | None = None
) -> Path:
    """Kills the process of a job that has a checkpoint and no end yet; returns the job's folder."""
    struck: list[Path] = []

    def strike() -> bool:
        for folder in [only] if only is not None else folders(config):
            if not CheckpointFolder(str(folder / "checkpoints")).steps():
                continue
            for pid in holders(folder / "lock"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)  # it must not end between the look and the kill
                    running = not (folder / "end.json").exists() and pid in holders(folder / "lock")
                    os.kill(pid, signal.SIGKILL if running else signal.SIGCONT)
                    if running:
                        struck.append(folder)
                        return True
        return False

    wait(strike, driver, log)
    return struck[0]


def kill_a_node(cluster: FaultCluster, config: Config, job: Job) -> tuple[Path, list[int]]:
    """Kills a node on which a trial runs that has a checkpoint; returns the trial's folder and the node's processes."""
    struck: list[tuple[Path, list[int]]] = []

    def strike() -> bool:
        for node in list(cluster.nodes):
            pids = process_tree(node.process.pid)
            for folder in folders(config):
                if not CheckpointFolder(str(folder / "checkpoints")).steps():
                    continue
                for pid in set(holders(folder / "lock")) & set(pids):
                    os.kill(pid, signal.SIGSTOP)  # it must not end between the look and the kill
                    if not (folder / "end.json").exists() and pid in holders(folder / "lock"):
                        cluster.kill_node(node)
                        struck.append((folder, pids))
                        return True
                    os.kill(pid, signal.SIGCONT)
        return False

    wait(strike, job.process, None)
    return struck[0]


def holders(path: Path) -> list[int]:
    """The processes that have a file open, without this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if any(os.path.realpath(link) == str(path) for link in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
    return found
