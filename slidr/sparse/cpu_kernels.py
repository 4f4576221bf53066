"""Sparse convolution on the CPU without gathering: kernels compiled for this processor at first use. llvmlite's door.

float32, channel counts that are multiples of 8. Beside `gather.py` nothing is copied and no product is stored, and the
multiply-adds run on the processor's widest vectors. Needs no compiler: LLVM comes inside a pip package.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidr.shapes import Float, Int64
from slidr.sparse.cpu_ir import AVX2, AVX512, BLOCK, CONVOLVE, NEON, TRANSPOSE, WEIGHT_GRADIENT, Shape, module, panels
from slidr.sparse.cpu_threads import in_parallel
from slidr.sparse.gather import scratch
from slidr.sparse.kernel_map import KernelMap
from slidr.urls import redacting_logger

_TILE_FLOATS = 2**17  # of a tile of output rows: half a megabyte, which a core's cache holds
_ORDER = {"convolve": CONVOLVE, "weight_gradient": WEIGHT_GRADIENT, "transpose": TRANSPOSE}
# Channels and pairs whose rows the weight gradient keeps in the cache. In chunks of 32, 64, 128, 256 its relative error
# against float64 is 4.0e-7, 3.1e-7, 2.9e-7, 3.2e-7 on 15000 random pairs of 96 channels; one BLAS product's is 3.0e-7.
_BLOCK, _CHUNK = 64, 128

_log = redacting_logger(__name__)


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether these kernels can run this convolution: float32 on a CPU they know, channels in multiples of 8."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and weight.dtype == torch.float32
        and weight.shape[1] % 8 == 0 < weight.shape[1]
        and weight.shape[2] % 8 == 0 < weight.shape[2]
        and available()
    )


@functools.cache
def available() -> bool:
    """Whether they run here. The first call compiles them, or else logs a warning that says why it could not."""
    found = obstacle()
    if found is not None:
        _log.warning("sparse convolutions gather, which takes longer on a CPU: %s; next: %s", found.what, found.next)
    return found is None


@dataclass(frozen=True)
class Obstacle:
    """Why these kernels cannot run in this process, and what would help."""

    what: str
    next: str


@functools.cache
def obstacle() -> Obstacle | None:
    """What keeps these kernels from running, if anything: tries llvmlite and the compilation, once a process."""
    try:
        import llvmlite.binding
    except ModuleNotFoundError as error:
        if error.name == "llvmlite":
            return Obstacle("llvmlite is not installed", "pip install llvmlite")
        return _broken(error)
    except Exception as error:  # whatever a damaged installation raises, gathering needs none of it
        return _broken(error)
    try:
        if _shape() is None:
            return Obstacle(
                f"this processor ({llvmlite.binding.get_host_cpu_name()}) has no AVX2 with fused multiply-adds",
                "use a processor that has them (Intel since 2013, AMD since 2015; a virtual machine may hide them)",
            )
        _kernels()
    except Exception as error:  # LLVM knows of more ways to fail than can be listed
        return Obstacle(
            f"llvmlite {llvmlite.__version__} cannot compile them for this processor ({_say(error)})",
            "pip install --upgrade llvmlite",
        )
    return None


def _broken(error: Exception) -> Obstacle:
    return Obstacle(f"llvmlite is there but does not load ({_say(error)})", "pip install --force-reinstall llvmlite")


def _say(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def convolve(x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], kernel_map: KernelMap) -> Float[Tensor, "W D"]:
    """out[o] = sum over the pairs (i, o, k) of x[i] @ weight[k]."""
    offsets, channels, columns = weight.shape
    _require("weight", weight, (len(kernel_map.counts), channels, columns))
    _require("x", x, (kernel_map.num_inputs, channels))
    x, weight = x.contiguous(), weight.contiguous()
    tiles = tiles_of(kernel_map, columns)
    out = x.new_empty(kernel_map.num_outputs, columns)
    cut = _Panels(columns)
    _kernels().run(
        "convolve",
        {
            "tasks": tiles.count,
            "x": x,
            "w": weight,
            "out": out,
            "input_rows": tiles.input_rows,
            "output_rows": tiles.output_rows,
            "bounds": tiles.bounds,
            "channels": channels,
            "columns": columns,
            "offsets": offsets,
            "tile_rows": tiles.rows,
            "rows": kernel_map.num_outputs,
            **cut.arguments,
        },
    )
    return out


def input_gradient(
    weight: Float[Tensor, "K C D"], grad: Float[Tensor, "W D"], kernel_map: KernelMap
) -> Float[Tensor, "V C"]:
    """dx[i] = sum over the pairs (i, o, k) of grad[o] @ weight[k]^T."""
    return convolve(grad, transpose(weight), kernel_map.transposed())


def transpose(weight: Float[Tensor, "K C D"]) -> Float[Tensor, "K D C"]:
    """A contiguous copy of every offset's transposed matrix: PyTorch takes three to five times as long for it."""
    offsets, channels, columns = weight.shape
    weight = weight.contiguous()
    out = scratch("transposed", weight, offsets * columns, channels).view(offsets, columns, channels)
    blocks = columns // BLOCK
    _kernels().run(
        "transpose",
        {
            "tasks": offsets * blocks,
            "w": weight,
            "out": out,
            "channels": channels,
            "columns": columns,
            "blocks": blocks,
        },
    )
    return out


