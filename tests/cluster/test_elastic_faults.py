"""Trainings of as many workers as there is room for, whose nodes are killed: they go on with those that are left.

On a cluster of three nodes, each a set of real processes; the jobs are the command line's. Part of `make chaos`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fault_book import FaultBook
from fault_jobs import Fault, Job, TrainingWork, run_through
from faults import TRAIN_WORKER, FaultCluster, await_end, kill_working_node, pids_of
from training_runs import losses, named

from slidr.config import Config

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at Linux's /proc"),
]


def test_an_elastic_run_goes_on_to_its_end_with_the_node_that_is_left(
    base: Config, on_ray: dict[int, Config], cluster: FaultCluster, book: FaultBook, chaos_round: int
) -> None:
    config = named(base, f"elastic-{chaos_round}")
    config = replace(config, cluster=replace(config.cluster, num_workers=(1, 2), max_failures=1))
    work, orphans = TrainingWork(config), []

    def on_both_nodes() -> list[int]:
        pids = pids_of(cluster, TRAIN_WORKER)
        assert len(pids) == 2  # one on each: a node has no room for two
        return pids

    def kill_driver(job: Job) -> None:
        orphans[:] = on_both_nodes()
        job.kill()

    def lose_node(job: Job) -> None:
        pids = on_both_nodes()  # at once: nothing is held for the driver that was killed
        kill_working_node(cluster, TRAIN_WORKER)
        await_end(pids)

    first = 1 + chaos_round % 3
    faults = [
        Fault("training, elastic: driver killed", first, kill_driver, lambda: await_end(orphans)),
        Fault("training, elastic: node lost, goes on with the one that is left", first + 2, lose_node),
    ]
    entries, output = run_through("pretrain", config, cluster, work, faults, book)
    assert entries[1].at < 10
    assert len(cluster.nodes) == 1
    assert "waiting for a node" not in output
    # Sums over one worker's batches are taken in another order than over two's; ten steps of Adam enlarge that.
    assert losses(config) == pytest.approx(losses(on_ray[2]), rel=1e-4)
    book.close(entries)
