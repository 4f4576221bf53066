"""Schedules against PyTorch's own schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from slidr.config import OptimConfig
from slidr.training.optim import build_optimizer, learning_rate_factor, set_learning_rate, total_steps


def _twin(lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def test_cosine_equals_pytorchs_stepped_once_an_epoch() -> None:
    config = OptimConfig(lr=0.5, schedule="cosine", epochs=7)
    twin = _twin(0.5)
    scheduler = lr_scheduler.CosineAnnealingLR(twin, T_max=7)
    for step in range(7 * 3):
        expected = twin.param_groups[0]["lr"]
        assert 0.5 * learning_rate_factor(config, step, 3, 21) == pytest.approx(expected, abs=1e-12)
        if step % 3 == 2:
            twin.step()
            scheduler.step()


def test_one_cycle_equals_pytorchs() -> None:
    config = OptimConfig(lr=0.01, schedule="one_cycle", epochs=5)
    twin = _twin(0.01)
    scheduler = lr_scheduler.OneCycleLR(twin, max_lr=0.01, total_steps=50, cycle_momentum=False)
    for step in range(50):
        expected = twin.param_groups[0]["lr"]
        assert 0.01 * learning_rate_factor(config, step, 10, 50) == pytest.approx(expected, rel=1e-9)
        twin.step()
        if step < 49:
            scheduler.step()


def test_one_cycle_is_defined_for_very_short_runs() -> None:
    config = OptimConfig(schedule="one_cycle")
    for total in range(1, 6):
        factors = [learning_rate_factor(config, step, 1, total) for step in range(total)]
        assert all(0 < factor <= 1 for factor in factors)


def test_step_schedule_falls_to_a_tenth_at_ninety_percent() -> None:
    config = OptimConfig(schedule="step", epochs=100)
    factors = [learning_rate_factor(config, epoch, 1, 100) for epoch in range(100)]
    assert factors == [1.0] * 90 + [0.1] * 10


def test_groups_keep_their_own_peak_rate() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 2.0}]
    optimizer = build_optimizer(groups, OptimConfig(lr=0.02))
    assert set_learning_rate(optimizer, 0.5) == pytest.approx(0.01)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1.0)


@pytest.mark.parametrize(("limit", "expected"), [(None, 12), (5, 5), (50, 12)])
def test_max_steps_only_shortens(limit: int | None, expected: int) -> None:
    assert total_steps(OptimConfig(epochs=3, max_steps=limit), steps_per_epoch=4) == expected
