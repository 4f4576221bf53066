"""Training steps of the whole published row, by the project's own loop (`slidr.training.loop.fit`)."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_parts.bench import Bench, Mode
from gpu_parts.repeating import parts_that_differ
from gpu_parts.rows import NO_GPU, Row
from slidr.planning.estimate import train_setting
from slidr.training.checkpoint import CheckpointFolder
from slidr.training.distill import DistillTask
from slidr.training.loop import fit
from slidr.types import PairBatch


@dataclass
class Steps:
    """What some steps did: losses, times between them (ms), the trained state, peak GPU memory (bytes)."""

    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    peak: float | None = None
    warm_up: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.times[self.warm_up :] or self.times)


class SameBatch:
    """A loader that hands out one batch, from the host's memory, and notes when it is asked for the next."""

    steps_per_epoch = 10**6

    def __init__(self, batch: PairBatch, gpu: bool) -> None:
        self.batch, self.gpu = batch, gpu
        self.marks: list[Any] = []

    def train(self, first_step: int, last_step: int) -> Iterator[PairBatch]:
        for _ in range(first_step, last_step):
            self.mark()
            yield self.batch
        self.mark()

    def mark(self) -> None:
        if self.gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def validation(self) -> Iterator[PairBatch]:
        return iter([self.batch])  # the loop ends with a validation, and refuses one of nothing

    def times(self) -> list[float]:
        """ms from one request to the next."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if not self.gpu:
            return [1e3 * (end - start) for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def run_steps(bench: Bench, mode: Mode, steps: int, clouds: int | None = None, channels_last: bool = False) -> Steps:
    """Trains that many steps from the seed's weights, on one batch."""
    batch = bench.batch(clouds)
    config = bench.config(mode, len(batch.tokens), steps)
    task = DistillTask(config)
    if channels_last:
        task.model.teacher.to(memory_format=torch.channels_last)
    loader, found = SameBatch(batch, bench.gpu), Steps(warm_up=bench.size.warm_up)
    done = _Done(loader, found, steps)
    if bench.gpu:
        torch.cuda.reset_peak_memory_stats()
    tf32 = "tf32" if mode == "tf32" else "float32"
    with tempfile.TemporaryDirectory() as folder, bench.arithmetic(tf32):
        # The loop opens autocast itself; only TF32 is set from outside.
        fit(task, loader, config, _Nowhere(folder), bench.device, done)
    found.times = loader.times()
    found.peak = float(torch.cuda.max_memory_allocated()) if bench.gpu else None
    found.state = {name: value.clone() for name, value in task.model.state_dict().items()}
    return found


class _Nowhere(CheckpointFolder):
    """A folder that keeps no checkpoint: writing half a gigabyte is not what is measured."""

    def save(self, state: dict[str, Any]) -> str:
        return self.path

    def save_best(self, state: dict[str, Any]) -> str:
        return self.path


@dataclass
class _Done:
    """Takes what the loop logs."""

    loader: SameBatch
    found: Steps
    steps: int

    def __call__(self, step: int, metrics: dict[str, float]) -> None:
        if "loss" in metrics and "lr" in metrics:
            if step == self.steps and len(self.loader.marks) == step:
                self.loader.mark()  # the last step is over
            self.found.losses.append(metrics["loss"])


def float16(bench: Bench) -> Iterator[Row]:
    """A step in float16 with the loss scaler: finite, and the weights move."""
    if not bench.gpu:
        yield Row("float16", "a step with the loss scaler", gpu=NO_GPU, state="skipped")
        return
    before = DistillTask(bench.config("float16")).model.state_dict()
    after = run_steps(bench, "float16", min(8, bench.size.steps + 2))
    finite = all(bool(value.isfinite().all()) for value in after.state.values() if value.is_floating_point())
    moved = sum(not torch.equal(after.state[name].cpu(), value) for name, value in before.items())
    finite &= all(loss == loss for loss in after.losses)
    # The scaler starts at 65536 and may skip its first steps; the norms' statistics move all the same.
    head = torch.equal(after.state["teacher.decoder.0.weight"].cpu(), before["teacher.decoder.0.weight"])
    right = finite and moved > 0
    note = f"losses {after.losses[0]:.3f} to {after.losses[-1]:.3f}" + ("; all steps skipped" if head else "")
    state = "ok" if right and not head else "wrong"
    what = f"{len(after.losses)} steps with the loss scaler"
    yield Row("float16", what, gpu="yes" if right else "no", note=note, state=state)


