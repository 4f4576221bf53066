"""MinkUNet on both engines against values that the original implementation computed on a real keyframe."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from named_weights import load_named_weights, named_normal

from slidr.models.minkunet import MinkUNet14, MinkUNet18, MinkUNet34C
from slidr.sparse import SparseTensor

needs_minkowski = pytest.mark.skipif(
    importlib.util.find_spec("MinkowskiEngine") is None,
    reason="MinkowskiEngine is not installed; `tools/build_minkowski.sh .venv/bin/python` builds it",
)
ENGINES = ["torch", pytest.param("minkowski", marks=needs_minkowski)]


def relative(got: torch.Tensor, expected: Any) -> float:
    expected = torch.as_tensor(expected)
    return float((got.detach() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def keyframe(golden: Path) -> Any:
    return np.load(golden / "minkunet.npz")


def batched(coords: np.ndarray, clouds: int = 1) -> torch.Tensor:
    parts = [np.concatenate([np.full((len(coords), 1), b), coords], axis=1) for b in range(clouds)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: Any) -> Any:
    return request.param


@pytest.fixture(scope="module", params=[64, 17])
def step(request: Any, engine: Any, keyframe: Any, manifest: Any) -> dict[str, Any]:
    """Eval output, train output, and gradients of the golden loss, each computed once."""
    width = request.param
    model = load_named_weights(MinkUNet34C(1, width, normalize=width == 64, engine=engine))
    coords = batched(keyframe["coords"])
    x = torch.from_numpy(named_normal("features", (len(coords), 1)))
    model.eval()
    with torch.no_grad():
        evaluated = model(SparseTensor(x, coords)).features
    model.train()
    trained = model(SparseTensor(x, coords)).features
    cotangent = torch.from_numpy(named_normal("cotangent", tuple(trained.shape)))
    (trained * cotangent).sum().backward()
    return {"width": width, "model": model, "eval": evaluated, "train": trained, "manifest": manifest}


def test_state_dict_has_the_published_names_and_shapes(step: dict[str, Any]) -> None:
    expected = step["manifest"][f"minkunet_{step['width']}"]
    assert {k: list(v.shape) for k, v in step["model"].state_dict().items()} == expected


def test_batch_norm_momenta_are_the_published_ones(step: dict[str, Any]) -> None:
    got = {k[:-3]: m.momentum for k, m in step["model"].named_modules() if isinstance(m, torch.nn.BatchNorm1d)}
    assert got == step["manifest"][f"minkunet_{step['width']}_bn_momentum"]


def test_outputs_on_the_real_keyframe_match_the_original(step: dict[str, Any], keyframe: Any) -> None:
    for mode in ("eval", "train"):
        assert relative(step[mode][::16], keyframe[f"{mode}_{step['width']}"]) < 1e-4


def test_gradient_norms_match_the_original(step: dict[str, Any]) -> None:
    expected = step["manifest"][f"minkunet_{step['width']}_grad_norm"]
    got = {name: float(p.grad.norm()) for name, p in step["model"].named_parameters()}
    assert got == pytest.approx(expected, rel=1e-2)


def test_running_means_after_one_step_match_the_original(step: dict[str, Any]) -> None:
    expected = step["manifest"][f"minkunet_{step['width']}_running_mean_after"]
    state = step["model"].state_dict()
    assert {k: float(state[k].abs().sum()) for k in expected} == pytest.approx(expected, rel=1e-4)


def test_two_clouds_in_a_batch_do_not_mix(engine: Any, keyframe: Any, golden: Path) -> None:
    model = load_named_weights(MinkUNet34C(1, 17, normalize=False, engine=engine)).eval()
    f = torch.from_numpy(named_normal("features", (len(keyframe["coords"]), 1)))
    with torch.no_grad():
        out = model(SparseTensor(torch.cat([f, 2 * f]), batched(keyframe["coords"], 2))).features
    assert relative(out[len(f) :: 64], np.load(golden / "minkunet_batch2.npz")["second_cloud"]) < 1e-4


@pytest.mark.parametrize(("build", "count"), [(MinkUNet34C, 8 + 15), (MinkUNet18, 16), (MinkUNet14, 8)])
def test_variants_differ_in_block_counts_only(build: Any, count: int) -> None:
    model = build(1, 64, width=0.25)
    blocks = {name.rsplit(".", 2)[0] for name, _ in model.named_parameters() if name.endswith("conv1.kernel")}
    assert len(blocks) == count


def test_full_width_has_the_published_parameter_count() -> None:
    assert sum(p.numel() for p in MinkUNet34C().parameters()) == pytest.approx(37.85e6, rel=1e-3)
