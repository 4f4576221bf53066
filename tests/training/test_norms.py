"""Batch norm's statistics taken again, and how far running ones are off, against a plain loop."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slidr.config import OptimConfig
from slidr.training import norms, workers

CPU = torch.device("cpu")
EPS = 1e-5


@dataclass(frozen=True)
class Rows:
    x: Tensor

    def to(self, device: torch.device) -> Rows:
        return self


class Net(nn.Module):
    """Two norms, the second behind the first, with statistics that describe nothing here."""

    def __init__(self, momentum: float = 0.02) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.BatchNorm1d(4, momentum=momentum)
        self.linear = nn.Linear(4, 3)
        self.second = nn.BatchNorm1d(3, momentum=momentum)
        nn.init.normal_(self.first.running_mean)
        nn.init.uniform_(self.second.running_var, 1, 2)

    def forward(self, batch: Rows) -> Tensor:
        return self.second(self.linear(self.first(batch.x).relu()))


def batches(count: int = 5) -> list[Rows]:
    generator = torch.Generator().manual_seed(1)
    return [Rows(torch.randn(20 + 6 * n, 4, generator=generator) * (n + 1) + n) for n in range(count)]


def plain_loop(net: Net, data: list[Rows]) -> dict[str, np.ndarray]:
    """Means over the batches of every norm's batch mean and unbiased variance, in float64, batch by batch."""
    sums: dict[str, list[np.ndarray]] = {"first": [], "second": []}
    weight, bias = net.linear.weight.detach().numpy().astype(float), net.linear.bias.detach().numpy().astype(float)
    for batch in data:
        x = batch.x.numpy().astype(float)
        for name, norm in (("first", net.first), ("second", net.second)):
            sums[name].append(np.stack([x.mean(0), x.var(0, ddof=1)]))
            gain, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + EPS) * gain + shift
            if name == "first":
                x = np.maximum(x, 0) @ weight.T + bias
    return {name: np.mean(values, axis=0) for name, values in sums.items()}


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_statistics_taken_again_are_those_of_a_plain_loop_whatever_was_there() -> None:
    net, other = Net(), Net()
    nn.init.constant_(other.second.running_mean, 1e6)
    expected = plain_loop(net, batches())
    weights = {name: value for name, value in state(net).items() if "running" not in name and "tracked" not in name}
    for each in (net, other):
        each.eval()
        assert norms.reestimate(each, batches(), CPU) == 5
        assert not each.training
        assert each.first.momentum == 0.02
        for name, (mean, variance) in expected.items():
            norm = getattr(each, name)
            np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-5)
    for name, value in weights.items():
        assert torch.equal(net.state_dict()[name], value)


def test_the_lag_is_that_of_the_worst_norm_and_measuring_it_changes_nothing() -> None:
    net = Net()
    before = state(net)
    found = norms.lag(net, batches(), CPU)
    assert found is not None
    after = state(net)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert net.first.momentum == 0.02
    assert net.training
    worst = []
    for name, (mean, variance) in plain_loop(net, batches()).items():
        norm, deviation = getattr(net, name), np.sqrt(variance + EPS)
        shift = (np.abs(norm.running_mean.numpy() - mean) / deviation).mean()
        scale = np.abs(np.log(np.sqrt(norm.running_var.numpy() + EPS) / deviation)).mean()
        worst.append((max(shift, scale), name, shift, scale))
    _, name, shift, scale = max(worst)
    assert (found.layer, found.batches) == (name, 5)
    assert (found.shift, found.scale) == (pytest.approx(shift, rel=1e-4), pytest.approx(scale, rel=1e-4))
    assert found.worst > norms.WARN_ABOVE


def test_statistics_that_were_taken_again_do_not_lag() -> None:
    net = Net()
    norms.reestimate(net, batches(), CPU)
    found = norms.lag(net, batches(), CPU)
    assert found is not None
    assert found.worst < 1e-6


def test_a_network_without_running_statistics_has_no_lag() -> None:
    assert norms.lag(nn.Sequential(nn.Identity(), nn.BatchNorm1d(4, track_running_stats=False)), [], CPU) is None


def test_an_error_on_the_way_leaves_the_running_statistics_as_they_were() -> None:
    net = Net()
    before = state(net)
    with pytest.raises(RuntimeError):
        norms.lag(net, [*batches(2), Rows(torch.ones(3, 5))], CPU)
    assert all(torch.equal(before[name], value) for name, value in state(net).items())
    assert net.first.momentum == 0.02


def test_the_batches_are_the_runs_first_and_as_many_as_asked_for() -> None:
    class Loader:
        steps_per_epoch = 3

        def train(self, first_step: int, last_step: int) -> object:
            assert first_step == 0
            return iter([(step, turn) for step in range(last_step) for turn in range(2)])

        def validation(self) -> list[object]:
            return []

    optim = OptimConfig(accumulate=2, batch_size=2)
    assert list(norms.some_batches(Loader(), 5, optim)) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]  # type: ignore[arg-type]


def _process(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = Net()
    model = nn.Sequential()
    model.net = workers.synchronise_batch_norm(net, CPU)
    mine = [Rows(batch.x[: len(batch.x) // 3] if rank == 0 else batch.x[len(batch.x) // 3 :]) for batch in batches()]
    found = norms.lag(net, mine, CPU)
    norms.reestimate(net, mine, CPU)
    torch.save({"lag": vars(found), "state": net.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_workers_take_the_statistics_of_all_rows_together(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    alone = Net()
    lag = norms.lag(alone, batches(), CPU)
    assert lag is not None
    norms.reestimate(alone, batches(), CPU)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert (found["lag"]["layer"], found["lag"]["batches"]) == (lag.layer, lag.batches)
        assert found["lag"]["shift"] == pytest.approx(lag.shift, rel=1e-4)
        assert found["lag"]["scale"] == pytest.approx(lag.scale, rel=1e-4)
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-4, atol=1e-5)
