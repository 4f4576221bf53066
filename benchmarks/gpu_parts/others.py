"""Other engines on the same clouds, where they can be imported: spconv and spconv-triton beside this project's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gpu_parts.bench import Bench, Mode
from gpu_parts.rows import NO_GPU, Row
from slidr.models.voxelnet import GRID, VoxelNet
from slidr.sparse import SparseTensor
from slidr.sparse.functional import sparse_conv

LIBRARIES = {"spconv": "spconv.pytorch", "spconv-triton": "spconv_triton.pytorch"}
CHANNELS = 96
MODES: tuple[Mode, ...] = ("float32", "float16")


def spconv(bench: Bench) -> Iterator[Row]:
    """One wide layer and VoxelNet's encoder, forward and backward, maps included."""
    found: dict[str, ModuleType] = {}
    for name, module in LIBRARIES.items():
        try:
            found[name] = importlib.import_module(module)
        except ModuleNotFoundError as error:
            absent = error.name == module.partition(".")[0]
            note = "not installed" if absent else f"lacks {error.name}"
            yield Row("others", name, gpu=None if bench.gpu else NO_GPU, note=note, state="skipped")
        except Exception as error:  # its compiled part does not fit this driver or this torch
            yield Row("others", name, note=f"cannot be imported: {str(error).strip()[:100]}", state="failed")
    if not found:
        return
    if not bench.gpu:
        for name in found:
            yield Row("others", name, gpu=NO_GPU, state="skipped")
        return
    for mode in MODES:
        yield from _beside(bench, found, mode)


def _beside(bench: Bench, found: dict[str, ModuleType], mode: Mode) -> Iterator[Row]:
    batch = bench.batch(None, "voxelnet").to(bench.device)
    features, indices, clouds = batch.features, batch.coordinates.contiguous(), len(batch.tokens)
    wide = torch.randn(len(features), CHANNELS, device=bench.device)
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(27, CHANNELS, CHANNELS, device=bench.device) / 50)
    ours = VoxelNet(4, 64).to(bench.device).train()

    def our_layer() -> Tensor:
        manager = SparseTensor(wide, indices).manager
        return sparse_conv(wide, weight, manager.submanifold((1, 1, 1), (3, 3, 3)))

    calls: dict[str, dict[str, Callable[[], Tensor]]] = {
        "slidr": {"layer": our_layer, "encoder": lambda: ours(features, indices, clouds)}
    }
    for name, library in found.items():
        layer = _layer(library).to(bench.device)
        network = encoder(library).to(bench.device).train()

        def their_layer(library: Any = library, layer: nn.Module = layer) -> Tensor:
            return layer(library.SparseConvTensor(wide, indices, list(GRID), clouds)).features

        def theirs(library: Any = library, network: nn.Module = network) -> Tensor:
            return network(library.SparseConvTensor(features, indices, list(GRID), clouds)).dense()

        calls[name] = {"layer": their_layer, "encoder": theirs}
    what = {"layer": f"{CHANNELS} to {CHANNELS}, submanifold", "encoder": "VoxelNet"}
    for part, text in what.items():
        for name, call in calls.items():
            yield _timed(bench, f"{name}: {text}, {mode}", call[part], mode)


def _timed(bench: Bench, what: str, call: Callable[[], Tensor], mode: Mode) -> Row:
    def both() -> None:
        with bench.arithmetic(mode):
            out = call()
        out.float().square().sum().backward()

    try:
        took = bench.milliseconds(both)
    except Exception as error:  # one library's failure leaves the others their rows
        return Row("others", what, note=f"{type(error).__name__}: {str(error).strip()[:100]}", state="failed")
    return Row("others", what, "ms", gpu=took, note="forward and backward")


def _layer(library: Any) -> nn.Module:
    return library.SubMConv3d(CHANNELS, CHANNELS, 3, padding=1, bias=False, indice_key="same")


def encoder(library: Any) -> nn.Module:
    """The layers of `slidr.models.voxelnet.VoxelNet` in a library with spconv's names."""

    def block(c_in: int, c_out: int, key: str, **strided: Any) -> list[nn.Module]:
        if strided:
            convolution = library.SparseConv3d(c_in, c_out, bias=False, indice_key=key, **strided)
        else:
            convolution = library.SubMConv3d(c_in, c_out, 3, padding=1, bias=False, indice_key=key)
        return [convolution, nn.BatchNorm1d(c_out, eps=1e-3, momentum=0.01), nn.ReLU()]

    half = {"kernel_size": 3, "stride": 2}
    return library.SparseSequential(
        *block(4, 16, "1"),
        *block(16, 16, "1"),
        *block(16, 32, "d2", padding=1, **half),
        *block(32, 32, "2"),
        *block(32, 32, "2"),
        *block(32, 64, "d3", padding=1, **half),
        *block(64, 64, "3"),
        *block(64, 64, "3"),
        *block(64, 64, "d4", padding=(0, 1, 1), **half),
        *block(64, 64, "4"),
        *block(64, 64, "4"),
        *block(64, 128, "out", kernel_size=(3, 1, 1), stride=(2, 1, 1)),
    )
