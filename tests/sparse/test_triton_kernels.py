"""Triton's kernels against the gather algorithm: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from slidr.sparse import Convolution, CoordinateManager, SparseTensor, TransposedConvolution, choice, gather
from slidr.sparse.functional import sparse_conv
from slidr.sparse.kernel_map import KernelMap
from slidr.sparse.tiles import ROWS, chunks_of, cut_into_tiles, tiles_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: it comes with torch's CUDA build, and .ci/run installs it",
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def manager(voxels: int = 100, span: int = 6, seed: int = 0, clouds: int = 2) -> CoordinateManager:
    drawn = np.random.default_rng(seed).integers((0, 0, 0, 0), (clouds, span, span, span), (voxels, 4))
    return CoordinateManager(torch.from_numpy(np.unique(drawn, axis=0).astype(np.int32)).to(DEVICE))


def maps(**cloud: Any) -> dict[str, KernelMap]:
    m = manager(**cloud)
    one, two = (1, 1, 1), (2, 2, 2)
    down = m.downsample(one, two)
    window, _ = manager(**cloud).window(one, (3, 3, 3), two, one, (6, 6, 6))
    return {
        "submanifold": m.submanifold(one, (3, 3, 3)),
        "strided": down,
        "transposed": m.upsample(two, two),
        "window": window,
        "line": m.submanifold(one, (3, 1, 1)),
    }


KINDS = ["submanifold", "strided", "transposed", "window", "line"]


def operands(kernel_map: KernelMap, c: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(kernel_map.num_inputs, c), (len(kernel_map.counts), c, d), (kernel_map.num_outputs, d)]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for s in shapes)


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


def all_three(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, kernel_map: KernelMap) -> dict[str, Any]:
    from slidr.sparse import triton_kernels

    return {
        "forward": triton_kernels.convolve(x, weight, kernel_map),
        "input gradient": triton_kernels.input_gradient(weight, grad, kernel_map),
        "weight gradient": triton_kernels.weight_gradient(x, weight, grad, kernel_map),
    }


def by_gather(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, kernel_map: KernelMap) -> dict[str, Any]:
    to_x, to_weight = gather.gradients(x, weight, grad, kernel_map, True, True)
    return {"forward": gather.convolve(x, weight, kernel_map), "input gradient": to_x, "weight gradient": to_weight}


@needs_triton
@pytest.mark.parametrize(
    ("kind", "channels"), [*itertools.product(KINDS, [(16, 32), (9, 17)]), ("strided", (72, 40)), ("line", (33, 130))]
)
def test_triton_equals_gather_in_all_directions(kind: str, channels: tuple[int, int]) -> None:
    kernel_map = maps()[kind]
    given = operands(kernel_map, *channels, torch.float32)
    expected = by_gather(*(t.double() for t in given), kernel_map)
    for name, got in all_three(*given, kernel_map).items():
        assert got.dtype == torch.float32
        assert far(got, expected[name]) < TOLERANCE[torch.float32], name


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_half_precision_inputs_are_kept_in_float32(dtype: torch.dtype) -> None:
    kernel_map = maps()["submanifold"]
    given = operands(kernel_map, 40, 24, dtype)
    expected = by_gather(*(t.double() for t in given), kernel_map)
    for name, got in all_three(*given, kernel_map).items():
        assert got.dtype == dtype
        # Rounded once, at the end: no further from the exact sum than its own rounding (the interpreter cuts off).
        rounding = far(expected[name].to(dtype), expected[name])
        assert far(got, expected[name]) < (1.1 if DEVICE == "cuda" else 2.2) * rounding, name


@needs_triton
@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_pairs_get_zeros_and_empty_clouds_get_nothing(kind: str) -> None:
    some = maps()[kind]
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    kernels = len(some.counts)
    without_pairs = KernelMap(nothing, nothing, (0,) * kernels, 5, 70)
    empty = maps(voxels=0)[kind]
    for kernel_map in (without_pairs, empty):
        for name, got in all_three(*operands(kernel_map, 16, 16, torch.float32), kernel_map).items():
            expected = {"forward": kernel_map.num_outputs, "input gradient": kernel_map.num_inputs}.get(name, kernels)
            assert len(got) == expected
            assert not got.any()


@needs_triton
def test_chunks_of_one_offset_add_up() -> None:
    kernel_map = maps(voxels=700, span=9)["submanifold"]
    assert len(chunks_of(kernel_map, 256)) > len(kernel_map.counts), "some offset takes several chunks"
    given = operands(kernel_map, 16, 16, torch.float32)
    expected = by_gather(*(t.double() for t in given), kernel_map)["weight gradient"]
    assert far(all_three(*given, kernel_map)["weight gradient"], expected) < TOLERANCE[torch.float32]


@needs_triton
def test_triton_results_repeat_bit_for_bit() -> None:
    kernel_map = maps()["submanifold"]
    given = operands(kernel_map, 16, 16, torch.float32)
    first, second = all_three(*given, kernel_map), all_three(*given, kernel_map)
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="float64 runs in the interpreter only")
@pytest.mark.parametrize("kind", KINDS)
def test_triton_gradients_agree_with_finite_differences(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.SWITCH, "triton")
    kernel_map = maps(voxels=25, span=4, clouds=1)[kind]
    x, weight, _ = operands(kernel_map, 9, 10, torch.float64)

    def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return sparse_conv(x, weight, kernel_map)

    arguments = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(convolved, arguments, nondet_tol=0.0, fast_mode=True)


@needs_triton
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_gives_the_same_by_either_algorithm(precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [Convolution(8, 12), Convolution(12, 10, 2, stride=2), Convolution(10, 9), TransposedConvolution(9, 8)]
    model = torch.nn.Sequential(*layers).to(DEVICE)
    base = manager(voxels=40).coordinates((1, 1, 1))
    features = torch.randn(len(base), 8, device=DEVICE)
    results = {}
    for algorithm in ("gather", "triton"):
        monkeypatch.setenv(choice.SWITCH, algorithm)
        model.zero_grad()
        with torch.autocast(DEVICE, precision, enabled=precision != torch.float32):
            out = model(SparseTensor(features, base)).features
        (out.float() * torch.linspace(-1, 1, 8, device=DEVICE)).sum().backward()
        assert out.dtype == precision
        results[algorithm] = [out.detach(), *(p.grad for p in model.parameters())]
    for got, expected in zip(results["triton"], results["gather"], strict=True):
        assert far(got, expected) < (1e-5 if precision == torch.float32 else 3e-2)


COMPILE = """
import re, subprocess, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slidr.sparse import triton_kernels as kernels

