"""Collectives and batch norm over two real processes, against one process that holds all rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from slidr.training import workers
from slidr.training.checkpoint import CheckpointError, CheckpointFolder, newest_on_every_worker

ROWS = (5, 2)  # rows of each worker


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(ROWS), 4, generator=generator) * 3 + 100  # far from zero: hard on float32
    return rows, torch.randn(sum(ROWS), 4, generator=generator)


def _state(step: int) -> dict[str, Any]:
    """The smallest checkpoint there is."""
    entries: dict[str, Any] = {name: {} for name in ("student", "optimizer", "scaler", "config", "metrics")}
    return {**entries, "kind": "toy", "step": step, "epoch": 0, "best": None}


def _own(rank: int) -> slice:
    return slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))


def _process(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    rows, cotangent = _inputs()
    mine = rows[_own(rank)].clone().requires_grad_()
    model = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4, momentum=0.3))
    model = workers.synchronise_batch_norm(model, torch.device("cpu"))
    output = model(mine)
    (output * cotangent[_own(rank)]).sum().backward()

    gathered_rows = rows[_own(rank)].clone().requires_grad_()
    gathered, offset = workers.gather_rows(gathered_rows)
    (gathered * cotangent * (rank + 1)).sum().backward()

    none, none_offset = workers.gather_rows(torch.ones(3 * rank, 2))
    result: dict[str, Any] = {
        "output": output.detach(),
        "grad": mine.grad,
        "state": model.state_dict(),
        "gathered": gathered.detach(),
        "offset": offset,
        "gather_grad": gathered_rows.grad,
        "none": (none, none_offset),
        "mean": workers.mean_over_workers({"b": float(rank), "a": 1.0}, torch.device("cpu")),
    }
    for name, own in (("shared", False), ("own", True), ("damaged", True)):
        checkpoints = CheckpointFolder(f"{folder}/{name}{f'-{rank}' if own else ''}")
        for step in (3, 5):
            if (name == "shared" and rank == 0) or (name == "own" and rank == 1) or name == "damaged":
                checkpoints.save(_state(step))
        if name == "damaged" and rank == 1:
            Path(checkpoints.path, "step-00000005.pt").write_bytes(b"half")
        dist.barrier()
        try:
            state = newest_on_every_worker(checkpoints, torch.device("cpu"))
            result[name] = state["step"] if state is not None else None
        except CheckpointError as error:
            result[name] = str(error)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(_process, args=(str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_batch_norm_over_workers_equals_one_batch_norm_over_all_rows(results: list[dict[str, Any]]) -> None:
    rows, cotangent = _inputs()
    rows.requires_grad_()
    twin = nn.Sequential(nn.Identity(), nn.BatchNorm1d(4, momentum=0.3))
    expected = twin(rows)
    (expected * cotangent).sum().backward()
    assert rows.grad is not None
    torch.testing.assert_close(torch.cat([r["output"] for r in results]), expected.detach())
    torch.testing.assert_close(torch.cat([r["grad"] for r in results]), rows.grad, rtol=1e-4, atol=1e-5)
    for result in results:
        for name, value in twin.state_dict().items():
            torch.testing.assert_close(result["state"][name], value)


def test_gathered_rows_carry_gradients_back_to_every_worker(results: list[dict[str, Any]]) -> None:
    rows, cotangent = _inputs()
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["gathered"], rows)
        assert result["offset"] == sum(ROWS[:rank])
        # Worker 0 weighs the sum by 1, worker 1 by 2; each row is used by both.
        torch.testing.assert_close(result["gather_grad"], cotangent[_own(rank)] * 3)


def test_a_worker_without_rows_still_gathers(results: list[dict[str, Any]]) -> None:
    for result, offset in zip(results, (0, 0), strict=True):
        gathered, own_offset = result["none"]
        assert gathered.shape == (3, 2)
        assert own_offset == offset


def test_means_over_workers(results: list[dict[str, Any]]) -> None:
    assert results[0]["mean"] == results[1]["mean"] == {"a": 1.0, "b": 0.5}


def test_workers_that_share_a_folder_go_on_from_the_same_step(results: list[dict[str, Any]]) -> None:
    assert [result["shared"] for result in results] == [5, 5]


@pytest.mark.parametrize(
    ("folder", "what"), [("own", "that there is no checkpoint"), ("damaged", "its checkpoint of step 5")]
)
def test_workers_that_see_different_checkpoints_all_stop_with_the_reason(
    folder: str, what: str, results: list[dict[str, Any]]
) -> None:
    for result in results:
        assert f"worker 0 sees {what}, workers [1] do not; run.folder must be storage that every node" in result[folder]


def test_alone_everything_is_the_identity() -> None:
    rows, _ = _inputs()
    assert workers.gather_rows(rows) == (rows, 0)
    model = nn.BatchNorm1d(4)
    assert workers.synchronise_batch_norm(model, torch.device("cpu")) is model
    assert workers.sum_over_workers({"a": 2.0}, torch.device("cpu")) == {"a": 2.0}
