"""The CPU's compiled kernels against plain loops, the gather algorithm, and themselves on other threads and vectors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidr.models.minkunet import MinkUNet14
from slidr.sparse import Convolution, CoordinateManager, SparseTensor, choice, cpu_kernels, cpu_threads, gather
from slidr.sparse.cpu_ir import AVX2, AVX512, NEON, Shape, panels
from slidr.sparse.kernel_map import KernelMap

pytestmark = pytest.mark.skipif(
    not cpu_kernels.available(), reason="needs llvmlite and a processor with fused multiply-adds"
)
ONE, TWO, THREE = (1, 1, 1), (2, 2, 2), (3, 3, 3)


def voxels(count: int, span: int, seed: int, in_order: bool = True) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    rows = np.unique(rng.integers(0, (2, span, span, span), (count, 4)), axis=0).astype(np.int32)
    return torch.from_numpy(rows if in_order else rng.permutation(rows))


def maps(count: int = 400, span: int = 9, seed: int = 0, in_order: bool = True) -> dict[str, KernelMap]:
    manager = CoordinateManager(voxels(count, span, seed, in_order))
    window, _ = CoordinateManager(voxels(count, span, seed)).window(ONE, THREE, TWO, ONE, (span, span, span))
    return {
        "submanifold": manager.submanifold(ONE, THREE),
        "strided": manager.downsample(ONE, TWO),
        "transposed": manager.upsample(TWO, TWO),
        "window": window,
        "pointwise": manager.submanifold(ONE, ONE),
    }


KINDS = ["submanifold", "strided", "transposed", "window", "pointwise"]


def operands(kernel_map: KernelMap, c: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, weights and gradients of outputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = (kernel_map.num_inputs, c), (len(kernel_map.counts), c, d), (kernel_map.num_outputs, d)
    x, weight, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, grad


def all_three(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, kernel_map: KernelMap) -> list[torch.Tensor]:
    return [
        cpu_kernels.convolve(x, weight, kernel_map),
        cpu_kernels.input_gradient(weight, grad, kernel_map),
        cpu_kernels.weight_gradient(x, weight, grad, kernel_map),
    ]


def assert_near(got: list[torch.Tensor], expected: list[torch.Tensor | None]) -> None:
    for name, a, b in zip(("out", "input gradient", "weight gradient"), got, expected, strict=True):
        assert b is not None
        assert float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) < 1e-6, name


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, where it is often zero by luck: what a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("channels", [(8, 8), (16, 24), (96, 128), (40, 56), (72, 200)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_both_gradients_match_the_gather_algorithm_in_float64(kind: str, channels: tuple[int, int]) -> None:
    kernel_map = maps()[kind]
    given = operands(kernel_map, *channels)
    x, weight, grad = (t.double() for t in given)
    expected = [gather.convolve(x, weight, kernel_map), *gather.gradients(x, weight, grad, kernel_map, True, True)]
    assert_near(all_three(*given, kernel_map), expected)


def test_every_sum_is_that_of_a_plain_loop_over_pairs() -> None:
    kernel_map = maps(count=60, span=4)["submanifold"]
    x, weight, grad = operands(kernel_map, 8, 16)
    offset = np.repeat(np.arange(27), kernel_map.counts)
    out, dx, dw = (torch.zeros_like(t, dtype=torch.float64) for t in (grad, x, weight))
    for k, i, o in zip(offset, kernel_map.input_rows.tolist(), kernel_map.output_rows.tolist(), strict=True):
        out[o] += x[i].double() @ weight[k].double()
        dx[i] += weight[k].double() @ grad[o].double()
        dw[k] += torch.outer(x[i].double(), grad[o].double())
    assert_near(all_three(x, weight, grad, kernel_map), [out, dx, dw])


@pytest.mark.parametrize("kind", ["submanifold", "strided", "transposed"])
def test_rows_in_no_order_of_space_give_the_same_as_the_gather_algorithm(kind: str) -> None:
    kernel_map = maps(in_order=False)[kind]
    given = operands(kernel_map, 16, 32)
    x, weight, grad = (t.double() for t in given)
    expected = [gather.convolve(x, weight, kernel_map), *gather.gradients(x, weight, grad, kernel_map, True, True)]
    assert_near(all_three(*given, kernel_map), expected)


@given(count=st.integers(1, 300), span=st.integers(1, 12), seed=st.integers(0, 10**6), kind=st.sampled_from(KINDS))
@settings(max_examples=40, deadline=None)
def test_random_clouds_match_the_gather_algorithm(count: int, span: int, seed: int, kind: str) -> None:
    kernel_map = maps(count, max(span, 3), seed)[kind]
    given = operands(kernel_map, 24, 8)
    x, weight, grad = (t.double() for t in given)
    expected = [gather.convolve(x, weight, kernel_map), *gather.gradients(x, weight, grad, kernel_map, True, True)]
    assert_near(all_three(*given, kernel_map), expected)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_number_of_threads_nor_on_who_starts_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_map = maps(count=2000, span=16)[kind]
    given = operands(kernel_map, 40, 56)
    torch.set_num_threads(1)
    alone = all_three(*given, kernel_map)
    torch.set_num_threads(3)
    assert all(torch.equal(a, b) for a, b in zip(alone, all_three(*given, kernel_map), strict=True))
    monkeypatch.setattr(cpu_threads, "openmp_team", lambda: None)  # no OpenMP library to be found
    assert all(torch.equal(a, b) for a, b in zip(alone, all_three(*given, kernel_map), strict=True))


@pytest.mark.parametrize("shape", [AVX512, AVX2, NEON], ids=["avx512", "avx2", "neon"])
def test_results_do_not_depend_on_the_width_of_the_vectors(shape: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_map = maps()["submanifold"]
    given = operands(kernel_map, 40, 104)
    expected = all_three(*given, kernel_map)
    compiled = cpu_kernels.Kernels(shape)  # of vectors that this processor lacks LLVM makes narrower ones
    monkeypatch.setattr(cpu_kernels, "_shape", lambda: shape)
    monkeypatch.setattr(cpu_kernels, "_kernels", lambda: compiled)
    assert all(torch.equal(a, b) for a, b in zip(expected, all_three(*given, kernel_map), strict=True))


@given(eighths=st.integers(1, 200), shape=st.sampled_from([AVX512, AVX2, NEON]))
def test_panels_cover_every_column_once_and_in_order(eighths: int, shape: Shape) -> None:
    covered = []
    for first, kind in panels(8 * eighths, shape):
        count, width = shape.kinds[kind]
        covered += range(first, first + count * width)
    assert covered == list(range(8 * eighths))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape", [(27, 8, 8), (8, 24, 40), (1, 96, 16), (3, 256, 104)], ids=str)
def test_every_matrix_is_transposed(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cpu_kernels.transpose(weight), weight.transpose(1, 2))


@pytest.mark.usefixtures("poisoned")
def test_outputs_without_pairs_are_zero_and_so_are_gradients_of_offsets_without_pairs() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    kernel_map = KernelMap(nothing, nothing, (0,) * 8, 3, 5)
    x, weight, grad = operands(kernel_map, 16, 24)
    out, dx, dw = all_three(x, weight, grad, kernel_map)
    assert out.shape == (5, 24)
    assert dx.shape == (3, 16)
    assert not out.any()
    assert not dx.any()
    assert not dw.any()
    empty = KernelMap(nothing, nothing, (0,) * 8, 0, 0)
    assert [t.numel() for t in all_three(x[:0], weight, grad[:0], empty)[:2]] == [0, 0]


def test_what_does_not_fit_is_refused_before_an_address_is_read() -> None:
    kernel_map = maps()["submanifold"]
    x, weight, grad = operands(kernel_map, 16, 24)
    for wrong in (x[:, :8], x[:-1], x.double()):
        with pytest.raises(ValueError, match="got x"):
            cpu_kernels.convolve(wrong, weight, kernel_map)
        with pytest.raises(ValueError, match="got x"):
            cpu_kernels.weight_gradient(wrong, weight, grad, kernel_map)
    with pytest.raises(ValueError, match="got weight"):
        cpu_kernels.convolve(x, weight[:8], kernel_map)
    with pytest.raises(ValueError, match="got weight"):
        cpu_kernels.convolve(x, weight.to("meta"), kernel_map)
    with pytest.raises(ValueError, match="got grad"):
        cpu_kernels.weight_gradient(x, weight, grad[:, :16], kernel_map)


def test_strided_and_transposed_views_are_read_as_what_they_hold() -> None:
    kernel_map = maps()["submanifold"]
    x, weight, grad = operands(kernel_map, 16, 24)
    views = x.t().contiguous().t(), weight.transpose(1, 2).contiguous().transpose(1, 2), grad.repeat(1, 2)[:, :24]
    for a, b in zip(all_three(*views, kernel_map), all_three(x, weight, grad, kernel_map), strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(choice.SWITCH, raising=False)


@pytest.mark.usefixtures("unforced")
def test_they_run_wherever_they_can_and_gathering_does_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_map = maps()["submanifold"]

    def chosen(c: int, d: int, dtype: torch.dtype = torch.float32) -> str:
        x, weight, _ = operands(kernel_map, c, d)
        return choice.choose("forward", x.to(dtype), weight.to(dtype), kernel_map, {})

    assert chosen(16, 24) == "cpu"
    assert (
        chosen(16, 20) == chosen(17, 24) == chosen(16, 24, torch.float64) == chosen(16, 24, torch.bfloat16) == "gather"
    )
    monkeypatch.setenv(choice.SWITCH, "gather")
    assert chosen(16, 24) == "gather"
    monkeypatch.setenv(choice.SWITCH, "cpu")
    assert (chosen(16, 24), chosen(16, 20)) == ("cpu", "gather")
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    monkeypatch.delenv(choice.SWITCH)
    assert chosen(16, 24) == "gather"


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("why", ["gathering is forced", "the kernels are not available"])
def test_a_network_and_its_gradients_are_those_of_the_gather_algorithm(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinates = voxels(1500, 40, seed=3, in_order=False)
    features = torch.rand(len(coordinates), 1, generator=torch.Generator().manual_seed(0))

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = MinkUNet14(1, 16, width=0.5)
        out = model(SparseTensor(features, coordinates)).features
        (out * out.detach().roll(1, 0)).sum().backward()
        return out.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    calls: list[str] = []
    run = cpu_kernels.Kernels.run
    monkeypatch.setattr(cpu_kernels.Kernels, "run", lambda *call: (calls.append(call[1]), run(*call)))
    out, grads = step()
    assert set(calls) == {"convolve", "transpose", "weight_gradient"}
    calls.clear()
    if why == "gathering is forced":
        monkeypatch.setenv(choice.SWITCH, "gather")
    else:
        monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    expected, expected_grads = step()
    assert not calls
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert len(grads) == len(expected_grads)
    scale = max(float(g.norm()) for g in expected_grads)
    assert max(float((a - b).norm()) for a, b in zip(grads, expected_grads, strict=True)) < 1e-4 * scale


@pytest.mark.usefixtures("unforced")
@pytest.mark.parametrize("forced", [None, "cpu", "gather"])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_autocast_keeps_its_own_precision(
    kernel_size: int, forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if forced is not None:
        monkeypatch.setenv(choice.SWITCH, forced)
    coordinates = voxels(400, 9, seed=0)
    x = torch.randn(len(coordinates), 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer = Convolution(16, 24, kernel_size)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(SparseTensor(x, coordinates)).features
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None
    assert layer.kernel.grad is not None
    assert x.grad.dtype == layer.kernel.grad.dtype == torch.float32
    whole = layer(SparseTensor(x, coordinates)).features
    assert whole.dtype == torch.float32
    assert 0 < float((out - whole).detach().norm() / whole.detach().norm()) < 0.02


@pytest.mark.usefixtures("threads")
def test_python_threads_that_call_kernels_at_once_get_what_each_gets_alone() -> None:
    torch.set_num_threads(2)
    work = [(maps(count=1500, span=14, seed=seed)["submanifold"], 16 + 8 * seed) for seed in range(3)]
    given = [operands(kernel_map, channels, 40) for kernel_map, channels in work]
    alone = [all_three(*arrays, kernel_map) for arrays, (kernel_map, _) in zip(given, work, strict=True)]
    begin = threading.Barrier(len(work))

    def again(n: int) -> bool:
        kernel_map = maps(count=1500, span=14, seed=n)["submanifold"]  # nothing kept yet
        begin.wait(60)
        results = [all_three(*given[n], kernel_map) for _ in range(20)]
        return all(torch.equal(a, b) for result in results for a, b in zip(result, alone[n], strict=True))

    with ThreadPoolExecutor(len(work)) as pool:
        assert all(pool.map(again, range(len(work)), timeout=120))