def resources(kernel, types, constants, capability, warps):
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types},
    )
    options = {"num_warps": warps, "num_stages": kernels.STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    words = re.findall(r"cp[.]async[.]c[ag][.]shared[.]global[^;]*?, (0x[0-9a-f]+|[0-9]+), ", compiled.asm["ptx"])
    local = len(re.findall(r"[.]local", compiled.asm["ptx"]))
    print(compiled.metadata.shared, local, max(int(word, 0) for word in words), "mma" in compiled.asm["ptx"])

C, D = 96, 128
shared = {"C": C, "D": D, "BLOCK_D": 128, "SUM": tl.float32, "PRECISION": "ieee", "WIDEN": False}
lists = {n: "*i32" for n in ("rows_of_tile", "first_block", "offset_of_block", "rows_of_block")}
for capability in (80, 90):
    for forward in (True, False):
        strides = {"stride_k": "i32", "stride_c" if forward else "stride_d": "i32"}
        one = {"stride_d" if forward else "stride_c": 1}
        types = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", **lists, **strides}
        constants = {**shared, **one, "M": kernels.ROWS, "BLOCK_C": 64}
        resources(kernels._convolve, types, constants, capability, 4)
    rows = {"input_rows": "*i64", "output_rows": "*i64", "first_pair": "*i32", "last_pair": "*i32"}
    types = {"x": "*bf16", "grad": "*bf16", "partial": "*fp32", **rows}
    resources(kernels._weight_gradient, types, {**shared, "BLOCK_P": 64, "BLOCK_C": 128}, capability, 8)
"""


@needs_triton
def test_kernels_compile_for_data_centre_gpus_to_tensor_cores_and_wide_asynchronous_copies() -> None:
    compiles = {**os.environ, "TRITON_INTERPRET": "0"}  # the compiler needs no GPU
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True, env=compiles)
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) == 6
    for shared_bytes, spills, widest_copy, tensor_cores in kernels:
        assert int(shared_bytes) <= 160 * 1024, "an A100's limit for one program is 163 KiB"
        assert spills == "0"
        assert (widest_copy, tensor_cores) == ("16", "True")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, ROWS])
def test_tiles_hold_every_pair_once_and_every_output_row_once(kind: str, size: int) -> None:
    kernel_map = maps()[kind]
    tiles = cut_into_tiles(kernel_map, size)
    rows = tiles.rows_of_tile.flatten().tolist()
    assert sorted(r for r in rows if r >= 0) == list(range(kernel_map.num_outputs))
    found = []
    for t, (first, last) in enumerate(zip(tiles.first_block[:-1], tiles.first_block[1:], strict=True)):
        for block in range(first, last):
            inputs = tiles.rows_of_block[block].tolist()
            assert max(inputs) >= 0, "no block is empty"
            outputs = tiles.rows_of_tile[t].tolist()
            k = int(tiles.offset_of_block[block])
            found += [(k, i, o) for i, o in zip(inputs, outputs, strict=True) if i >= 0]
    offset = np.repeat(np.arange(len(kernel_map.counts)), kernel_map.counts)
    pairs = zip(offset.tolist(), kernel_map.input_rows.tolist(), kernel_map.output_rows.tolist(), strict=True)
    assert sorted(found) == sorted(pairs)
    lengths = torch.diff(tiles.first_block)
    assert torch.equal(lengths, lengths.sort(descending=True).values), "long tiles come first"


def test_tiles_of_a_submanifold_map_serve_its_transposed_map_too() -> None:
    kernel_map = maps()["submanifold"]
    first, twin = tiles_of(kernel_map), tiles_of(kernel_map.transposed())
    fresh = cut_into_tiles(kernel_map.transposed())
    assert twin.rows_of_block is first.rows_of_block
    for tiles in (twin, fresh):
        triples = {
            (int(tiles.offset_of_block[b]), i, o)
            for t in range(len(tiles))
            for b in range(int(tiles.first_block[t]), int(tiles.first_block[t + 1]))
            for i, o in zip(tiles.rows_of_block[b].tolist(), tiles.rows_of_tile[t].tolist(), strict=True)
            if i >= 0
        }
        if tiles is twin:
            expected = triples
    assert triples == expected


def test_tiles_of_kernels_with_more_offsets_than_a_sorting_key_has_bits_are_whole() -> None:
    kernel_map = manager().submanifold((1, 1, 1), (5, 5, 5))
    assert int((cut_into_tiles(kernel_map).rows_of_block >= 0).sum()) == kernel_map.num_pairs


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_fastest", {})
    monkeypatch.delenv(choice.SWITCH, raising=False)


@pytest.mark.usefixtures("nothing_measured")
def test_the_faster_algorithm_is_measured_once_for_each_size_class_and_direction() -> None:
    kernel_map = maps()["submanifold"]
    x, weight, _ = operands(kernel_map, 8, 8, torch.float32)
    seconds = {"gather": 2.0, "triton": 1.0}
    asked: list[str] = []

    def ask(direction: Any, x: torch.Tensor = x) -> str:
        candidates: Any = {name: (lambda name=name: name) for name in seconds}

        def measure(run: Callable[[], Any]) -> float:
            asked.append(run())
            return seconds[run()]

        return choice.choose(direction, x, weight, kernel_map, candidates, measure)

    assert ask("forward") == "triton"
    seconds["gather"] = 0.5  # too late for what was measured, in time for other directions and types
    assert ask("forward") == "triton"
    assert len(asked) == 2
    assert ask("input gradient") == "gather"
    assert ask("forward", x.bfloat16()) == "gather"
    assert len(asked) == 6


@pytest.mark.usefixtures("nothing_measured")
def test_gathering_goes_on_where_triton_does_not_run(caplog: pytest.LogCaptureFixture) -> None:
    kernel_map = maps()["submanifold"]
    x, weight, _ = operands(kernel_map, 8, 8, torch.float32)

    def broken() -> None:
        raise RuntimeError("Failed to find C compiler")

    def measure(run: Callable[[], Any]) -> float:
        run()
        return 1.0

    candidates: Any = {"gather": lambda: None, "triton": broken}
    for direction in ("forward", "input gradient"):
        assert choice.choose(direction, x, weight, kernel_map, candidates, measure) == "gather"  # type: ignore[arg-type]
    assert [record.getMessage().count("Failed to find C compiler") for record in caplog.records] == [1]


@pytest.mark.usefixtures("nothing_measured")
def test_triton_runs_where_gathering_does_not_fit_into_memory() -> None:
    kernel_map = maps()["submanifold"]
    x, weight, _ = operands(kernel_map, 8, 8, torch.float32)

    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def measure(run: Callable[[], Any]) -> float:
        run()
        return 1.0

    candidates: Any = {"gather": too_large, "triton": lambda: None}
    assert choice.choose("forward", x, weight, kernel_map, candidates, measure) == "triton"
    assert list(choice.chosen().values()) == ["triton"]


@pytest.mark.usefixtures("nothing_measured")
def test_a_gpu_that_is_full_for_the_moment_decides_nothing_for_later() -> None:
    kernel_map = maps()["submanifold"]
    x, weight, _ = operands(kernel_map, 8, 8, torch.float32)
    full = [True]

    def triton() -> None:
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def measure(run: Callable[[], Any]) -> float:
        run()
        return 1.0 if run is triton else 2.0

    candidates: Any = {"gather": lambda: None, "triton": triton}
    assert choice.choose("forward", x, weight, kernel_map, candidates, measure) == "gather"
    full[0] = False
    assert choice.choose("forward", x, weight, kernel_map, candidates, measure) == "triton"


@pytest.mark.usefixtures("nothing_measured")
def test_tf32_products_are_measured_apart_from_whole_ones() -> None:
    kernel_map = maps()["submanifold"]
    x, weight, _ = operands(kernel_map, 8, 8, torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            choice.choose("forward", x, weight, kernel_map, {"gather": int, "triton": int}, lambda run: 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(choice.chosen()) == 2


@needs_triton
def test_float32_products_are_whole_unless_tf32_is_allowed_by_either_of_its_names() -> None:
    from slidr.sparse import triton_kernels

    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert triton_kernels._precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert triton_kernels._precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"  # torch's newer name; reading the older one raises from here on
        assert triton_kernels._precision() == "tf32"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)


def test_a_forced_algorithm_that_does_not_exist_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.SWITCH, "fast")
    kernel_map = maps()["submanifold"]
    x, weight, _ = operands(kernel_map, 8, 8, torch.float32)
    with pytest.raises(ValueError, match=r"got 'fast', expected one of .*gather"):
        sparse_conv(x, weight, kernel_map)


def test_forcing_triton_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.SWITCH, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernel_map = maps()["submanifold"]
    x, weight, _ = (t.cpu() for t in operands(kernel_map, 8, 8, torch.float32))
    with pytest.raises(ValueError, match=r"SLIDR_SPARSE=triton: (got tensors on cpu|triton is not installed)"):
        choice.choose("forward", x, weight, kernel_map, {})


@needs_cuda
@needs_triton
@pytest.mark.usefixtures("nothing_measured")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cuda_every_direction_is_chosen_by_measurement_and_stays_close_to_float64(dtype: torch.dtype) -> None:
    kernel_map = maps(voxels=4000, span=24)["submanifold"]
    given = operands(kernel_map, 64, 96, dtype)
    x, weight, grad = given
    leaves = x.requires_grad_(), weight.requires_grad_()
    out = sparse_conv(*leaves, kernel_map)
    out.backward(grad)
    expected = by_gather(*(t.detach().double() for t in given), kernel_map)
    got = {"forward": out, "input gradient": x.grad, "weight gradient": weight.grad}
    assert {key[0] for key in choice._fastest} == set(got)
    for name, value in got.items():
        assert value is not None
        assert far(value.detach(), expected[name]) < TOLERANCE[dtype], name
