"""Which frames a worker sees at which step: a pure function of (seed, epoch, step, rank).

Nothing about the order lives in a loader, so the same epoch holds the same samples whatever the number of
workers, and a run that stopped in the middle of an epoch goes on with the batch it would have seen next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from slidr.config import ConfigError
from slidr.shapes import Int64


def epoch_order(frames: int, seed: int, epoch: int) -> Int64[np.ndarray, " N"]:
    """The order in which epoch `epoch` visits the frames: a permutation drawn from (seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(frames)


@dataclass(frozen=True)
class MicroBatch:
    """Frames that go through the networks together, on one worker."""

    epoch: int
    frames: tuple[int, ...]


@dataclass(frozen=True)
class TrainPlan:
    """The training data of one worker.

    A step takes `batch_size` frames over all workers. They are dealt out in `accumulate` rounds: round `a`
    gives each of the `world_size` workers `batch_size / (world_size * accumulate)` neighbouring frames. The
    remainder of an epoch that fills no step is left out, as it would make workers wait for each other for ever.
    """

    frames: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        shares = self.world_size * self.accumulate
        if self.batch_size % shares:
            raise ConfigError(
                f"optim.batch_size: {self.batch_size} frames do not divide into {self.world_size} workers x "
                f"{self.accumulate} micro-batches; use a multiple of {shares}"
            )
        if self.frames < self.batch_size:
            raise ConfigError(
                f"data: the training split has {self.frames} frames, fewer than one step's "
                f"optim.batch_size of {self.batch_size}; lower the batch size or take more frames"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch."""
        return self.frames // self.batch_size

    def micro_batches(self, first_step: int, last_step: int) -> Iterator[MicroBatch]:
        """This worker's micro-batches for the optimizer steps [first_step, last_step), counted over epochs."""
        share = self.batch_size // (self.world_size * self.accumulate)
        order, order_epoch = np.empty(0, np.int64), -1
        for step in range(first_step, last_step):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.frames, self.seed, epoch), epoch
            for turn in range(self.accumulate):
                first = position * self.batch_size + (turn * self.world_size + self.rank) * share
                yield MicroBatch(epoch, tuple(order[first : first + share].tolist()))


def validation_batches(frames: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """This worker's validation batches: the frames in order, cut into batches, dealt out in turn.

    Batches do not depend on the number of workers, so neither does a loss whose negatives come from the batch.
    """
    batches = [
        MicroBatch(0, tuple(range(first, min(first + batch_size, frames)))) for first in range(0, frames, batch_size)
    ]
    return batches[rank::world_size]


def spread(frames: int, at_most: int | None) -> Int64[np.ndarray, " M"]:
    """Indices of at most `at_most` of the frames, evenly spread; all of them for None."""
    if at_most is None or at_most >= frames:
        return np.arange(frames)
    return np.linspace(0, frames - 1, at_most).round().astype(np.int64)
