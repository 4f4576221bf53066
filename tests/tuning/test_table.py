"""Winners, finals, intervals and the page, against values worked out elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from slidr.config import Config, RunConfig, TuneConfig
from slidr.report.tuning import confusion_chart, course_chart, fractions_chart, rates_chart
from slidr.tuning.jobs import End, Group, Job, end_from_json, end_to_json
from slidr.tuning.table import finals, interval, markdown, rows, table, winner

GROUP = Group(0.01, "pretrained")
CONFIG = Config(run=RunConfig(seed=3), tune=TuneConfig(fractions=(0.01,), seeds=2))


def trial(index: int, group: Group = GROUP) -> Job:
    return Job(group, "trial", index, {"lr": 0.01 * (index + 1)})


ENDS = {
    trial(0): End("finished", 0.3, curve=((1, 0.2), (2, 0.3)), steps=8),
    trial(1): End("pruned", 0.9, "epoch 1: 0.9 < 0.95"),
    trial(2): End("finished", 0.5),
    trial(3): End("finished", 0.5),
    trial(4): End("failed", reason="the loss is nan"),
    trial(0, Group(0.01, "random")): End("failed", reason="the loss is inf"),
}


def test_the_winner_is_the_first_of_the_best_finished_trials() -> None:
    assert winner(GROUP, ENDS) == trial(2)
    assert winner(Group(0.01, "random"), ENDS) is None


def test_finals_repeat_the_winners_values_with_seeds_no_trial_had() -> None:
    last = finals(CONFIG, ENDS)
    assert [(job.group, job.kind, job.index, dict(job.values)) for job in last] == [
        (GROUP, "final", 0, {"lr": 0.03}),
        (GROUP, "final", 1, {"lr": 0.03}),
    ]
    found = rows(CONFIG, {**ENDS, **{job: End("finished", 0.6) for job in last}})
    assert [row["seed"] for row in found if row["kind"] == "final"] == [4, 5]
    assert {row["seed"] for row in found if row["kind"] == "trial"} == {3}


def test_another_winners_finals_are_other_runs() -> None:
    grown = {**ENDS, trial(5): End("finished", 0.8)}
    before, after = finals(CONFIG, ENDS), finals(CONFIG, grown)
    assert {dict(job.values)["lr"] for job in after} == {0.06}
    assert {job.name for job in before}.isdisjoint(job.name for job in after)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=9).filter(lambda values: np.std(values) > 1e-6))
def test_the_interval_is_students(values: list[float]) -> None:
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert mean is not None
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((low, high), abs=1e-9)


def test_too_few_values_have_no_interval() -> None:
    assert interval([]) == (None, None)
    assert interval([0.5]) == (0.5, None)


def test_the_page_shows_means_choices_and_what_went_wrong() -> None:
    first, second = finals(CONFIG, ENDS)
    entries = table(CONFIG, {**ENDS, first: End("finished", 0.6), second: End("failed", reason="no disk")})
    page = markdown(entries, CONFIG)
    assert "| pretrained | 60.0 |" in page
    assert "| random | – |" in page
    assert "| 1 % | pretrained | lr 0.03 | 50.0 | 3, 1, 1 | 60.0 |" in page
    assert "1 %, random: no trial finished (1 x the loss is inf)." in page
    assert "1 %, pretrained: a final failed (no disk)." in page


@given(score=st.floats(0, 1), value=st.floats(1e-9, 1e9), bound=st.floats(0, 1))
def test_jobs_and_ends_survive_json_exactly(score: float, value: float, bound: float) -> None:
    job = Job(GROUP, "trial", 3, {"lr": value, "batch_size": 4}, 1, {10: bound})
    assert Job.from_json(job.to_json()) == job
    end = End("finished", score, curve=((1.0, bound), (2.0, score)), steps=7, seconds=1.5)
    assert end_from_json(end_to_json(end)) == end


def test_pictures_show_finished_pruned_and_failed_trials() -> None:
    found, entries = rows(CONFIG, ENDS), table(CONFIG, ENDS)
    pictures = [
        rates_chart(found, "verify"),
        fractions_chart(entries, "val"),
        confusion_chart([[0, 0, 0], [0, 5, 1], [0, 0, 0]], ("ignored", "car", "road"), "title"),
        course_chart({1: {"loss": 2.0, "lr": 0.1}, 2: {"val_miou": 0.1}}, "title"),
    ]
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
    without_failures = {job: end for job, end in ENDS.items() if end.status != "failed"}
    assert rates_chart(rows(CONFIG, without_failures), "verify") != pictures[0]