def weight_gradient(
    x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], grad: Float[Tensor, "W D"], kernel_map: KernelMap
) -> Float[Tensor, "K C D"]:
    """dweight[k] = sum over the pairs (i, o, k) of x[i]^T grad[o]."""
    offsets, channels, columns = weight.shape
    _require("weight", weight, (len(kernel_map.counts), channels, columns))
    _require("x", x, (kernel_map.num_inputs, channels))
    _require("grad", grad, (kernel_map.num_outputs, columns))
    x, grad = x.contiguous(), grad.contiguous()
    out = torch.empty_like(weight, memory_format=torch.contiguous_format)
    block = _BLOCK
    while block > 8 and offsets * -(-channels // block) < 4 * torch.get_num_threads():  # tasks for every thread
        block //= 2
    blocks = -(-channels // block)
    bounds = np.concatenate([[0], np.cumsum(kernel_map.counts)]).astype(np.int64)
    cut = _Panels(columns)
    _kernels().run(
        "weight_gradient",
        {
            "tasks": offsets * blocks,
            "x": x,
            "g": grad,
            "dw": out,
            "input_rows": kernel_map.input_rows.contiguous(),
            "output_rows": kernel_map.output_rows.contiguous(),
            "bounds": bounds,
            "channels": channels,
            "columns": columns,
            "block": block,
            "blocks": blocks,
            "chunk": _CHUNK,
            **cut.arguments,
        },
    )
    return out


@dataclass(frozen=True)
class PairTiles:
    """A map's pairs by offset and tile of output rows: those of (k, t) are ``bounds[k, t]`` to ``bounds[k, t + 1]``."""

    input_rows: Int64[Tensor, " P"]
    output_rows: Int64[Tensor, " P"]
    bounds: Int64[Tensor, "K T+1"]
    rows: int  # output rows of a tile

    @property
    def count(self) -> int:
        return self.bounds.shape[1] - 1


def tiles_of(kernel_map: KernelMap, columns: int) -> PairTiles:
    """Tiles that fit the cache with `columns` channels and keep all threads busy, made once and kept with the map."""
    busy = kernel_map.num_outputs // (4 * torch.get_num_threads())
    rows = 2 ** (max(32, min(_TILE_FLOATS // columns, busy)).bit_length() - 1)
    name = ("cpu tiles", rows)
    if name not in kernel_map.kept:
        kernel_map.kept[name] = cut_tiles(kernel_map, rows)
    return kernel_map.kept[name]


def cut_tiles(kernel_map: KernelMap, rows: int) -> PairTiles:
    """The pairs of a map by offset and tile of `rows` output rows."""
    inputs, outputs, many = kernel_map.input_rows, kernel_map.output_rows, kernel_map.num_outputs
    offset = torch.repeat_interleave(torch.arange(len(kernel_map.counts)), torch.tensor(kernel_map.counts))
    place = offset * many + outputs
    if bool((place[1:] < place[:-1]).any()):  # rows in no order of space
        place, order = torch.sort(place, stable=True)
        inputs, outputs = inputs[order], outputs[order]
    edges = torch.arange(0, many + rows, rows).clamp(max=many)
    first = torch.arange(len(kernel_map.counts))[:, None] * many
    return PairTiles(inputs.contiguous(), outputs.contiguous(), torch.searchsorted(place, first + edges), rows)


class _Panels:
    """How columns are cut, as arguments; holds the arrays that these point to."""

    def __init__(self, columns: int) -> None:
        shape = _shape()
        assert shape is not None
        cut = np.array(panels(columns, shape), np.int64).T.copy()
        self.arguments = {"panel_columns": cut[0], "panel_kinds": cut[1], "panels": cut.shape[1]}


class Kernels:
    """The compiled kernels of one shape, and the threads that run them."""

    def __init__(self, shape: Shape) -> None:
        import llvmlite.binding as llvm

        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
        )
        compiled = llvm.parse_assembly(module(shape))
        compiled.verify()
        # Straight to machine code: written as it is, the optimizer's passes gain nothing and take three times as long.
        self._engine = llvm.create_mcjit_compiler(compiled, machine)  # owns the code
        self._engine.finalize_object()

    def run(self, name: str, arguments: dict[str, Any]) -> None:
        """Calls an entry point on as many threads as torch uses; returns when its tasks are done."""
        order = _ORDER[name]
        values = np.array([0, *(_number(arguments[argument]) for argument in order[1:])], np.int64)
        in_parallel(self._engine.get_function_address(name), values.ctypes.data, (values, arguments))


def _require(name: str, got: Tensor, shape: tuple[int, ...]) -> None:
    """Kernels read addresses: what is not as they take it to be must not reach them."""
    if tuple(got.shape) != shape or got.device.type != "cpu" or got.dtype != torch.float32:
        raise ValueError(
            f"sparse convolution: got {name} {tuple(got.shape)} {got.dtype} on {got.device}, expected {shape} "
            "torch.float32 on the CPU; do the layer's channels and the coordinates fit the features?"
        )


def _number(value: int | Tensor | np.ndarray) -> int:
    """A number, or the address of an array."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return value.ctypes.data if isinstance(value, np.ndarray) else value


@functools.cache
def _kernels() -> Kernels:
    shape = _shape()
    assert shape is not None
    return Kernels(shape)


@functools.cache
def _shape() -> Shape | None:
    """The register tile for this processor; None where it lacks what the kernels need."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return NEON
    import llvmlite.binding as llvm

    has = llvm.get_host_cpu_features()
    if has.get("avx512f", False):
        return AVX512
    return AVX2 if has.get("avx2", False) and has.get("fma", False) else None
