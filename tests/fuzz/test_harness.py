"""The fuzzing harness sees every way in which a reader can fail, and repeats a case exactly."""

from __future__ import annotations

import random

import pytest
import torch

from . import bad_readers, mutations
from .cases import cases_of, sample, table
from .harness import Case, Outcome, digest
from .inputs import INPUTS
from .sandbox import run_cases


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """How the same cut ends with each of the readers that behave badly."""
    cases = [Case(each.name, "cut", 0) for each in bad_readers.INPUTS] + [Case("regular only", "fifo", 0)]
    store = tmp_path_factory.mktemp("fuzz") / "store"
    outcomes = run_cases(cases, "fuzz.bad_readers", store, deadline_s=4.0, memory_bytes=100_000_000)
    return {f"{case.input}, {case.mutation}": outcome.kind for case, outcome in outcomes.items()}


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        ("good, cut", "refused"),
        ("regular only, cut", "same"),
        ("regular only, fifo", "refused"),
        ("falls back, cut", "fell back"),
        ("as written, cut", "as written"),
        ("wrong, cut", "wrong result"),
        ("foreign, cut", "foreign error"),
        ("nameless, cut", "names no file"),
        ("endless, cut", "hang"),
        ("greedy, cut", "memory"),
        ("dies, cut", "crash"),
    ],
)
def test_every_way_to_end_is_seen(kinds: dict[str, str], case: str, kind: str) -> None:
    assert kinds[case] == kind


@pytest.mark.parametrize("name", list(mutations.BYTES))
def test_a_mutation_is_a_function_of_its_seed_and_changes_the_file(name: str) -> None:
    data = bytes(range(256)) * 4
    first, again, other = (mutations.BYTES[name](data, random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != data
    assert other != data


def test_values_that_differ_in_one_bit_have_other_digests() -> None:
    one, other = torch.zeros(3), torch.zeros(3)
    other[1] = 1e-45
    assert digest({"a": one}) != digest({"a": other})
    assert digest({"a": one}) == digest({"a": one.clone()})
    assert digest([1]) != digest([1.0]) != digest(["1.0"])


def test_a_sample_has_cases_of_every_input() -> None:
    cases = cases_of(INPUTS, {}, each=1)
    assert {case.input for case in sample(INPUTS, cases, 100, seed=3)} == {each.name for each in INPUTS}


def test_no_two_inputs_share_a_name() -> None:
    assert len({each.name for each in INPUTS}) == len(INPUTS)


def test_the_table_counts_how_the_cases_of_an_input_ended() -> None:
    outcomes = {
        Case("a", "flip", 0): Outcome("same"),
        Case("a", "flip", 1): Outcome("refused"),
        Case("a", "cut", 0): Outcome("hang"),
        Case("b", "cut", 0): Outcome("skipped"),
    }
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(outcomes).splitlines()]
    assert lines[2] == ["a", "3", "1", "0", "0", "1", "1"]
    assert lines[3] == ["b", "0", "0", "0", "0", "0", "0"]
    assert lines[4] == ["all", "3", "1", "0", "0", "1", "1"]
