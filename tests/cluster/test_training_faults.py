"""Processes, drivers and nodes that are killed, checkpoints that are damaged, disks that fill up: nothing is lost.

On a cluster of three nodes, each a set of real processes, beside the session's; the jobs are the command line's.
Part of `make chaos`; docs/faults.md has what was measured.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import (
    SUPERPIXEL_WORKER,
    TRAIN_WORKER,
    Fault,
    FaultCluster,
    Job,
    SmallDisk,
    await_end,
    kill_worker,
    kill_working_node,
    logged_steps,
    pids_of,
    run_through,
    truncate,
)
from PIL import Image
from training_runs import losses, named, weights

from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import folder_of, missing_maps
from slidr.cluster.train import TrainingFailed
from slidr.config import Config, DataConfig, SuperpixelConfig
from slidr.data.frames import FrameTable, write_frames
from slidr.data.nuscenes import read_frames
from slidr.tracking import JournalError
from slidr.training.checkpoint import CheckpointError, CheckpointFolder

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at Linux's /proc"),
]


@pytest.fixture(scope="module")
def one_cluster() -> Iterator[FaultCluster]:
    with FaultCluster(cpus=[2, 2]) as cluster:
        yield cluster


@pytest.fixture
def cluster(one_cluster: FaultCluster) -> FaultCluster:
    """A head and two nodes of two CPUs, whatever an earlier test has killed."""
    while len(one_cluster.nodes) < 2:
        one_cluster.add_node(2)
    return one_cluster


@pytest.fixture
def large_images(tiny_world: Path, tmp_path: Path) -> Config:
    """The tiny world, with images large enough for superpixels to take a while: time to be killed in."""
    root, frames = tmp_path / "root", []
    shutil.copytree(tiny_world, root)
    for frame in read_frames(tiny_world, "v1.0-trainval"):
        for camera in frame.cameras:
            Image.open(tiny_world / camera.image_path).resize((480, 270)).save(root / camera.image_path)
        cameras = tuple(replace(camera, width=480, height=270) for camera in frame.cameras)
        frames.append(replace(frame, cameras=cameras))
    write_frames(frames, str(tmp_path / "frames.parquet"))
    data = DataConfig(root=str(root), frames=str(tmp_path / "frames.parquet"))
    return Config(data=data, superpixels=SuperpixelConfig(folder=str(tmp_path / "maps"), sigma=1.0))


def strike(cluster: FaultCluster, blow: Callable[[], object]) -> None:
    """A fault in training; returns once none of the processes that trained is left."""
    pids = pids_of(cluster, TRAIN_WORKER)
    blow()
    await_end(pids)


def test_superpixels_outlive_a_killed_worker_a_killed_node_and_a_killed_driver(
    large_images: Config, cluster: FaultCluster
) -> None:
    folder = Path(folder_of(large_images.superpixels))
    data = large_images.data
    images = FrameTable.open(data.frames).select((data.train_split, data.val_split)).images()
    done_by_first: dict[str, int] = {}

    def maps() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}

    def kill_driver(job: Job) -> None:
        pids = pids_of(cluster, SUPERPIXEL_WORKER)
        job.kill()
        await_end(pids)
        done_by_first.update(maps())

    faults: list[tuple[int, Fault]] = [
        (4, lambda job: kill_worker(cluster, SUPERPIXEL_WORKER)),
        (10, lambda job: kill_working_node(cluster, SUPERPIXEL_WORKER)),
        (16, kill_driver),
    ]
    blows, output = run_through("superpixels", large_images, cluster, lambda: len(maps()), faults)
    assert len(images) == 36
    assert 4 <= blows[0].at < blows[1].at < blows[2].at < 36  # each came in the middle
    done = len(done_by_first)
    assert f"superpixels: {36 - done} computed, {done} there already" in output
    assert missing_maps(str(folder), images) == []  # reads every map to its end
    assert set(maps()) == {f"{image.token}.png" for image in images}
    assert done_by_first.items() <= maps().items()  # what was done was not touched
    assert {path.name for path in folder.iterdir()} - set(maps()) == {"parameters.json", "manifest.json"}
    assert json.loads((folder / "manifest.json").read_text()) == {"images": 36, "maps": 36, "failed": {}}


def test_training_outlives_a_killed_worker_a_killed_driver_and_damaged_checkpoints_bit_for_bit(
    base: Config, on_ray: dict[int, Config], cluster: FaultCluster
) -> None:
    config = named(base, "killed", workers=2)
    config = replace(config, cluster=replace(config.cluster, max_failures=1))
    folder = Path(config.run.folder, config.run.name)
    journal, spoiled, before = folder / "metrics.jsonl", [], []

    def kill_driver(job: Job) -> None:
        strike(cluster, job.kill)
        assert not (folder / "result.json").exists()
        # All that came after step 3, so that what is left ends in the middle of an epoch.
        spoiled.extend(path for path in folder.glob("checkpoints/step-*.pt") if path.name > "step-00000003.pt")
        for path in spoiled:
            truncate(path)
        before.append(len(logged_steps(journal)))

    faults: list[tuple[int, Fault]] = [
        (3, lambda job: strike(cluster, lambda: kill_worker(cluster, TRAIN_WORKER))),
        (5, kill_driver),
    ]
    blows, output = run_through("pretrain", config, cluster, lambda: max(logged_steps(journal), default=0), faults)
    assert 3 <= blows[0].at < blows[1].at < 10
    assert spoiled
    for path in spoiled:
        assert f"{path}: not a readable checkpoint" in output
    assert logged_steps(journal)[before[0] :] == [4, 5, 6, 7, 8, 9, 10]
    assert losses(config) == losses(on_ray[2])
    for name, value in weights(on_ray[2]).items():
        assert torch.equal(weights(config)[name], value), name


def test_a_disk_that_fills_up_ends_the_run_with_the_reason_and_its_last_checkpoint_intact(
    base: Config, on_ray: dict[int, Config], tmp_path: Path
) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs util-linux's unshare")
    try:
        disk = SmallDisk(mib=512)
    except OSError as error:
        pytest.skip(str(error))
    try:
        tracking = replace(base.tracking, uri=f"sqlite:///{tmp_path}/mlflow.db")
        config = replace(named(base, "full", folder=str(disk.path)), tracking=tracking)
        checkpoints = CheckpointFolder(str(disk.path / "full" / "checkpoints"))

        def fill_in_the_middle() -> None:
            while 4 not in checkpoints.steps():
                time.sleep(0.01)
            disk.fill()

        threading.Thread(target=fill_in_the_middle, daemon=True).start()
        with pytest.raises((CheckpointError, JournalError, TrainingFailed), match="No space left on device"):
            pretrain(config, progress=False)
        newest = checkpoints.steps()[-1]
        assert 4 <= newest < 10
        assert checkpoints.read(newest)["step"] == newest
        disk.free()
        done = len(logged_steps(disk.path / "full" / "metrics.jsonl"))
        result = pretrain(replace(config, run=replace(config.run, resume=True)), progress=False)
        assert result["steps"] == 10
        assert logged_steps(disk.path / "full" / "metrics.jsonl")[done:][0] == newest + 1
        assert losses(config) == pytest.approx(losses(on_ray[2]), abs=1e-4)
    finally:
        disk.close()
