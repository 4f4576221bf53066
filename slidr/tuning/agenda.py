"""What is to be run next. The order in which jobs end is of no consequence, only how they end.

A group proposes its trials in rounds. Within a round they are independent; the next round is proposed when the last
trial of this one has ended, from their results in the order of their numbers. Restarting is replay: jobs whose end is
on record are not run again, and what follows from them follows again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from slidr.config import TuneConfig
from slidr.tuning.jobs import End, Group, Job
from slidr.tuning.proposals import Proposer, build_proposer
from slidr.tuning.rungs import bounds

Recorded = Callable[[Job], End | None]


class Agenda(Protocol):
    """Jobs for an executor. A job that was given out comes back by `end`, or by `lose` where no end was found."""

    def next(self) -> Job | None:
        """A job to start, or None while there is none to start before others have ended."""

    def end(self, job: Job, end: End) -> None:
        """The job has ended."""

    def lose(self, job: Job, reason: str) -> None:
        """The job has no end, as where its machine died; what depends on it is not started."""

    @property
    def exhausted(self) -> bool:
        """Whether `next` will never give a job again."""


class ListAgenda:
    """Jobs that do not depend on each other."""

    def __init__(self, jobs: Iterable[Job], recorded: Recorded) -> None:
        self.ends: dict[Job, End] = {}
        self.lost: dict[Job, str] = {}
        self._left: list[Job] = []
        for job in jobs:
            known = recorded(job)
            if known is None:
                self._left.append(job)
            else:
                self.ends[job] = known

    def next(self) -> Job | None:
        return self._left.pop(0) if self._left else None

    def end(self, job: Job, end: End) -> None:
        self.ends[job] = end

    def lose(self, job: Job, reason: str) -> None:
        self.lost[job] = reason

    @property
    def exhausted(self) -> bool:
        return not self._left


class SearchAgenda:
    """All groups' trials. `epochs_of` says how many epochs a trial of a group with these values has."""

    def __init__(
        self,
        groups: Sequence[Group],
        tune: TuneConfig,
        seed: int,
        recorded: Recorded,
        epochs_of: Callable[[Job], int],
    ) -> None:
        self._tune, self._recorded, self._epochs_of = tune, recorded, epochs_of
        self._groups: dict[Group, _Progress] = {}
        for group in groups:
            space = tune.pretrained if group.method == "pretrained" else tune.random
            proposer = build_proposer(tune.searcher, space, seed, group)
            total = proposer.total if proposer.total is not None else tune.trials
            assert total is not None, "the config says how many"
            self._groups[group] = _Progress(proposer, total)
            self._advance(group)

    @property
    def ends(self) -> dict[Job, End]:
        """All ended trials, group after group, by number."""
        return {
            job: end
            for progress in self._groups.values()
            for job, end in sorted(progress.ends.items(), key=lambda item: item[0].index)
        }

    @property
    def lost(self) -> dict[Job, str]:
        """The trials that were lost, and how."""
        return {job: reason for progress in self._groups.values() for job, reason in progress.lost.items()}

    def total(self, group: Group) -> int:
        """How many trials a group has."""
        return self._groups[group].total

    def next(self) -> Job | None:
        # The group that is furthest behind first: all groups' rounds then end while others have work left.
        waiting = [progress for progress in self._groups.values() if progress.left]
        return min(waiting, key=lambda progress: progress.left[0].index).left.pop(0) if waiting else None

    def end(self, job: Job, end: End) -> None:
        self._groups[job.group].ends[job] = end
        self._advance(job.group)

    def lose(self, job: Job, reason: str) -> None:
        self._groups[job.group].lost[job] = reason

    @property
    def exhausted(self) -> bool:
        return all(progress.stuck or progress.complete for progress in self._groups.values())

    def _advance(self, group: Group) -> None:
        """Proposes rounds until one has a trial that is not on record."""
        progress = self._groups[group]
        while not progress.left and all(job in progress.ends for job in progress.round) and not progress.complete:
            if progress.round:
                progress.proposer.tell([progress.ends[job] for job in progress.round])
            progress.round = self._round(group, progress)
            for job in progress.round:
                known = self._recorded(job)
                if known is None:
                    progress.left.append(job)
                else:
                    progress.ends[job] = known

    def _round(self, group: Group, progress: _Progress) -> list[Job]:
        tune, first = self._tune, len(progress.ends)
        jobs: list[Job] = []
        curves = [end.curve for end in progress.ends.values() if end.status != "failed"]
        for values in progress.proposer.propose(min(tune.round_size, progress.total - first)):
            job = Job(group, "trial", first + len(jobs), values, round=first // tune.round_size)
            least = {}
            if tune.pruner == "asha":
                least = bounds(curves, tune.grace_epochs, tune.reduction, self._epochs_of(job))
            jobs.append(Job(group, "trial", job.index, values, job.round, least))
        return jobs


@dataclass
class _Progress:
    """How far a group is."""

    proposer: Proposer
    total: int
    round: list[Job] = field(default_factory=list)  # the newest
    left: list[Job] = field(default_factory=list)  # of it, not given out yet
    ends: dict[Job, End] = field(default_factory=dict)
    lost: dict[Job, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.ends) == self.total

    @property
    def stuck(self) -> bool:
        """Lost trials keep the next round from being proposed."""
        return not self.left and len(self.lost) > 0


def run_here(agenda: Agenda, run: Callable[[Job], End]) -> None:
    """Runs an agenda in this process, one job at a time."""
    while (job := agenda.next()) is not None:
        agenda.end(job, run(job))
