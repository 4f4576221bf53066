"""Which cases are run, and what is told of how they ended."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence

from .harness import GOOD, Case, Input, Outcome
from .mutations import BYTES, PLACES


def cases_of(inputs: Iterable[Input], weights: Mapping[str, int], each: int) -> list[Case]:
    """The seeded cases of every input and mutation: as many of a mutation as `weights` says, else `each`."""
    return [
        Case(one.name, mutation, seed)
        for one in inputs
        for mutation in one.mutations
        for seed in range(1 if one.slow else weights.get(mutation, each))
    ]


def sample(inputs: Sequence[Input], cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """`count` of the cases: one of every mutation that any file may suffer, the rest dealt out over the inputs.

    Of an input, different mutations come first; of a slow one, one case at most is dealt.
    """
    rng = random.Random(seed)
    own: dict[str, list[Case]] = {}
    for one in inputs:
        mixed = [case for case in cases if case.input == one.name]
        rng.shuffle(mixed)
        turns: dict[str, int] = {}
        turn_of = {case: _count(turns, case.mutation) for case in mixed}
        own[one.name] = sorted(mixed, key=lambda case: turn_of[case])[: 1 if one.slow else None]
    quick = [case for one in inputs if not one.slow for case in own[one.name]]
    general = [rng.choice([case for case in quick if case.mutation == name]) for name in (*BYTES, *PLACES)]
    dealt = [mixed[turn] for turn in range(count) for mixed in own.values() if turn < len(mixed)]
    return sorted(list(dict.fromkeys([*general, *dealt]))[:count])


def _count(turns: dict[str, int], mutation: str) -> int:
    """How often a mutation came before."""
    turns[mutation] = turns.get(mutation, -1) + 1
    return turns[mutation]


def table(outcomes: Mapping[Case, Outcome]) -> str:
    """How often the cases of each input ended how, as Markdown that reads well as it is."""
    head = ("input", "cases", "same result", "as written", "fell back", "named error", "failed")
    rows = [head]
    names = sorted({case.input for case in outcomes})
    for name in [*names, "all"]:
        own = [o.kind for c, o in outcomes.items() if name in (c.input, "all") and o.kind != "skipped"]
        counts = [own.count(kind) for kind in GOOD]
        rows.append((name, str(len(own)), *map(str, counts), str(len(own) - sum(counts))))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    rows.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def failures(outcomes: Mapping[Case, Outcome]) -> list[str]:
    """A line for each case that ended ill: what happened, and how to repeat it."""
    return [
        f"{outcome.kind}: {outcome.detail} {outcome.where}\n    {case}"
        for case, outcome in sorted(outcomes.items())
        if not outcome.good
    ]
