"""The trainer skeleton on a task small enough to follow by hand."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from slidr.config import Config, OptimConfig, RunConfig
from slidr.data import storage
from slidr.data.processes import own_mark
from slidr.training.checkpoint import CheckpointError, CheckpointFolder
from slidr.training.loop import EMPTY_STEPS, Diverged, NothingToLearn, Outcome, OutOfMemory, fit

CPU = torch.device("cpu")
STEPS_PER_EPOCH = 5


@dataclass(frozen=True)
class Batch:
    x: Tensor
    tokens: tuple[str, ...] = ()
    teaches: bool = True

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        return replace(self, x=self.x.to(device))


class Numbers:
    """Batches that are a function of the step."""

    steps_per_epoch = STEPS_PER_EPOCH

    def __init__(
        self, poison: int | None = None, stop: int | None = None, empty: Callable[[int], bool] = lambda step: False
    ) -> None:
        self.poison, self.stop, self.empty = poison, stop, empty
        self.served: list[int] = []

    def train(self, first_step: int, last_step: int) -> Iterator[Batch]:
        for step in range(first_step, last_step):
            if step == self.stop:
                raise KeyboardInterrupt
            self.served.append(step)
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            yield Batch(x * float("nan") if step == self.poison else x, (f"frame-{step}",), not self.empty(step))

    def validation(self) -> Iterable[Batch]:
        return [Batch(torch.ones(2, 3))]


class Regression:
    """Learns y = x @ (1, 2, 3), with dropout so that the random states matter."""

    kind = "toy"
    objective = ("val_loss", -1)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 1)
        self.network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), self.linear)
        self.model = _Net(self.network)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters())}]

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        target = batch.x @ torch.tensor([[1.0], [2.0], [3.0]])
        return (outputs - target).square().mean(), {"outputs": float(outputs.detach().mean())}

    def evidence(self, batch: Batch) -> int:
        return len(batch.x) * batch.teaches

    def nothing_to_learn(self, frames: str) -> str:
        return f"empty batches ({frames})"

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            losses = [float(self.loss(self.model(batch), batch)[0]) for batch in batches]
        return {"val_loss": sum(losses) / len(losses)}

    def state(self) -> dict[str, Any]:
        return {"student": self.network.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["student"])


class _Net(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Tensor:
        return self.network(batch.x)


CONFIG = Config(
    optim=OptimConfig(name="adamw", lr=0.01, epochs=3, batch_size=8, schedule="cosine"),
    run=RunConfig(checkpoint_every=2, keep_checkpoints=2, log_every=1),
)


def run(
    folder: Path, loader: Numbers | None = None, config: Config = CONFIG
) -> tuple[Outcome, Regression, dict[int, dict[str, float]]]:
    task = Regression()
    logged: dict[int, dict[str, float]] = {}

    def log(step: int, metrics: dict[str, float]) -> None:
        logged.setdefault(step, {}).update(metrics)

    outcome = fit(task, loader or Numbers(), config, CheckpointFolder(str(folder), 2), CPU, log)
    return outcome, task, logged


@pytest.mark.parametrize("stop", [1, 2, 7, 10, 14])
def test_a_run_interrupted_anywhere_ends_in_the_same_weights_and_losses(tmp_path: Path, stop: int) -> None:
    _, straight, expected = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Numbers(stop=stop))
    outcome, resumed, logged = run(tmp_path / "broken")
    assert outcome.step == 15
    for name, value in straight.network.state_dict().items():
        assert torch.equal(resumed.network.state_dict()[name], value), name
    for step, metrics in logged.items():
        assert metrics["loss"] == expected[step]["loss"]
        assert metrics["lr"] == expected[step]["lr"]


@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    kept: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, straight, _ = run(tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Numbers(stop=9))
    newest = sorted((tmp_path / "broken").glob("step-*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[: int(newest.stat().st_size * kept)])
    mark = own_mark()
    assert mark is not None
    half = newest.with_name(f".tmp-{mark._replace(pid=999_999_999)}-0a1b2c3d")  # of a process that has ended
    half.write_bytes(b"half")
    loader = Numbers()
    _, resumed, _ = run(tmp_path / "broken", loader)
    assert loader.served[0] == 6
    assert newest.name in caplog.text
    assert not half.exists()
    assert torch.equal(resumed.linear.weight, straight.linear.weight)


def test_a_kill_between_best_and_newest_costs_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "straight")
    real_save = CheckpointFolder.save

    def killed_save(self: CheckpointFolder, state: dict[str, Any]) -> str:
        if state["step"] == 5:
            raise KeyboardInterrupt
        return real_save(self, state)

    monkeypatch.setattr(CheckpointFolder, "save", killed_save)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    monkeypatch.undo()
    run(tmp_path / "broken")
    best = [CheckpointFolder(str(tmp_path / name)).best() for name in ("straight", "broken")]
    assert best[0] is not None
    assert best[1] is not None
    assert best[0]["step"] == best[1]["step"]


def test_checkpoints_none_of_which_can_be_read_are_not_trained_over(tmp_path: Path) -> None:
    run(tmp_path)
    for path in tmp_path.glob("step-*.pt"):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints"):
        run(tmp_path)


def test_a_full_disk_ends_the_run_with_the_reason_and_the_last_checkpoint_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_write = storage.write_bytes_atomic

    def full(path: str, data: bytes) -> None:
        if path.endswith("step-00000006.pt"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(path, data)

    monkeypatch.setattr(storage, "write_bytes_atomic", full)
    with pytest.raises(CheckpointError, match=r"step-00000006\.pt: cannot be written \(No space left.*--run\.resume"):
        run(tmp_path)
    state = CheckpointFolder(str(tmp_path)).newest()
    assert state is not None
    assert state["step"] == 5


def test_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    _, _, logged = run(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["best.pt", "step-00000014.pt", "step-00000015.pt"]
    best = CheckpointFolder(str(tmp_path)).best()
    assert best is not None
    validated = {step: m["val_loss"] for step, m in logged.items() if "val_loss" in m}
    assert best["step"] == min(validated, key=lambda step: validated[step])


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    first, _, _ = run(tmp_path)
    loader = Numbers()
    again, _, _ = run(tmp_path, loader)
    assert loader.served == []
    assert (again.step, again.metrics) == (first.step, first.metrics)


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"step 8: the loss is nan at learning rate .*optim\.lr"):
        run(tmp_path, Numbers(poison=7))
    state = CheckpointFolder(str(tmp_path)).newest()
    assert state is not None
    assert state["step"] == 6
    assert all(torch.isfinite(value).all() for value in state["student"].values())


FULL = (
    "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 79.11 GiB. Of the allocated memory"
)


def test_a_batch_beyond_the_gpus_memory_names_the_keys_that_make_it_smaller(tmp_path: Path) -> None:
    class Full(Regression):
        def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
            raise torch.OutOfMemoryError(FULL)

    config = replace(CONFIG, optim=replace(CONFIG.optim, batch_size=8, accumulate=2))
    with pytest.raises(OutOfMemory) as caught:
        fit(Full(), Numbers(), config, CheckpointFolder(str(tmp_path), 2), CPU, lambda step, metrics: None)
    assert str(caught.value) == (
        "step 1: cpu ran out of memory; a batch holds 4 keyframes: lower optim.batch_size (now 8) or raise "
        "optim.accumulate (now 2) or set optim.precision to bfloat16 (PyTorch: CUDA out of memory. Tried to allocate "
        "3.00 GiB. GPU 0 has a total capacity of 79.11 GiB)"
    )


def test_a_validation_batch_beyond_the_gpus_memory_names_its_own_key(tmp_path: Path) -> None:
    class Full(Regression):
        def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
            raise torch.OutOfMemoryError(FULL)

    with pytest.raises(OutOfMemory, match=r"validation after step 5: cpu .*; lower data\.val_batch_size \(now 4\)"):
        fit(Full(), Numbers(), CONFIG, CheckpointFolder(str(tmp_path), 2), CPU, lambda step, metrics: None)


def test_accumulating_two_halves_equals_one_whole_step(tmp_path: Path) -> None:
    class Halves(Numbers):
        def train(self, first_step: int, last_step: int) -> Iterator[Batch]:
            for batch in super().train(first_step, last_step):
                yield Batch(batch.x[:4])
                yield Batch(batch.x[4:])

    class Plain(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.network = nn.Sequential(self.linear)  # dropout and batch norm see the micro-batch
            self.model = _Net(self.network)

    def weights(loader: Numbers, accumulate: int, folder: Path) -> Tensor:
        task = Plain()
        config = replace(CONFIG, optim=replace(CONFIG.optim, accumulate=accumulate))
        fit(task, loader, config, CheckpointFolder(str(folder)), CPU, lambda *_: None)
        return task.linear.weight.detach()

    whole = weights(Numbers(), 1, tmp_path / "whole")
    halves = weights(Halves(), 2, tmp_path / "halves")
    torch.testing.assert_close(halves, whole)


def test_max_steps_ends_a_run_within_an_epoch_with_a_validation(tmp_path: Path) -> None:
    config = replace(CONFIG, optim=replace(CONFIG.optim, max_steps=7))
    outcome, _, logged = run(tmp_path, config=config)
    assert outcome.step == 7
    assert "val_loss" in logged[7]


# ------------------------------------------------------------------------------------------- nothing to learn from


def _long(**optim: Any) -> Config:
    return replace(CONFIG, optim=replace(CONFIG.optim, epochs=10, **optim))


def test_ten_steps_in_a_row_without_anything_to_learn_end_a_run_and_name_frames(tmp_path: Path) -> None:
    assert EMPTY_STEPS == 10
    with pytest.raises(NothingToLearn, match=r"^steps 1 to 10: empty batches \(frame-0, frame-1, frame-2, frame-3\)$"):
        run(tmp_path / "from the start", Numbers(empty=lambda step: True), _long())
    with pytest.raises(NothingToLearn, match=r"^steps 21 to 30: empty batches \(frame-20, "):
        run(tmp_path / "from step 21", Numbers(empty=lambda step: step >= 20), _long())


def test_some_steps_without_anything_to_learn_end_nothing(tmp_path: Path) -> None:
    outcome, _, _ = run(tmp_path, Numbers(empty=lambda step: step % 10 != 3), _long())
    assert outcome.step == 50


def test_a_short_run_without_anything_to_learn_fails_at_its_end_and_is_not_validated(tmp_path: Path) -> None:
    with pytest.raises(NothingToLearn, match=r"^steps 1 to 3: "):
        run(tmp_path, Numbers(empty=lambda step: True), _long(max_steps=3))
    outcome, _, _ = run(tmp_path / "one", Numbers(empty=lambda step: step != 1), _long(max_steps=3))
    assert outcome.step == 3


def test_evidence_is_counted_once_in_ten_steps_and_not_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    monkeypatch.setattr(Regression, "evidence", lambda task, batch: counted.append(len(batch.x)) or len(batch.x))
    outcome, _, _ = run(tmp_path, config=_long())
    assert (outcome.step, len(counted)) == (50, 50 // EMPTY_STEPS)


def test_the_last_steps_of_a_resumed_run_may_have_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Numbers(stop=14))
    outcome, _, _ = run(tmp_path, Numbers(empty=lambda step: step >= 12))
    assert outcome.step == 15


def test_a_seed_of_many_digits_trains_and_resumes(tmp_path: Path) -> None:
    config = replace(CONFIG, run=replace(CONFIG.run, seed=2**63 - 1))
    _, straight, _ = run(tmp_path / "straight", config=config)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Numbers(stop=7), config)
    _, resumed, _ = run(tmp_path / "broken", config=config)
    for name, value in straight.state()["student"].items():
        assert torch.equal(value, resumed.state()["student"][name])


def _blind_process(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # One worker alone sees something in the first ten steps; none does in the next.
    loader = Numbers(empty=lambda step: rank == 0 or step >= 10)
    try:
        run(Path(folder, "run"), loader, _long())
    except NothingToLearn as error:
        Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_all_workers_end_at_the_same_step_and_only_where_none_has_anything(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_blind_process, (str(tmp_path),), nprocs=2)
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.txt").read_text().startswith("steps 11 to 20: empty batches (frame-10, ")