def repeat(bench: Bench) -> Iterator[Row]:
    """Ten steps twice: are losses and weights the same bit for bit? If not, which part of a step differs?"""
    steps = bench.size.steps if bench.gpu else 2
    for mode in ["float32", "bfloat16"] if bench.gpu else ["float32"]:
        run_steps(bench, mode, 2)  # type: ignore[arg-type]  # chooses algorithms, once for both
        first, second = (run_steps(bench, mode, steps) for _ in range(2))  # type: ignore[arg-type]
        same = first.losses == second.losses and all(
            torch.equal(value, second.state[name]) for name, value in first.state.items()
        )
        pairs = enumerate(zip(first.losses, second.losses, strict=True), 1)
        when = next((step for step, (a, b) in pairs if a != b), None)
        note = "" if same else f"losses differ from step {when} on" if when else "losses agree, weights do not"
        yield Row(
            "repeat",
            f"{steps} steps twice, {mode}: the same bits",
            note=note,
            values={"losses": [first.losses, second.losses]},
            **bench.cells("yes" if same else "no"),
        )
        differing = parts_that_differ(bench, mode)  # type: ignore[arg-type]
        text = ", ".join(differing) if differing else "every part repeats alone"
        yield Row("repeat", f"parts that do not repeat, {mode}", note=text, **bench.cells(str(len(differing))))


def whole_step(bench: Bench) -> Iterator[Row]:
    """Time of a step, host to device and optimizer included, and its peak memory; unit costs for `slidr plan`."""
    from gpu_parts.floors import step_floor

    for mode in bench.modes:
        steps = run_steps(bench, mode, bench.size.warm_up + bench.size.steps if bench.gpu else 2)
        note = "" if steps.peak is None else f"{steps.peak / 1e9:.1f} GB"
        yield Row(
            "step",
            f"whole step, batch {bench.size.clouds}, {mode}",
            "ms",
            floor=step_floor(bench, mode),
            note=note,
            values={"times": steps.times, "peak_bytes": steps.peak},
            **bench.cells(steps.median),
        )
        if mode != "tf32" and bench.size.student == "minkunet34c":
            _costs(bench, mode, steps)
        bench.free()
    if bench.gpu:
        yield _synchronisations(bench)


def _costs(bench: Bench, mode: Mode, steps: Steps) -> None:
    """What `slidr plan` needs to know of this GPU."""
    config = bench.config(mode)
    setting = train_setting("pretrain", config)
    task = DistillTask(config)
    task.model.to(bench.device)
    batch = bench.batch()
    validated = bench.milliseconds(lambda: task.validate([batch]), runs=5)
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    for name, value in (
        ("train_frame", steps.median / 1e3 / bench.size.clouds),
        ("validate_frame", validated / 1e3 / bench.size.clouds),
        ("worker_memory", peak),
    ):
        bench.cost({"name": name, "value": float(f"{value:.4g}"), "setting": setting})


def _synchronisations(bench: Bench) -> Row:
    """How often a step makes the host wait for the GPU, from the warnings of CUDA's own debug mode."""
    import warnings

    run_steps(bench, "bfloat16", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run_steps(bench, "bfloat16", 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places: dict[str, int] = {}
    for warning in caught:
        if "synchroniz" in str(warning.message):
            place = f"{warning.filename.rpartition('slidr/')[2]}:{warning.lineno}"
            places[place] = places.get(place, 0) + 1
    often = sorted(places.items(), key=lambda item: -item[1])
    note = "most: " + ", ".join(f"{place} ({count})" for place, count in often[:3]) if often else ""
    return Row(
        "step",
        "host waits for the GPU, two steps with set-up",
        gpu=float(sum(places.values())),
        note=note,
        values={"places": places},
    )


def batches(bench: Bench) -> Iterator[Row]:
    """Whole steps of 4, 8 and 16 keyframes, and with the teacher in channels_last."""
    if not bench.gpu:
        yield Row("batches", "whole step, batch 8, 16; channels_last", gpu=NO_GPU, state="skipped")
        return
    usual = bench.size.clouds
    for clouds, last in ((usual, True), (2 * usual, False), (4 * usual, False)):
        what = f"whole step, batch {clouds}, bfloat16" + (", teacher channels_last" if last else "")
        steps = run_steps(bench, "bfloat16", bench.size.warm_up + min(bench.size.steps, 6), clouds, last)
        rate = 1e3 * clouds / steps.median
        yield Row(
            "batches",
            what,
            "ms",
            gpu=steps.median,
            note=f"{rate:.0f} keyframes/s, {(steps.peak or 0) / 1e9:.1f} GB",
            values={"times": steps.times, "peak_bytes": steps.peak},
        )
        bench.free()
