"""Early ends, asynchronous successive halving (ASHA) by epoch, made independent of timing.

Li et al., "A System for Massively Parallel Hyperparameter Tuning", MLSys 2020. There a trial at a rung is compared with
whatever happened to be there before it; here with what the trials of earlier rounds reached there, which are over when
it starts. So its bounds are known at its start, and the same search prunes the same trials however often it was
interrupted and however many ran at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Curve = Sequence[tuple[float, float]]  # (epoch, score)


def rungs(grace: int, reduction: int, epochs: int) -> list[int]:
    """Epochs at which trials are compared: grace, grace x reduction, ... short of the last."""
    found = []
    epoch = grace
    while epoch < epochs:
        found.append(epoch)
        epoch *= reduction
    return found


def bounds(earlier: Sequence[Curve], grace: int, reduction: int, epochs: int) -> dict[int, float]:
    """For each rung the least score to go on with: the worst of the best 1/reduction of what `earlier` reached there.

    A rung that fewer than `reduction` of them reached has none.
    """
    found = {}
    for rung in rungs(grace, reduction, epochs):
        scores = sorted((score for curve in earlier for epoch, score in curve if epoch == rung), reverse=True)
        if len(scores) >= reduction:
            found[rung] = scores[len(scores) // reduction - 1]
    return found


def falls_short(epoch: float, score: float, bounds: Mapping[int, float]) -> bool:
    """Whether a trial with this score after this epoch is to end."""
    return epoch in bounds and not score >= bounds[int(epoch)]
