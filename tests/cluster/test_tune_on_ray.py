"""The search on Ray Tune: killed and started again it finds what an undisturbed one finds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from tune_cases import COMPARED, one_thread, search_config

from slidr.cluster.executor import check_trial_room, run_agenda
from slidr.cluster.session import ClusterError
from slidr.cluster.tune import search
from slidr.config import ClusterConfig, Config, SpaceConfig, TuneConfig, dump
from slidr.tuning.agenda import ListAgenda
from slidr.tuning.jobs import End, Group, Job, job_config

__all__ = ["one_thread"]
pytestmark = pytest.mark.ray
WAIT_S = 420.0


@pytest.fixture(scope="module")
def base(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """One fraction, both methods, three trials of three epochs in rounds of two, ASHA, one seed."""
    config = search_config(tiny_world, tmp_path_factory.mktemp("tune"))
    space = SpaceConfig(lr=(1e-3, 1e-1))
    wanted = TuneConfig(
        fractions=(1.0,),
        trials=3,
        round_size=2,
        pruner="asha",
        grace_epochs=1,
        reduction=2,
        seeds=1,
        pretrained=space,
        random=space,
    )
    return replace(config, optim=replace(config.optim, epochs=3), tune=wanted)


def placed(config: Config, name: str, workers: int) -> Config:
    folder = Path(config.run.folder).parent
    return replace(
        config,
        run=replace(config.run, folder=str(folder / name)),
        cluster=ClusterConfig(num_workers=workers, local_cpus=2, max_failures=1),
        tune=replace(config.tune, results=str(folder / f"{name}-results")),
    )


def table(config: Config) -> list[dict[str, Any]]:
    rows = pq.read_table(Path(str(config.tune.results), "trials.parquet")).to_pylist()
    return [{key: row[key] for key in (*COMPARED, "steps", "reason")} for row in rows]


def progress(config: Config) -> int:
    """How much a search has left behind: checkpoints and ends."""
    return sum(1 for _ in Path(config.run.folder).glob("search/*/*/*/*.json")) + sum(
        1 for _ in Path(config.run.folder).glob("search/*/*/*/checkpoints/step-*.pt")
    )


def kill_after(driver: subprocess.Popen[bytes], config: Config, more: int, delay_s: float) -> bool:
    """Kills a driver, without warning, once it has left so much more, and a moment later; False if it ended before.

    Returns once every process it had started is gone, too.
    """
    start, deadline = progress(config), time.monotonic() + WAIT_S
    while progress(config) < start + more:
        if driver.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the search makes no progress"
        time.sleep(0.1)
    time.sleep(delay_s)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while any(lives(process) for process in family):
        assert time.monotonic() < deadline, "Ray's processes outlive their driver"
        time.sleep(0.1)
    return True


def lives(process: psutil.Process) -> bool:
    """Whether a process does anything yet; one that nobody has waited for does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Starts `slidr tune` of a config in a process of its own; none survives the test."""
    drivers: list[subprocess.Popen[bytes]] = []

    def start(config: Config) -> subprocess.Popen[bytes]:
        path = tmp_path / "config.yaml"
        path.write_text(dump(config))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
        log = (tmp_path / f"driver-{len(drivers)}.log").open("wb")
        command = [sys.executable, "-m", "slidr.cli", "tune", str(path)]
        drivers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.poll() is None:
            driver.kill()


def test_a_search_killed_at_three_random_moments_finds_what_an_undisturbed_one_finds(
    base: Config, started: Any, tmp_path: Path
) -> None:
    undisturbed = placed(base, "undisturbed", workers=0)
    search(undisturbed)
    config = placed(base, "killed", workers=1)
    seed = int.from_bytes(os.urandom(4), "big")
    rng = np.random.default_rng(seed)
    kills = 0
    for _ in range(3):
        kills += kill_after(started(config), config, int(rng.integers(1, 6)), float(rng.uniform(0, 1.5)))
    driver = started(config)
    status = driver.wait(timeout=WAIT_S)
    log = "\n".join(path.read_text(errors="replace") for path in sorted(tmp_path.glob("driver-*.log")))
    assert status == 0, f"seed {seed}: {log}"
    assert kills >= 1, f"seed {seed}: the search was over before it could be killed"
    assert table(config) == table(undisturbed), f"seed {seed}"
    page = [Path(str(c.tune.results), "table.md").read_text() for c in (config, undisturbed)]
    assert page[0] == page[1]


def test_a_trial_of_two_workers_trains_within_tune_and_ends_at_its_rung(base: Config, ray_cluster: None) -> None:
    config = placed(base, "wide", workers=2)
    job = Job(Group(1.0, "random"), "trial", 0, {"lr": 1e-3}, bounds={1: 1.0})
    agenda = ListAgenda([job], lambda job: None)
    seen: list[End] = []
    run_agenda(agenda, config, lambda job: None, lambda job, end: seen.append(end))
    assert list(agenda.ends.values()) == seen
    assert (seen[0].status, seen[0].steps) == ("pruned", 2)
    assert job_config(config, job).cluster.num_workers == 2
    assert not agenda.lost


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(ray_cluster: None) -> None:
    with pytest.raises(ClusterError, match=r"1 workers x 4 CPUs .* need 4 CPUs, the cluster has 3"):
        check_trial_room(ClusterConfig(cpus_per_worker=4))
    with pytest.raises(ClusterError, match=r"3 workers x 1 CPUs .* need 4 CPUs, the cluster has 3"):
        check_trial_room(ClusterConfig(num_workers=3))
    with pytest.raises(ClusterError, match="1 workers need as many GPUs, the cluster has 0"):
        check_trial_room(ClusterConfig(use_gpu=True))


def test_as_many_trials_run_as_there_is_room_for(ray_cluster: None) -> None:
    assert check_trial_room(ClusterConfig()) == 3
    assert check_trial_room(ClusterConfig(cpus_per_worker=2)) == 1
    assert check_trial_room(ClusterConfig(num_workers=2)) == 1
