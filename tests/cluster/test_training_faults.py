"""Trainings of fixed size whose workers, nodes and drivers are killed, checkpoints damaged, disks filled up.

On a cluster of three nodes, each a set of real processes, beside the session's; the jobs are the command line's. After
each, losses and weights equal the undisturbed run's bit for bit. Part of `make chaos`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_book import FaultBook
from fault_jobs import Fault, Job, TrainingWork, logged_steps, run_through, truncate
from faults import TRAIN_WORKER, FaultCluster, await_end, kill_worker, kill_working_node, pids_of
from small_disk import SmallDisk
from training_runs import losses, named, weights

from slidr.config import Config

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at Linux's /proc"),
]
WAITS = "waiting for a node: "


def require_same(config: Config, undisturbed: Config) -> None:
    assert losses(config) == losses(undisturbed)
    for name, value in weights(undisturbed).items():
        assert torch.equal(weights(config)[name], value), name


def strike(cluster: FaultCluster, blow: Callable[[], object]) -> None:
    """A fault in training; returns once none of the processes that trained is left."""
    pids = pids_of(cluster, TRAIN_WORKER)
    blow()
    await_end(pids)


def moments(chaos_round: int, count: int) -> list[int]:
    """After how many of the ten steps the faults of a round happen."""
    steps = np.random.default_rng(chaos_round).choice(range(1, 9), count, replace=False)
    return sorted(int(step) for step in steps)


def test_killed_workers_killed_drivers_and_damaged_checkpoints(
    base: Config, on_ray: dict[int, Config], cluster: FaultCluster, book: FaultBook, chaos_round: int
) -> None:
    config = named(base, f"killed-{chaos_round}", workers=2)
    config = replace(config, cluster=replace(config.cluster, max_failures=2))
    folder = Path(config.run.folder, config.run.name)
    work, spoiled, orphans = TrainingWork(config), [], []

    def kill_a_worker(job: Job) -> None:
        strike(cluster, lambda: kill_worker(cluster, TRAIN_WORKER))

    def kill_driver(job: Job) -> None:
        orphans[:] = pids_of(cluster, TRAIN_WORKER)
        job.kill()
        assert not (folder / "result.json").exists()

    def kill_driver_and_truncate(job: Job) -> None:
        kill_driver(job)
        await_end(orphans)  # or they would write others
        # All that came after step 3, so that what is left ends in the middle of an epoch.
        spoiled.extend(path for path in folder.glob("checkpoints/step-*.pt") if path.name > "step-00000003.pt")
        for path in spoiled:
            truncate(path)

    faults = [
        Fault("training: worker killed", 2, kill_a_worker),
        Fault("training: driver killed", 3, kill_driver, lambda: await_end(orphans)),
        Fault("training: driver killed, newest checkpoints truncated", 5, kill_driver_and_truncate),
        Fault("training: worker killed", 7, kill_a_worker),
    ]
    if chaos_round:
        first, second, third, fourth = moments(chaos_round, 4)
        # Step 4's checkpoint, which is to be spoiled, is there once step 5 is done.
        faults = [replace(f, number=n) for f, n in zip(faults, (first, second, max(5, third), fourth), strict=True)]
    entries, output = run_through("pretrain", config, cluster, work, faults, book)
    assert all(entry.at < 10 for entry in entries)
    assert spoiled
    for path in spoiled:
        assert f"{path}: not a readable checkpoint" in output
    assert entries[2].before[0] == 3  # the step of the checkpoint that was left
    require_same(config, on_ray[2])
    book.close(entries)


def test_lost_nodes_replaced_at_once_or_once_the_user_was_told(
    base: Config, on_ray: dict[int, Config], cluster: FaultCluster, book: FaultBook, chaos_round: int
) -> None:
    config = named(base, f"nodes-{chaos_round}", workers=2)
    config = replace(config, cluster=replace(config.cluster, max_failures=2))

    def lose_and_replace(job: Job) -> None:
        pids = pids_of(cluster, TRAIN_WORKER)
        kill_working_node(cluster, TRAIN_WORKER)
        cluster.add_node(2)
        await_end(pids)

    def lose_and_wait(job: Job) -> float:
        told = job.output.count(WAITS)
        strike(cluster, lambda: kill_working_node(cluster, TRAIN_WORKER))
        job.until("word of the wait", lambda: job.output.count(WAITS) > told)
        before = work.progress()
        time.sleep(10)  # long enough for steps, were it not waiting
        assert job.running
        assert work.progress() == before
        cluster.add_node(2)
        return time.monotonic()

    work = TrainingWork(config)
    first, second = (2, 6) if chaos_round == 0 else moments(chaos_round, 2)
    faults = [
        Fault("training: node lost, another comes at once", first, lose_and_replace),
        Fault("training: node lost, none comes until the user was told (from its coming)", second, lose_and_wait),
    ]
    entries, output = run_through("pretrain", config, cluster, work, faults, book)
    assert all(entry.at < 10 for entry in entries)
    needs = r"2 workers x 1 CPUs \+ 1 loader CPUs need 3 CPUs, the cluster has 2 \(nodes: 2 CPUs\)"
    assert re.search(
        WAITS
        + "cluster: "
        + needs
        + r"; add one .* goes on by itself, or, if no step follows, end this .*--run\.resume",
        output,
    )
    assert "nodes have come, there is room again (nodes: 2 CPUs, 2 CPUs): going on" in output
    require_same(config, on_ray[2])
    book.close(entries)


def full_disk(workers: int) -> str:
    """The fault's name in the book."""
    return f"training: disk full, {f'{workers} workers' if workers else 'in one process'}"


