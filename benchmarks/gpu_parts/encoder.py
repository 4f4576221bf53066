"""The teacher: the largest part of a step. As it is, in channels_last, as a CUDA graph, and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from gpu_parts.bench import Bench, Mode, relative
from gpu_parts.floors import teacher_work
from gpu_parts.rows import NO_GPU, Row
from slidr.models.teachers import Teacher, build_teacher

CLOSE = 4e-2  # of a faster variant in bfloat16 from the plain one, both rounded in their own order


def _built(bench: Bench) -> tuple[Teacher, Tensor]:
    torch.manual_seed(0)
    teacher = build_teacher(bench.size.teacher).to(bench.device).train()
    return teacher, bench.batch().images.to(bench.device)


def _forward(bench: Bench, teacher: Teacher, images: Tensor, mode: Mode) -> Tensor:
    with torch.no_grad(), bench.arithmetic(mode):
        return teacher.coarse(images).features


def teacher(bench: Bench) -> Iterator[Row]:
    network, images = _built(bench)
    work = teacher_work(bench, len(images))
    name = f"teacher, {len(images)} images"
    for mode in bench.modes:
        took = bench.milliseconds(lambda mode=mode: _forward(bench, network, images, mode))
        peak = bench.peak_bytes(lambda mode=mode: _forward(bench, network, images, mode))
        note = f"{work.flop / 1e12:.2f} TFLOP" + ("" if peak is None else f", {peak / 1e9:.1f} GB")
        floor = work.floor(bench, mode)
        yield Row("encoder", f"{name}, {mode}", "ms", floor=floor, note=note, **bench.cells(took))
    if not bench.gpu:
        yield Row("encoder", f"{name}: channels_last, CUDA graph", "ms", gpu=NO_GPU, state="skipped")
        return
    expected = _forward(bench, network, images, "bfloat16").float()
    floor = work.floor(bench, "bfloat16")
    replay, captured = _graph(bench, network, images)
    yield _variant(bench, f"{name}, bfloat16, CUDA graph", replay, captured, expected, floor)
    del replay, captured
    network.to(memory_format=torch.channels_last)
    ordered = images.contiguous(memory_format=torch.channels_last)

    def last() -> Tensor:
        return _forward(bench, network, ordered, "bfloat16")

    yield _variant(bench, f"{name}, bfloat16, channels_last", last, last(), expected, floor)
    replay, captured = _graph(bench, network, ordered)
    yield _variant(bench, f"{name}, bfloat16, channels_last, CUDA graph", replay, captured, expected, floor)


def _graph(bench: Bench, network: Teacher, images: Tensor) -> tuple[Callable[[], None], Tensor]:
    """A call that replays the forward pass, and the tensor that it writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _forward(bench, network, images, "bfloat16")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _forward(bench, network, images, "bfloat16")
    graph.replay()
    return graph.replay, out


def _variant(
    bench: Bench, what: str, call: Callable[[], object], out: Tensor, expected: Tensor, floor: float, more: str = ""
) -> Row:
    """Time of a variant, wrong where its result is another."""
    took = bench.milliseconds(call)
    error = relative(out.float(), expected)
    note = "; ".join(filter(None, [f"{error:.1e} off the plain one", more]))
    return Row("encoder", what, "ms", gpu=took, floor=floor, note=note, state="ok" if error <= CLOSE else "wrong")


def compiled(bench: Bench) -> Iterator[Row]:
    """`torch.compile` of the encoder, in channels_last: norms, sums and ReLUs are fused."""
    if not bench.gpu:
        yield Row("compile", "teacher, torch.compile", "ms", gpu=NO_GPU, state="skipped")
        return
    network, images = _built(bench)
    expected = _forward(bench, network, images, "bfloat16").float()
    floor = teacher_work(bench, len(images)).floor(bench, "bfloat16")
    network.to(memory_format=torch.channels_last)
    ordered = images.contiguous(memory_format=torch.channels_last)
    network.encoder = _compile(network.encoder)
    start = time.perf_counter()
    out = _forward(bench, network, ordered, "bfloat16")
    torch.cuda.synchronize()
    row = _variant(
        bench,
        f"teacher, {len(images)} images, bfloat16, channels_last, torch.compile",
        lambda: _forward(bench, network, ordered, "bfloat16"),
        out,
        expected,
        floor,
        f"compiled in {time.perf_counter() - start:.0f} s",
    )
    yield Row(**{**vars(row), "section": "compile"})


def _compile(encoder: nn.Module) -> nn.Module:
    compiled = torch.compile(encoder)
    compiled.stride, compiled.channels = encoder.stride, encoder.channels  # type: ignore[union-attr, attr-defined]
    return compiled  # type: ignore[return-value]
