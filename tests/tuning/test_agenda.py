"""Searches of a made-up objective: whatever is interrupted, and in whatever order jobs end, they find the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slidr.config import SpaceConfig, TuneConfig
from slidr.tuning.agenda import ListAgenda, SearchAgenda, run_here
from slidr.tuning.jobs import End, Group, Job
from slidr.tuning.rungs import falls_short

EPOCHS = 9
GROUPS = [Group(fraction, method) for fraction in (0.1, 1.0) for method in ("pretrained", "random")]
RANGES = SpaceConfig(lr=(1e-3, 1e-1))
LISTS = SpaceConfig(lr=(1e-3, 1e-2, 3e-2, 1e-1), head_lr=(0.1, 1.0))
BASE = TuneConfig(trials=8, round_size=3, pretrained=RANGES, random=RANGES, grace_epochs=1, reduction=2)
KINDS = {
    "grid": replace(BASE, searcher="grid", trials=None, pretrained=LISTS, random=LISTS),
    "random": BASE,
    "random, asha": replace(BASE, pruner="asha"),
    "tpe, asha": replace(BASE, searcher="tpe", pruner="asha"),
}


def train(job: Job) -> End:
    """Scores that rise with the epochs, best at lr 0.01; rates above 0.08 diverge."""
    lr, curve = job.values["lr"], []
    if lr > 0.08:
        return End("failed", reason="the loss is nan")
    for epoch in range(1, EPOCHS + 1):
        score = epoch / EPOCHS / (1 + abs(math.log10(lr) + 2)) * job.group.fraction
        curve.append((float(epoch), score))
        if falls_short(epoch, score, job.bounds):
            return End("pruned", score, curve=tuple(curve))
    return End("finished", score, curve=tuple(curve))


def agenda_of(tune: TuneConfig, recorded: Callable[[Job], End | None]) -> SearchAgenda:
    return SearchAgenda(GROUPS, tune, 0, recorded, lambda job: EPOCHS)


def undisturbed(tune: TuneConfig) -> dict[Job, End]:
    agenda = agenda_of(tune, lambda job: None)
    run_here(agenda, train)
    assert agenda.exhausted
    return agenda.ends


def interrupted(tune: TuneConfig, rng: np.random.Generator, kills: int, at_once: int) -> tuple[dict[Job, End], int]:
    """Ends in random order, several jobs running; killed at random moments, then started again from the records."""
    records: dict[tuple[Group, int], End] = {}
    trained = 0
    for life in range(kills + 1):
        agenda = agenda_of(tune, lambda job: records.get((job.group, job.index)))
        running: list[Job] = []
        left = int(rng.integers(0, 12)) if life < kills else 10**9  # jobs that end before the kill
        while left > 0:
            while len(running) < at_once and (job := agenda.next()) is not None:
                running.append(job)
            if not running:
                break
            job = running.pop(int(rng.integers(len(running))))
            end = records[job.group, job.index] = train(job)
            trained, left = trained + 1, left - 1
            agenda.end(job, end)
    assert agenda.exhausted
    return agenda.ends, trained


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32 - 1), kills=st.integers(0, 4), at_once=st.integers(1, 7))
def test_kills_and_arrival_order_change_nothing_and_no_ended_trial_is_run_again(
    kind: str, seed: int, kills: int, at_once: int
) -> None:
    expected = undisturbed(KINDS[kind])
    found, trained = interrupted(KINDS[kind], np.random.default_rng(seed), kills, at_once)
    assert found == expected
    assert trained == len(expected) == 4 * 8


def test_the_cases_above_prune_finish_and_fail() -> None:
    statuses = {end.status for end in undisturbed(KINDS["tpe, asha"]).values()}
    assert statuses == {"finished", "pruned", "failed"}


def test_every_round_is_compared_with_earlier_rounds_only() -> None:
    ends = undisturbed(KINDS["random, asha"])
    for job in ends:
        earlier = [e.curve for j, e in ends.items() if j.group == job.group and j.round < job.round]
        at_first_rung = sorted((curve[0][1] for curve in earlier if curve), reverse=True)
        if len(at_first_rung) >= 2:
            assert job.bounds[1] == at_first_rung[len(at_first_rung) // 2 - 1]
        else:
            assert 1 not in job.bounds


@pytest.mark.parametrize("kind", ["random", "random, asha", "tpe, asha"])
@pytest.mark.parametrize("few", [2, 8])  # within the first round, and within the third
def test_more_trials_or_fractions_leave_the_earlier_ones_as_they_were(kind: str, few: int) -> None:
    tune = KINDS[kind]
    fewer, more = undisturbed(replace(tune, trials=few)), undisturbed(replace(tune, trials=11))
    assert len(fewer) == 4 * few
    assert {job: end for job, end in more.items() if job.index < few} == fewer
    one = SearchAgenda(GROUPS[:2], tune, 0, lambda job: None, lambda job: EPOCHS)
    run_here(one, train)
    both = undisturbed(tune)
    assert {job: end for job, end in both.items() if job.group in GROUPS[:2]} == one.ends


def test_a_lost_trial_stops_its_group_only_and_is_given_out_again_next_time() -> None:
    agenda = agenda_of(BASE, lambda job: None)
    while (job := agenda.next()) is not None:
        if (job.group, job.index) == (GROUPS[0], 1):
            agenda.lose(job, "its machine died")
        else:
            agenda.end(job, train(job))
    assert agenda.exhausted
    assert [(job.group, job.index) for job in agenda.lost] == [(GROUPS[0], 1)]
    counts = [sum(job.group == group for job in agenda.ends) for group in GROUPS]
    assert counts == [2, 8, 8, 8]
    again = agenda_of(BASE, lambda job: agenda.ends.get(job))
    run_here(again, train)
    assert again.ends == undisturbed(BASE)


def test_a_list_gives_out_what_is_not_on_record_once() -> None:
    jobs = [Job(GROUPS[0], "final", index, {"lr": 0.01}) for index in range(3)]
    known = End("finished", 0.5)
    agenda = ListAgenda(jobs, lambda job: known if job.index == 1 else None)
    run_here(agenda, train)
    assert agenda.exhausted
    assert agenda.ends[jobs[1]] is known
    assert set(agenda.ends) == set(jobs)