@pytest.fixture
def disk(workers: int, book: FaultBook) -> Iterator[SmallDisk]:
    try:
        disk = SmallDisk(mib=512)
    except OSError as error:
        book.skip(full_disk(workers), str(error))
        pytest.skip(str(error))
    try:
        yield disk
    finally:
        disk.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_ends_the_run_with_the_reason_and_its_last_checkpoint_intact(
    base: Config,
    on_ray: dict[int, Config],
    cluster: FaultCluster,
    book: FaultBook,
    chaos_round: int,
    disk: SmallDisk,
    tmp_path: Path,
    workers: int,
) -> None:
    tracking = replace(base.tracking, uri=f"sqlite:///{tmp_path}/mlflow.db")
    config = replace(named(base, "full", workers, folder=str(disk.path)), tracking=tracking)
    # Restarts must not be spent on what only a user can mend.
    config = replace(config, cluster=replace(config.cluster, max_failures=3))
    work = TrainingWork(config)
    moment = 4 if chaos_round == 0 else moments(chaos_round, 1)[0]
    where = cluster if workers else None
    with Job("pretrain", config, where) as job:
        job.until("a checkpoint", lambda: work.progress() >= moment and work.checkpoints.steps())
        entry = book.open(full_disk(workers), work.unit)
        kept = {step: (disk.path / "full/checkpoints" / f"step-{step:08d}.pt") for step in work.checkpoints.steps()}
        content = {step: path.read_bytes() for step, path in kept.items()}
        disk.fill()
        assert job.wait() == 1
        output = job.output
    entry.at, entry.before = work.progress(), work.kept()
    assert entry.at < 10
    reason = r"training broke off: (worker \d: )?/proc/\S+: cannot be written \(No space left on device\)"
    assert re.search(f"slidr pretrain: .*{reason}", output), output
    assert f"continue from step {entry.before[0]} with --run.resume" in output
    resumed = replace(config, run=replace(config.run, resume=True))
    if chaos_round == 0:  # nobody has made room yet
        with Job("pretrain", resumed, where) as job:
            assert job.wait() == 1
            assert re.search(r"slidr pretrain: disk: run\.folder: /proc/\S+: 0\.0 GB free", job.output), job.output
    assert {step: path.read_bytes() for step, path in kept.items()} == content
    disk.free()
    began = time.monotonic()
    with Job("pretrain", resumed, where) as job:
        entry.seconds = job.until("a new step", lambda: work.progress() > entry.at) - began
        assert job.wait() == 0, job.output
    entry.lost, entry.again = work.cost(entry)
    assert len(logged_steps(work.journal)[entry.before[1] :]) == 10 - entry.before[0]
    if workers:
        require_same(config, on_ray[workers])
    else:
        assert losses(config) == pytest.approx(losses(on_ray[1]), rel=1e-5)  # one process has more threads
    book.close([entry])
