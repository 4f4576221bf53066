"""Superpixel jobs whose workers, nodes and drivers are killed: every image exactly once, none damaged.

On a cluster of three nodes, each a set of real processes; the jobs are the command line's. Part of `make chaos`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fault_book import FaultBook
from fault_jobs import Fault, Job, MapsWork, run_through
from faults import SUPERPIXEL_WORKER, FaultCluster, await_end, kill_worker, kill_working_node, pids_of

from slidr.cluster.superpixels import folder_of, missing_maps
from slidr.config import Config, DataConfig, SuperpixelConfig
from slidr.data.image_list import ImageRef

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at Linux's /proc"),
]
WORKER, NODE, DRIVER = (f"superpixels: {what} killed" for what in ("worker", "node", "driver"))


def test_every_image_is_done_exactly_once_whatever_is_killed(
    large_images: DataConfig,
    images: list[ImageRef],
    undisturbed: dict[str, bytes],
    cluster: FaultCluster,
    book: FaultBook,
    chaos_round: int,
    tmp_path: Path,
) -> None:
    config = Config(data=large_images, superpixels=SuperpixelConfig(folder=str(tmp_path), sigma=1.0))
    folder = Path(folder_of(config.superpixels))
    work = MapsWork(folder, undisturbed)

    def kill_driver(job: Job) -> None:
        pids = pids_of(cluster, SUPERPIXEL_WORKER)
        job.kill()
        await_end(pids)

    def worker(job: Job) -> None:
        kill_worker(cluster, SUPERPIXEL_WORKER)

    def node(job: Job) -> None:
        kill_working_node(cluster, SUPERPIXEL_WORKER)

    rng = np.random.default_rng(chaos_round)
    strikes = [(WORKER, worker), (NODE, node), (WORKER, worker), (DRIVER, kill_driver), (DRIVER, kill_driver)]
    faults = [Fault(kind, 3 + 5 * i + int(rng.integers(5)), strike) for i, (kind, strike) in enumerate(strikes)]
    entries, output = run_through("superpixels", config, cluster, work, faults, book)
    assert len(images) == 36
    assert all(0 < entry.at < 36 for entry in entries)  # each came in the middle
    done = len(entries[-1].before)
    assert f"superpixels: {36 - done} computed, {done} there already" in output
    assert missing_maps(str(folder), images) == []
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == undisturbed
    # A new driver does what is missing. (Where a worker is killed between a map and Ray's note of it, Ray has the
    # image done again, and so it does with the notes that a lost node held.)
    assert [entry.again for entry in entries if entry.fault == DRIVER] == [0, 0]
    assert {path.name for path in folder.iterdir()} - undisturbed.keys() == {"parameters.json", "manifest.json"}
    assert json.loads((folder / "manifest.json").read_text()) == {"images": 36, "maps": 36, "failed": {}}
    book.close(entries)


def test_on_a_cluster_without_cpus_the_job_says_what_it_waits_for_and_goes_on_once_a_node_comes(
    large_images: DataConfig, images: list[ImageRef], tmp_path: Path
) -> None:
    config = Config(data=large_images, superpixels=SuperpixelConfig(folder=str(tmp_path), sigma=1.0))
    waits = "waiting for a node: superpixels need 1 CPU for each task, the cluster has 0 (nodes: none)"
    with FaultCluster(cpus=[]) as cluster, Job("superpixels", config, cluster) as job:
        job.until("the wait is told of", lambda: waits in job.output)
        assert not list(tmp_path.glob("*/*.png"))
        cluster.add_node(2)
        assert job.wait() == 0, job.output
        assert "there is room again (nodes: 2 CPUs)" in job.output
    assert len(list(tmp_path.glob("*/*.png"))) == len(images)
