"""Rungs and bounds against plain counting."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slidr.tuning.rungs import bounds, falls_short, rungs

scores = st.floats(0, 1)


def test_rungs_lie_a_factor_apart_and_before_the_last_epoch() -> None:
    assert rungs(10, 3, 100) == [10, 30, 90]
    assert rungs(10, 3, 90) == [10, 30]
    assert rungs(4, 2, 4) == []


@given(earlier=st.lists(scores, min_size=1, max_size=20, unique=True), reduction=st.integers(2, 5))
def test_a_bound_lets_pass_the_best_share_of_those_it_was_made_of(earlier: list[float], reduction: int) -> None:
    made = bounds([((1.0, score),) for score in earlier], grace=1, reduction=reduction, epochs=2)
    passing = [score for score in earlier if not falls_short(1.0, score, made)]
    if len(earlier) < reduction:
        assert passing == earlier
    else:
        assert sorted(passing) == sorted(earlier)[len(earlier) - len(earlier) // reduction :]


@given(st.permutations([0.1, 0.2, 0.3, 0.4, 0.5]))
def test_bounds_do_not_depend_on_the_order_of_earlier_trials(order: list[float]) -> None:
    curves = [((1.0, 0.0), (2.0, score)) for score in order]
    assert bounds(curves, grace=2, reduction=2, epochs=8) == {2: 0.4}


def test_trials_that_ended_before_a_rung_say_nothing_about_it() -> None:
    short, long = ((1.0, 0.9),), ((1.0, 0.1), (2.0, 0.2))
    assert bounds([short, long, long], grace=1, reduction=2, epochs=4) == {1: 0.9, 2: 0.2}


def test_only_a_rungs_own_epoch_and_a_worse_score_end_a_trial() -> None:
    assert falls_short(2, 0.39, {2: 0.4})
    assert falls_short(2, float("nan"), {2: 0.4})
    assert not falls_short(2, 0.4, {2: 0.4})
    assert not falls_short(3, 0.0, {2: 0.4})
