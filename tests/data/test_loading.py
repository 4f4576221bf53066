"""The loader of the calling process: with threads it gives what it gives without, and stops when it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from slidr.config import Config, DataConfig, OptimConfig
from slidr.data.loading import LocalLoader, Subset


@dataclass
class Numbers:
    """A source of ten samples, of which later ones are ready sooner; it counts the threads that it meets."""

    sample_type = tuple
    broken: int | None = None
    config: Config = field(
        default_factory=lambda: Config(data=DataConfig(val_batch_size=3), optim=OptimConfig(batch_size=2))
    )
    asked: list[int] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def count(self, subset: Subset) -> int:
        return 10

    def sample(self, subset: Subset, index: int, epoch: int) -> Any:
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.broken:
            raise ValueError(f"frame {index} is broken")
        time.sleep((10 - index) * 1e-3)
        return (subset, index, epoch)

    def collate(self, samples: Sequence[Any]) -> Any:
        return list(samples)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_batch(threads: int) -> None:
    ahead, plain = Numbers(), Numbers()
    fast, slow = LocalLoader(ahead, threads=threads), LocalLoader(plain)
    assert list(fast.train(3, 12)) == list(slow.train(3, 12))
    assert list(fast.validation()) == list(slow.validation())
    assert plain.threads == {threading.current_thread().name}
    assert 1 <= len(ahead.threads - plain.threads) == len(ahead.threads)


def test_one_who_stops_early_waits_for_no_more_than_was_begun() -> None:
    source = Numbers()
    batches = LocalLoader(source, threads=1).train(0, 5)
    next(batches)
    batches.close()
    assert len(source.asked) < 10
    assert not [thread for thread in threading.enumerate() if thread.name in source.threads]


def test_a_sample_that_cannot_be_made_is_an_error_where_its_batch_is_asked_for() -> None:
    broken = LocalLoader(Numbers(broken=4), threads=2).validation()
    assert next(broken) == [("val", 0, 0), ("val", 1, 0), ("val", 2, 0)]
    with pytest.raises(ValueError, match="frame 4 is broken"):
        next(broken)
