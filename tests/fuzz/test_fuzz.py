"""Whatever happens to a file that the product reads, it ends in a named error or in the right result.

`make test` runs a sample, `make chaos` all cases, and prints their table at its end (see `conftest`). A failure prints
the line that repeats it alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import cases_of, failures, sample
from .harness import Case, Outcome
from .inputs import INPUTS
from .mutations import BYTES, PLACES
from .sandbox import run_cases

MODULE = "fuzz.inputs"
# What hangs, links and fills disks is the same each time; bits and bytes differ.
OFTEN = {"flip": 10, "scramble": 6, "cut": 6}
RARELY = {
    "empty": 1,
    "fifo": 1,
    "directory": 2,
    "link loop": 2,
    "broken link": 1,
    "sparse": 2,
    "another of its kind": 1,
}
ALL = cases_of(INPUTS, OFTEN | RARELY | {"another kind": 3}, each=2)
SAMPLE = sample(INPUTS, ALL, 200, seed=14)


def test_a_sample_of_damaged_inputs_ends_in_a_named_error_or_the_right_result(tmp_path: Path) -> None:
    _require_good(run_cases(SAMPLE, MODULE, tmp_path / "store"))


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_every_damaged_input_ends_in_a_named_error_or_the_right_result(
    tmp_path: Path, fuzz_outcomes: dict[Case, Outcome]
) -> None:
    assert len(ALL) >= 3000
    fuzz_outcomes |= run_cases(ALL, MODULE, tmp_path / "store")
    _require_good(fuzz_outcomes)


def test_every_kind_of_input_and_every_kind_of_damage_is_in_the_sample() -> None:
    assert {case.input for case in SAMPLE} == {each.name for each in INPUTS}
    assert {case.mutation for case in SAMPLE} >= {*BYTES, *PLACES, "null", "missing key", "not finite", "huge number"}
    assert len(SAMPLE) == 200


def _require_good(outcomes: dict[Case, Outcome]) -> None:
    lines = failures(outcomes)
    assert not lines, f"{len(lines)} of {len(outcomes)} cases ended ill:\n" + "\n".join(lines[:40])
