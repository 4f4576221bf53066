"""Which values to try: grids, random search and TPE, each a pure function of the seed and of what it was told.

Optuna's door.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from slidr.config import SearcherName, SpaceConfig
from slidr.tuning.jobs import End, Group, Values

_CATEGORIES = ("batch_size", "epochs")  # drawn from a list; the rest between two values, log-uniformly


class Proposer(Protocol):
    """Proposes the trials of one group, round after round."""

    total: int | None  # how many there are; None: as many as asked for

    def propose(self, count: int) -> list[Values]:
        """The next round's values."""

    def tell(self, ends: Sequence[End]) -> None:
        """How the trials of the last round ended, in their order."""


def build_proposer(searcher: SearcherName, space: SpaceConfig, seed: int, group: Group) -> Proposer:
    """The configured searcher; groups draw independently of each other and of which others there are."""
    return PROPOSERS[searcher](space, _seed_of(seed, group))


class Grid:
    """Every combination of the listed values, the last key fastest. It learns nothing and needs no seed."""

    def __init__(self, space: SpaceConfig, seed: int) -> None:
        lists = _searched(space)
        rows = itertools.product(*lists.values())
        self._left = [dict(zip(lists, row, strict=True)) for row in rows]
        self.total: int | None = len(self._left)

    def propose(self, count: int) -> list[Values]:
        proposed, self._left = self._left[:count], self._left[count:]
        return list(proposed)

    def tell(self, ends: Sequence[End]) -> None:
        pass


class Random:
    """Independent draws; the n-th trial is the same whatever the size of a round."""

    total: int | None = None

    def __init__(self, space: SpaceConfig, seed: int) -> None:
        self._lists, self._rng = _searched(space), np.random.default_rng(seed)

    def propose(self, count: int) -> list[Values]:
        return [{name: self._draw(name, values) for name, values in self._lists.items()} for _ in range(count)]

    def tell(self, ends: Sequence[End]) -> None:
        pass

    def _draw(self, name: str, values: Sequence[float]) -> float | int:
        if name in _CATEGORIES:
            return values[int(self._rng.integers(len(values)))]
        return _rounded(math.exp(self._rng.uniform(math.log(values[0]), math.log(values[-1]))))


class Tpe:
    """Optuna's tree-structured Parzen estimator, asked for a round at a time and told of it in the trials' order.

    The first round is drawn at random, and so is what follows while every trial failed.
    """

    total: int | None = None

    def __init__(self, space: SpaceConfig, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._lists = _searched(space)
        # A round is asked for before any of it is told: the first has nothing to learn from, every later one has.
        sampler = optuna.samplers.TPESampler(
            seed=seed % 2**32, n_startup_trials=1, multivariate=True, constant_liar=True
        )
        self._study = optuna.create_study(direction="maximize", sampler=sampler)
        self._asked: list[Any] = []

    def propose(self, count: int) -> list[Values]:
        self._asked = [self._study.ask() for _ in range(count)]
        return [
            {name: self._suggest(trial, name, values) for name, values in self._lists.items()} for trial in self._asked
        ]

    def tell(self, ends: Sequence[End]) -> None:
        from optuna.trial import TrialState

        for trial, end in zip(self._asked, ends, strict=True):
            if end.status == "failed":
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            for epoch, score in end.curve:
                trial.report(score, round(epoch))
            if end.status == "pruned":
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                self._study.tell(trial, end.score)

    def _suggest(self, trial: Any, name: str, values: Sequence[float]) -> float | int:
        if name in _CATEGORIES:
            return trial.suggest_categorical(name, list(values))
        return _rounded(trial.suggest_float(name, values[0], values[-1], log=True))


PROPOSERS: dict[SearcherName, Callable[[SpaceConfig, int], Proposer]] = {"grid": Grid, "random": Random, "tpe": Tpe}


def _searched(space: SpaceConfig) -> dict[str, Sequence[Any]]:
    return {name: values for name, values in dataclasses.asdict(space).items() if len(values) > 0}


def _rounded(value: float) -> float:
    """Four digits: what a table shows is what was tried."""
    return float(f"{value:.4g}")


def _seed_of(seed: int, group: Group) -> int:
    digest = hashlib.sha256(f"{seed} {group.name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
