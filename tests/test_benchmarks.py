"""The parts of the sparse engine's benchmark that need no GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from slidr.models.minkunet import MinkUNet14
from slidr.sparse import SparseTensor


@pytest.fixture(scope="module")
def sparse() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sparse", Path(__file__).parents[1] / "benchmarks" / "sparse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gpu_batch_holds_whole_turned_clouds(sparse: ModuleType) -> None:
    one, (features, coordinates) = sparse.cloud()[1], sparse.batch_of(4)
    assert len(features) == len(coordinates) == 4 * len(one)
    assert torch.bincount(coordinates[:, 0]).tolist() == [len(one)] * 4
    back = coordinates[coordinates[:, 0] == 2] - torch.tensor([2, 0, 6, 0])
    assert torch.equal(back, one)
    SparseTensor(features, coordinates)  # refuses repeated voxels and such beyond the limits


def test_the_gpu_step_trains_every_parameter_under_bfloat16(sparse: ModuleType) -> None:
    torch.manual_seed(0)
    model = MinkUNet14(1, 8, width=0.25)
    before = [p.detach().clone() for p in model.parameters()]
    drawn = np.random.default_rng(0).integers((0, 0, 0, 0), (1, 60, 60, 60), (400, 4))
    coordinates = torch.from_numpy(np.unique(drawn, axis=0))
    features = torch.rand(len(coordinates), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse.training_step(model, optimizer, features, coordinates.int())
    assert all(
        p.dtype == torch.float32 and not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True)
    )


def test_gflop_are_two_for_every_pair_and_weight(sparse: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MinkUNet14(1, 8, width=0.25)
    lone = torch.zeros(1, 4, dtype=torch.int32)  # one voxel has one pair in every layer
    matrices = sum(p.shape[-2] * p.shape[-1] for name, p in model.named_parameters() if name.endswith("kernel"))
    model.eval()
    assert sparse.count_gflop(model, torch.ones(1, 1), lone) == pytest.approx(2e-9 * matrices)


def test_the_gpu_table_has_a_row_for_each_algorithm(sparse: ModuleType) -> None:
    step = {"milliseconds": 12.34, "peak_mib": 2048.0, "error": 0.0042}
    result = {"device": "a GPU", "clouds": 4, "voxels": 63788, "runs": 20, "steps": {"gather": step, "triton": step}}
    rows = [line.split() for line in sparse.cuda_table(result).splitlines()[2:]]
    assert rows == [[name, "12.3", "2048", "4.2e-03"] for name in ("gather", "triton")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_training_on_the_gpu_is_timed_and_close_to_float32(sparse: ModuleType) -> None:
    result = sparse.measure_cuda(runs=2, clouds=1)
    assert "measured" in result["steps"]
    for step in result["steps"].values():
        assert step["milliseconds"] > 0
        assert step["error"] < 1e-2
