"""From a config to batches: which frames a run uses, how one becomes a sample, and a loader without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, Literal, Protocol

from slidr.config import Config, DatasetName
from slidr.data.collate import collate_pairs, collate_scans
from slidr.data.frames import FrameTable, open_table
from slidr.data.plan import MicroBatch, TrainPlan, spread, validation_batches
from slidr.data.samples import no_labels, pair_sample, scan_sample
from slidr.types import PairBatch, PairSample, ScanBatch, ScanSample

Subset = Literal["train", "val", "score"]
_BATCHES_AHEAD = 2  # of a loader with threads


class Source(Protocol):
    """A run's data: its subsets, their samples, and how samples make a batch. Picklable and small."""

    @property
    def config(self) -> Config:
        """The run's configuration."""

    @property
    def sample_type(self) -> type:
        """What `sample` returns."""

    def count(self, subset: Subset) -> int:
        """Frames in a subset."""

    def sample(self, subset: Subset, index: int, epoch: int) -> Any:
        """Sample `index` of a subset; a training sample depends on the epoch, others do not."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """Samples as one batch."""


@dataclass(frozen=True)
class PairSource:
    """Point-pixel pairs for distillation."""

    config: Config
    labels_folder: str  # the superpixel maps
    sample_type = PairSample

    def count(self, subset: Subset) -> int:
        return len(subset_frames(self.config, subset))

    def sample(self, subset: Subset, index: int, epoch: int) -> PairSample:
        frames = subset_frames(self.config, subset)
        return pair_sample(
            frames[index],
            replace(self.config.data, allow_missing=frames.allow_missing),  # as the table was made
            self.labels_folder,
            student=self.config.student.name,
            seed=self.config.run.seed,
            epoch=epoch,
            training=subset == "train",
        )

    def collate(self, samples: Sequence[PairSample]) -> PairBatch:
        return collate_pairs(list(samples))


@dataclass(frozen=True)
class ScanSource:
    """Labelled sweeps for segmentation.

    With several `votes`, each held-out frame is that many samples in a row: itself, then copies turned and flipped at
    random (drawn from seed, vote and token), for predictions that are averaged. Not `labelled`, as in a test split,
    every label is 0.
    """

    config: Config
    votes: int = 1
    labelled: bool = True
    sample_type = ScanSample

    def count(self, subset: Subset) -> int:
        return len(subset_frames(self.config, subset)) * self._samples_per_frame(subset)

    def sample(self, subset: Subset, index: int, epoch: int) -> ScanSample:
        data, training = self.config.data, subset == "train"
        frame, vote = divmod(index, self._samples_per_frame(subset))
        if not training and vote > 0:
            augment = replace(data.augment, rotate=True, flip_axes=True, scale=(1.0, 1.0))
            data, training, epoch = replace(data, augment=augment), True, vote
        return scan_sample(
            subset_frames(self.config, subset)[frame],
            data,
            student=self.config.student.name,
            seed=self.config.run.seed,
            epoch=epoch,
            training=training,
            labelled=self.labelled,
        )

    def collate(self, samples: Sequence[ScanSample]) -> ScanBatch:
        return collate_scans(list(samples))

    def _samples_per_frame(self, subset: Subset) -> int:
        return 1 if subset == "train" else self.votes


@lru_cache(maxsize=8)
def _frames(path: str, dataset: DatasetName, split: str, fraction: float, limit: int | None) -> FrameTable:
    table = open_table(path, dataset).select(split, fraction)
    return table.take(spread(len(table), limit))


def subset_frames(config: Config, subset: Subset) -> FrameTable:
    """The frames of a subset: "train", "val" (for validation losses) or "score" (for the last scores)."""
    data = config.data
    if subset == "train":
        return _frames(data.frames, data.dataset, data.train_split, data.train_fraction, None)
    limit = data.max_val_frames if subset == "val" else config.run.score_frames
    return _frames(data.frames, data.dataset, data.val_split, 1.0, limit)


def require_labels(config: Config) -> None:
    """Raises `DataError` where a frame to train or validate on has no point labels, naming the first one.

    Known from the frame table, before training: validation would find out after the first epoch.
    """
    splits: dict[Subset, str] = {"train": config.data.train_split, "val": config.data.val_split}
    for subset, split in splits.items():
        frames = subset_frames(config, subset)
        without = [row for row, path in enumerate(frames.label_paths) if path is None]
        if without:
            raise no_labels(frames[without[0]], config.data, f" ({len(without)} of {len(frames)} frames of {split})")


def train_plan(source: Source, rank: int = 0, world_size: int = 1) -> TrainPlan:
    """The order in which one worker takes the training subset."""
    optim, seed = source.config.optim, source.config.run.seed
    return TrainPlan(source.count("train"), optim.batch_size, seed, rank, world_size, optim.accumulate)


def held_out_batches(source: Source, subset: Subset, rank: int = 0, world_size: int = 1) -> list[MicroBatch]:
    """One worker's batches of a held-out subset; their size does not depend on the number of workers."""
    return validation_batches(source.count(subset), source.config.data.val_batch_size, rank, world_size)


class LocalLoader:
    """Loads in the calling process: for tests, notebooks and light trials.

    With `threads`, so many of them make the samples of the next batches while the caller uses one: for a GPU, which
    leaves its process idle. The batches are the same ones either way.
    """

    def __init__(self, source: Source, rank: int = 0, world_size: int = 1, threads: int = 0) -> None:
        self.source = source
        self.plan = train_plan(source, rank, world_size)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self._place = (rank, world_size)
        self._threads = threads

    def train(self, first_step: int, last_step: int) -> Iterator[Any]:
        return self._load("train", self.plan.micro_batches(first_step, last_step))

    def validation(self) -> Iterator[Any]:
        return self.held_out("val")

    def held_out(self, subset: Subset) -> Iterator[Any]:
        return self._load(subset, held_out_batches(self.source, subset, *self._place))

    def _load(self, subset: Subset, batches: Iterable[MicroBatch]) -> Iterator[Any]:
        if self._threads == 0:
            for batch in batches:
                yield self.source.collate([self.source.sample(subset, i, batch.epoch) for i in batch.frames])
            return
        with ThreadPoolExecutor(self._threads) as pool:
            ahead: deque[list[Future[Any]]] = deque()
            try:
                for batch in batches:
                    ahead.append([pool.submit(self.source.sample, subset, i, batch.epoch) for i in batch.frames])
                    if len(ahead) > _BATCHES_AHEAD:
                        yield self.source.collate([sample.result() for sample in ahead.popleft()])
                while ahead:
                    yield self.source.collate([sample.result() for sample in ahead.popleft()])
            finally:  # also where the caller stops early, or a sample cannot be made
                for sample in chain.from_iterable(ahead):
                    sample.cancel()
