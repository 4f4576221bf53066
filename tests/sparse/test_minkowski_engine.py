"""Both engines agree, where MinkowskiEngine is installed; tests/models/test_minkunet.py has the golden values."""

from __future__ import annotations

import builtins
import collections
import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from named_weights import load_named_weights, named_normal

from slidr.models.minkunet import MinkUNet14
from slidr.sparse import SparseTensor

needs_minkowski = pytest.mark.skipif(
    importlib.util.find_spec("MinkowskiEngine") is None,
    reason="MinkowskiEngine is not installed; `tools/build_minkowski.sh .venv/bin/python` builds it",
)


def small_batch() -> SparseTensor:
    rng = np.random.default_rng(0)
    coordinates = np.unique(rng.integers((0, -9, -9, -9), (2, 9, 9, 9), (900, 4)), axis=0)
    coordinates = torch.from_numpy(rng.permutation(coordinates).astype(np.int32))
    return SparseTensor(torch.from_numpy(rng.standard_normal((len(coordinates), 2)).astype(np.float32)), coordinates)


@needs_minkowski
def test_engines_agree_in_output_gradients_and_running_statistics() -> None:
    models = [load_named_weights(MinkUNet14(2, 8, width=0.5, engine=engine)) for engine in ("torch", "minkowski")]
    x = small_batch()
    for model in models:
        out = model(x).features
        (out * torch.from_numpy(named_normal("cotangent", tuple(out.shape)))).sum().backward()
    ours, theirs = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        scale = float(theirs_p.grad.norm())
        assert float((ours_p.grad - theirs_p.grad).norm()) <= 1e-2 * scale + 1e-3, name


@needs_minkowski
def test_minkowski_keeps_rows_in_input_order() -> None:
    models = [load_named_weights(MinkUNet14(2, 8, width=0.5, engine=e)).eval() for e in ("torch", "minkowski")]
    x = small_batch()
    with torch.no_grad():
        ours, theirs = (model(x).features for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_minkowski
def test_importing_minkowski_leaves_collections_as_it_was() -> None:
    import slidr.sparse.minkowski  # noqa: F401

    assert not hasattr(collections, "Sequence")


def test_asking_for_an_absent_minkowski_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "MinkowskiEngine":
            raise ImportError("No module named 'MinkowskiEngine'")
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "slidr.sparse.minkowski", raising=False)
    monkeypatch.delattr("slidr.sparse.minkowski", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"tools/build_minkowski\.sh \.venv/bin/python"):
        MinkUNet14(engine="minkowski")
