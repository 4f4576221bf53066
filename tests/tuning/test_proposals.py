"""What searchers propose: the whole grid, draws within their ranges, and the same again from the same seed."""

from __future__ import annotations

import itertools
import math

import pytest

from slidr.config import SearcherName, SpaceConfig
from slidr.tuning.jobs import End, Group
from slidr.tuning.proposals import build_proposer

GROUP = Group(0.01, "pretrained")
SPACE = SpaceConfig(lr=(1e-3, 1e-1), head_lr=(1e-2, 10.0), batch_size=(4, 8), epochs=(10, 20, 40))


def drawn(searcher: SearcherName, rounds: list[int], seed: int = 0, group: Group = GROUP) -> list[dict]:
    proposer, found = build_proposer(searcher, SPACE, seed, group), []
    for count in rounds:
        values = proposer.propose(count)
        # Best at lr 0.01 exactly.
        proposer.tell([End("finished", 1 / (1 + abs(math.log10(v["lr"]) + 2))) for v in values])
        found += [dict(v) for v in values]
    return found


def test_a_grid_is_every_combination_once_in_order() -> None:
    proposer = build_proposer("grid", SPACE, 0, GROUP)
    found = [dict(v) for _ in range(5) for v in proposer.propose(5)]
    expected = itertools.product(SPACE.lr, SPACE.head_lr, SPACE.batch_size, SPACE.epochs)
    assert [tuple(v.values()) for v in found] == list(expected)
    assert proposer.total == len(found) == 24


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_draws_stay_in_their_ranges_and_lists(searcher: SearcherName) -> None:
    for values in drawn(searcher, [10, 10]):
        assert 1e-3 <= values["lr"] <= 1e-1
        assert 1e-2 <= values["head_lr"] <= 10
        assert values["batch_size"] in (4, 8)
        assert values["epochs"] in (10, 20, 40)
        assert "weight_decay" not in values


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_the_same_seed_and_group_propose_the_same_and_others_do_not(searcher: SearcherName) -> None:
    first = drawn(searcher, [4, 4, 4])
    assert first == drawn(searcher, [4, 4, 4])
    assert first != drawn(searcher, [4, 4, 4], seed=1)
    assert first != drawn(searcher, [4, 4, 4], group=Group(0.05, "pretrained"))


def test_random_draws_are_log_uniform_and_do_not_depend_on_the_rounds() -> None:
    values = drawn("random", [400])
    assert values == drawn("random", [7, 393])
    below = sum(v["lr"] < 1e-2 for v in values)
    assert 150 < below < 250  # half the decades; five standard deviations are 50


@pytest.mark.parametrize("failed", [0, 1])
def test_tpe_learns_from_the_first_round_on_though_a_trial_of_it_failed(failed: int) -> None:
    def second_round(scores: list[float]) -> list[dict]:
        proposer = build_proposer("tpe", SPACE, 0, GROUP)
        proposer.propose(4 + failed)
        proposer.tell([End("finished", score) for score in scores] + failed * [End("failed", reason="nan")])
        return [dict(v) for v in proposer.propose(4)]

    assert second_round([0.9, 0.1, 0.1, 0.1]) != second_round([0.1, 0.1, 0.1, 0.9])


def test_tpe_learns_from_what_it_is_told() -> None:
    late = drawn("tpe", [5] * 8)[20:]
    distance = [abs(math.log10(v["lr"]) + 2) for v in late]
    assert sum(distance) / len(distance) < 0.5  # uniform draws are 0.5 away on average
    tuned = build_proposer("tpe", SPACE, 0, GROUP)
    tuned.propose(3)
    tuned.tell([End("failed", reason="nan"), End("pruned", 0.1, curve=((1, 0.1),)), End("finished", 0.2)])
    assert len(tuned.propose(2)) == 2
