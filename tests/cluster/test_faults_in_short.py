"""Of `make chaos`, what takes a minute: a worker of the superpixels and one of a training is killed, in the session."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fault_book import Entry, FaultBook
from fault_jobs import MapsWork, TrainingWork, Work, logged_steps
from faults import SUPERPIXEL_WORKER, TRAIN_WORKER, await_end, kill, process_tree, title_of
from training_runs import losses, named, weights

from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import compute_superpixels, folder_of
from slidr.config import ClusterConfig, Config, DataConfig, SuperpixelConfig
from slidr.data.frames import FrameTable
from slidr.data.image_list import ImageRef

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at Linux's /proc"),
]
PATIENCE_S = 240.0


@contextmanager
def struck(book: FaultBook, kind: str, work: Work, number: int, title: str) -> Iterator[list[Entry]]:
    """SIGKILL to a process of that title below this one, once the work in the block has come as far as `number`.

    After the block, its entry is in the list. Raises `AssertionError` where it could not happen, or nothing went on.
    """
    entries: list[Entry] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def until(what: str, reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not reached():
            assert not ended.is_set() or reached(), f"the work ended before: {what}"
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
            time.sleep(0.01)

    def workers() -> list[int]:
        titles = {pid: title_of(pid) for pid in process_tree(os.getpid())}
        return [pid for pid, name in titles.items() if name.startswith("ray::") and title in name]

    def strike() -> None:
        try:
            until(f"progress of {number}", lambda: work.progress() >= number)
            until(f"a process {title}", workers)
            pids = []
            while not (pids and pids[-1] in workers()):  # held still: it must not end its work between look and kill
                for pid in pids[-1:]:
                    os.kill(pid, signal.SIGCONT)
                until(f"a process {title}", workers)
                pids = workers()
                os.kill(pids[-1], signal.SIGSTOP)
            began = time.monotonic()
            kill(pids[-1])
            entry = book.open(kind, work.unit)
            await_end(pids if title == TRAIN_WORKER else pids[-1:])
            entry.at, entry.before = work.progress(), work.kept()
            until(f"progress beyond {entry.at}", lambda: work.progress() > entry.at)
            entry.seconds = time.monotonic() - began
            entries.append(entry)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        yield entries
    finally:
        ended.set()
    thread.join(PATIENCE_S)
    if errors:
        raise errors[0]
    assert not thread.is_alive(), f"not within {PATIENCE_S:g} s: a fault and progress after it"
    for entry in entries:
        entry.lost, entry.again = work.cost(entry)


def test_superpixels_outlive_a_killed_worker(
    large_images: DataConfig,
    images: list[ImageRef],
    undisturbed: dict[str, bytes],
    ray_cluster: None,
    book: FaultBook,
    tmp_path: Path,
) -> None:
    config = SuperpixelConfig(folder=str(tmp_path), sigma=1.0)
    folder = Path(folder_of(config))
    work = MapsWork(folder, undisturbed)
    table = FrameTable.open(large_images.frames).select((large_images.train_split, large_images.val_split))
    with struck(book, "superpixels: worker killed", work, 3, SUPERPIXEL_WORKER) as entries:
        report = compute_superpixels(table, large_images, config, ClusterConfig(), progress=False)
    assert 3 <= entries[0].at < len(images)
    assert (report.computed, report.failed) == (len(images), ())
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == undisturbed
    book.close(entries)


def test_training_outlives_a_killed_worker_bit_for_bit(
    base: Config, on_ray: dict[int, Config], book: FaultBook, capfd: pytest.CaptureFixture[str]
) -> None:
    config = named(base, "struck", workers=2)
    config = replace(config, cluster=replace(config.cluster, max_failures=1))
    work = TrainingWork(config)
    with struck(book, "training: worker killed", work, 3, TRAIN_WORKER) as entries:
        pretrain(config)
    assert 3 <= entries[0].at < 10
    steps = logged_steps(work.journal)
    assert len(steps) == 10 + (entries[0].again or 0)
    (told,) = re.findall(r"going on from step (\d+)", capfd.readouterr().err)
    repeated = [after for before, after in pairwise(steps) if after <= before]
    assert repeated in ([], [int(told) + 1])
    assert losses(config) == losses(on_ray[2])
    for name, value in weights(on_ray[2]).items():
        assert torch.equal(weights(config)[name], value), name
    book.close(entries)
