"""The search on real Ray: its driver killed, its trials killed, and the same found as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tune_cases import COMPARED, one_thread, search_config

from slidr.cluster.tune import SearchFailed, search
from slidr.config import Config, SpaceConfig, dump
from slidr.tracking import read_journal, tracking_uri
from slidr.tracking_search import read_search
from slidr.training.checkpoint import CheckpointFolder

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds processes in Linux's /proc"),
]
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 240.0


@pytest.fixture(scope="module")
def base(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A search whose second rounds follow from the scores of the first, by TPE and by ASHA."""
    config = search_config(tiny_world, tmp_path_factory.mktemp("tune-on-ray"))
    return replace(
        config,
        optim=replace(config.optim, epochs=4),
        tune=replace(config.tune, trials=3, round_size=2, searcher="tpe", pruner="asha", grace_epochs=1, reduction=2),
    )


@pytest.fixture
def launch() -> Iterator[Callable[[Path, Path], subprocess.Popen[bytes]]]:
    """Starts `jobs/tune.py` on a config, with a log, as a driver with a private cluster of its own."""
    drivers = []

    def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
        # Not the cluster that the tests have started.
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("ab") as output:
            drivers.append(
                subprocess.Popen(
                    [sys.executable, str(ROOT / "jobs/tune.py"), str(config)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment,
                )
            )
        return drivers[-1]

    yield start
    for driver in drivers:  # not before: what outlives its driver for a while is part of the trouble
        for pid in session_of(driver.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        driver.wait()


def on_ray(config: Config, folder: Path, **cluster: Any) -> Config:
    """The same search in another folder, each job in a process of its own, two at a time."""
    return replace(
        config,
        run=replace(config.run, folder=str(folder / "runs")),
        tune=replace(config.tune, results=str(folder / "results")),
        cluster=replace(config.cluster, num_workers=1, local_cpus=2, **cluster),
    )


def test_a_search_whose_driver_is_killed_three_times_and_a_worker_once_finds_what_an_undisturbed_one_finds(
    base: Config, tmp_path: Path, launch: Callable[[Path, Path], subprocess.Popen[bytes]]
) -> None:
    alone = search(base)
    steps = sum(map(len, trained(base).values()))
    # A random moment in each third, as the number of optimizer steps done by then.
    rng = np.random.default_rng(5)
    moments = [int(rng.integers(steps * third // 3 + 1, steps * (third + 1) // 3)) for third in range(3)]
    config = on_ray(base, tmp_path, max_failures=3)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    log = tmp_path / "log.txt"

    seen: list[dict[Path, Left]] = []
    for moment in moments:
        driver = launch(path, log)
        wait(lambda moment=moment: sum(map(len, trained(config).values())) >= moment, driver, log)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL, "it was running"
        seen.append(left(config))
        assert not Path(str(config.tune.results)).exists(), "nothing was finished"
    assert count_ended(seen[0]) < count_ended(seen[2])
    driver = launch(path, log)
    kill_a_worker(config, driver, log)
    seen.append(left(config))
    assert driver.wait(PATIENCE_S) == 0, log.read_text()

    found = json.loads(Path(str(config.tune.results), "table.json").read_text())
    assert found["table"] == alone["table"]
    rows = parquet(config)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in parquet(base)]
    assert {"finished", "pruned"} <= {row["status"] for row in rows}
    for moment in seen:
        check_nothing_was_done_again(moment, left(config))
    # Kills leave MLflow no run twice, and none without its numbers.
    run_id = Path(config.run.folder, "search/mlflow_run_id").read_text()
    read = read_search(tracking_uri(config), run_id)
    assert [{key: row[key] for key in COMPARED} for row in read] == [
        {key: row[key] for key in COMPARED} for row in rows
    ]


def test_a_trial_whose_process_dies_for_good_is_lost_for_now_and_the_same_command_finishes_it(
    base: Config, tmp_path: Path, ray_cluster: None
) -> None:
    config = on_ray(base, tmp_path, max_failures=0)
    wanted = replace(config.tune, fractions=(1.0,), methods=("random",), searcher="grid", trials=None, pruner="none")
    wanted = replace(wanted, random=SpaceConfig(lr=(1e-3, 1e-2)), round_size=1)
    config = replace(config, optim=replace(config.optim, epochs=12), tune=wanted)
    second = Path(config.run.folder, "search/100pct/random/trial-001")
    struck: list[Path] = []
    killer = threading.Thread(target=lambda: struck.append(kill_a_worker(config, None, None, second)), daemon=True)
    killer.start()
    with pytest.raises(SearchFailed, match=r"1 trainings were lost.*\n.*random/trial-001: its process died"):
        search(config)
    killer.join(PATIENCE_S)
    assert struck == [second]
    before = left(config)
    assert {folder.name: job.ended is not None for folder, job in before.items()} == {
        "trial-000": True,
        "trial-001": False,
    }
    search(config)
    assert [row["status"] for row in parquet(config)] == ["finished", "finished", "finished"]
    check_nothing_was_done_again(before, left(config))


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


def check_nothing_was_done_again(before: dict[Path, Left], after: dict[Path, Left]) -> None:
    """Ended jobs keep their records untouched; the others went on from the checkpoints they had."""
    for folder, job in before.items():
        if job.ended is not None:
            assert after[folder] == replace(job, checkpoint=0), f"{folder} was run again"
            continue
        new = (folder / "metrics.jsonl").read_bytes()[job.journal :].splitlines()
        again = [entry["step"] for entry in map(parsed, new) if "loss" in entry.get("metrics", {})]
        assert all(step > job.checkpoint for step in again), f"{folder} began before its checkpoint"


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


def parquet(config: Config) -> list[dict[str, Any]]:
    return pq.read_table(Path(str(config.tune.results), "trials.parquet")).to_pylist()


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


def holders(path: Path) -> list[int]:
    """The processes that have a file open, without this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if any(os.path.realpath(link) == str(path) for link in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
    return found
