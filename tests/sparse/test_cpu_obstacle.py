"""No llvmlite, a damaged one, a processor that lacks what they need: the compiled kernels give way to gathering."""

from __future__ import annotations

import importlib.abc
import logging
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

from slidr.sparse import Convolution, SparseTensor, choice, cpu_kernels

pytest.importorskip("llvmlite", reason="what is damaged here must be there first")
Damage = Callable[[pytest.MonkeyPatch], None]


class Failing(importlib.abc.MetaPathFinder):
    """Stands before all other finders and fails for one module as a real one would."""

    def __init__(self, module: str, error: Exception) -> None:
        self.module, self.error = module, error

    def find_spec(self, name: str, path: object, target: object = None) -> None:
        if name == self.module:
            raise self.error


def failing(patch: pytest.MonkeyPatch, module: str, error: Exception) -> None:
    for loaded in [name for name in sys.modules if name == module or name.startswith(module + ".")]:
        patch.delitem(sys.modules, loaded)
    patch.setattr(sys, "meta_path", [Failing(module, error), *sys.meta_path])


def absent(patch: pytest.MonkeyPatch) -> None:
    failing(patch, "llvmlite", ModuleNotFoundError("No module named 'llvmlite'", name="llvmlite"))


def half_removed(patch: pytest.MonkeyPatch) -> None:
    failing(
        patch, "llvmlite.binding", ModuleNotFoundError("No module named 'llvmlite.binding'", name="llvmlite.binding")
    )


def damaged(patch: pytest.MonkeyPatch) -> None:
    failing(patch, "llvmlite.binding", OSError("libllvmlite.so: file too short"))


def old_processor(patch: pytest.MonkeyPatch) -> None:
    import llvmlite.binding as llvm

    patch.setattr(cpu_kernels.platform, "machine", lambda: "x86_64")
    patch.setattr(llvm, "get_host_cpu_features", lambda: {"avx": True, "sse4.2": True})
    patch.setattr(llvm, "get_host_cpu_name", lambda: "sandybridge")


def not_compiling(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(cpu_kernels, "module", lambda shape: "define nonsense")


OBSTACLES: dict[str, tuple[Damage, str, str]] = {
    "absent": (absent, "llvmlite is not installed", "pip install llvmlite"),
    "half removed": (half_removed, "does not load (ModuleNotFoundError", "pip install --force-reinstall llvmlite"),
    "damaged": (damaged, "does not load (OSError: libllvmlite.so", "pip install --force-reinstall llvmlite"),
    "old processor": (old_processor, "sandybridge) has no AVX2", "use a processor"),
    "not compiling": (not_compiling, "cannot compile them", "pip install --upgrade llvmlite"),
}


@pytest.fixture
def looking_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What this process found out about its kernels is forgotten, before and after."""
    monkeypatch.delenv(choice.SWITCH, raising=False)
    known = (cpu_kernels.available, cpu_kernels.obstacle, cpu_kernels._shape, cpu_kernels._kernels)
    for function in known:
        function.cache_clear()
    yield
    for function in known:
        function.cache_clear()


@pytest.mark.usefixtures("looking_again")
@pytest.mark.parametrize("name", OBSTACLES)
def test_a_convolution_gathers_and_says_once_why(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    damage, what, step = OBSTACLES[name]
    layer = Convolution(8, 16)
    x = SparseTensor(torch.randn(3, 8), torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 5, 5, 5]], dtype=torch.int32))
    with monkeypatch.context() as patch:
        damage(patch)
        with caplog.at_level(logging.WARNING, "slidr"):
            out = [layer(x).features for _ in range(2)]
        out[0].sum().backward()
        assert not cpu_kernels.available()
        monkeypatch.setenv(choice.SWITCH, "cpu")
        with pytest.raises(ValueError, match="SLIDR_SPARSE=cpu: ") as refused:
            layer(x)
    said = [record.getMessage() for record in caplog.records if record.name == cpu_kernels.__name__]
    assert len(said) == 1
    for text in (said[0], str(refused.value)):
        assert what in text
        assert step in text
    monkeypatch.setenv(choice.SWITCH, "gather")
    assert torch.equal(out[0], layer(x).features)
