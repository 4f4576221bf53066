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
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from fault_book import Entry, FaultBook
from fault_jobs import Job
from fault_search import (
    PATIENCE_S,
    await_more_of,
    await_work_of,
    count_ended,
    kill_a_node,
    kill_a_worker,
    left,
    progress,
    session_of,
    settle,
    wait,
)
from faults import FaultCluster, await_end, process_tree
from tune_cases import COMPARED, one_thread, search_config

from slidr.cluster.tune import SearchFailed, search
from slidr.config import Config, SpaceConfig, dump
from slidr.tracking import tracking_uri
from slidr.tracking_search import read_search

__all__ = ["one_thread"]
pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds processes in Linux's /proc"),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A search whose second rounds follow from the scores of the first, by TPE and by ASHA."""
    config = search_config(tiny_world, tmp_path_factory.mktemp("tune-on-ray"))
    return replace(
        config,
        optim=replace(config.optim, epochs=4),
        tune=replace(config.tune, trials=3, round_size=2, searcher="tpe", pruner="asha", grace_epochs=1, reduction=2),
    )


@pytest.fixture(scope="module")
def alone(base: Config) -> dict[str, Any]:
    """The search undisturbed, in one process."""
    return search(base)


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
    base: Config,
    alone: dict[str, Any],
    tmp_path: Path,
    launch: Callable[[Path, Path], subprocess.Popen[bytes]],
    book: FaultBook,
    chaos_round: int,
) -> None:
    steps = progress(base)
    # A random moment in each third, as the number of optimizer steps done by then.
    rng = np.random.default_rng(5 + chaos_round)
    moments = [int(rng.integers(steps * third // 3 + 1, steps * (third + 1) // 3)) for third in range(3)]
    config = on_ray(base, tmp_path, max_failures=3)
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    log = tmp_path / "log.txt"

    entries: list[Entry] = []

    def enter(kind: str) -> Entry:
        entries.append(book.open(f"search: {kind}", "steps"))
        entries[-1].at, entries[-1].before = progress(config), left(config)
        return entries[-1]

    driver = launch(path, log)
    for moment in moments:
        wait(lambda moment=moment: progress(config) >= moment, driver, log)
        driver.kill()
        assert driver.wait() == -signal.SIGKILL, "it was running"
        began, entry = time.monotonic(), enter("driver killed")
        assert not Path(str(config.tune.results)).exists(), "nothing was finished"
        driver = launch(path, log)  # at once: what outlives its driver for a while is part of the trouble
        await_work_of(driver, config, log)
        entry.seconds = time.monotonic() - began
    assert count_ended(entries[0].before) < count_ended(entries[2].before)
    struck = kill_a_worker(config, driver, log)
    began, entry = time.monotonic(), enter("worker killed")
    await_more_of(struck, driver, log)
    entry.seconds = time.monotonic() - began
    assert driver.wait(PATIENCE_S) == 0, log.read_text()

    require_found(config, base, alone)
    for entry in entries:
        settle(entry, left(config))
    book.close(entries)


def test_a_search_that_loses_nodes_with_trials_finds_what_an_undisturbed_one_finds(
    base: Config, alone: dict[str, Any], tmp_path: Path, cluster: FaultCluster, book: FaultBook, chaos_round: int
) -> None:
    config = on_ray(base, tmp_path, max_failures=3)
    rng = np.random.default_rng(chaos_round)
    moments = [progress(base) * third // 3 + int(rng.integers(progress(base) // 6)) for third in range(3)]
    entries: list[Entry] = []

    def lose(kind: str, moment: int, every_node: bool = False) -> tuple[Entry, Path, float]:
        job.until(f"{moment} steps", lambda: progress(config) >= moment)
        struck, pids = kill_a_node(cluster, config, job)
        entry = book.open(f"search: {kind}", "steps")
        began = time.monotonic()
        for node in list(cluster.nodes) if every_node else []:
            pids += process_tree(node.process.pid)
            cluster.kill_node(node)
        await_end(pids)
        entry.at, entry.before = progress(config), left(config)
        entries.append(entry)
        return entry, struck, began

    with Job("tune", config, cluster) as job:
        for moment in moments[:2]:
            entry, struck, began = lose("node with a trial lost", moment)
            await_more_of(struck, job.process, None)
            entry.seconds = time.monotonic() - began
            cluster.add_node(2)
        every = "every node lost, one comes once the user was told (from its coming)"
        entry, struck, _ = lose(every, moments[2], every_node=True)
        job.until("word of the wait", lambda: "waiting for a node: cluster: 1 workers" in job.output)
        cluster.add_node(2)
        began = time.monotonic()
        await_more_of(struck, job.process, None)
        entry.seconds = time.monotonic() - began
        assert job.wait(PATIENCE_S) == 0, job.output
    require_found(config, base, alone)
    for entry in entries:
        settle(entry, left(config))
    book.close(entries)


def require_found(config: Config, base: Config, alone: dict[str, Any]) -> None:
    """The same table and rows as undisturbed, and in MLflow each run once, with its numbers."""
    found = json.loads(Path(str(config.tune.results), "table.json").read_text())
    assert found["table"] == alone["table"]
    rows = parquet(config)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in parquet(base)]
    assert {"finished", "pruned"} <= {row["status"] for row in rows}
    # Kills leave MLflow no run twice, and none without its numbers.
    run_id = Path(config.run.folder, "search/mlflow_run_id").read_text()
    read = read_search(tracking_uri(config), run_id)
    assert [{key: row[key] for key in COMPARED} for row in read] == [
        {key: row[key] for key in COMPARED} for row in rows
    ]


def test_a_trial_whose_process_dies_for_good_is_lost_for_now_and_the_same_command_finishes_it(
    base: Config, tmp_path: Path, ray_cluster: None, book: FaultBook
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
    entry = book.open("search: worker killed for good, the same command again", "steps")
    entry.at, entry.before = progress(config), left(config)
    assert {folder.name: job.ended is not None for folder, job in entry.before.items()} == {
        "trial-000": True,
        "trial-001": False,
    }
    began = time.monotonic()

    def watch() -> None:
        await_more_of(second, None, None)
        entry.seconds = time.monotonic() - began

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    search(config)
    watcher.join(PATIENCE_S)
    assert [row["status"] for row in parquet(config)] == ["finished", "finished", "finished"]
    settle(entry, left(config))
    book.close([entry])


def parquet(config: Config) -> list[dict[str, Any]]:
    return pq.read_table(Path(str(config.tune.results), "trials.parquet")).to_pylist()
