"""The one trainer skeleton: pretraining and fine-tuning, one process or many, laptop and cluster.

The loop knows steps, epochs, checkpoints and logging; what a step means is the task's business, where batches
come from is the loader's. It knows nothing of Ray: the process group, if any, is there before it starts.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slidr.config import Config, OptimConfig, Precision, public_dict
from slidr.training import workers
from slidr.training.checkpoint import CheckpointFolder, newest_on_every_worker
from slidr.training.optim import (
    build_optimizer,
    learning_rate_factor,
    set_learning_rate,
    total_steps,
)
from slidr.training.schema import Expected
from slidr.urls import RedactedError, redacting_logger

EMPTY_STEPS = 10  # steps in a row that may have nothing to learn from
_NAMED_FRAMES = 4
_log = redacting_logger(__name__)
_DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Task(Protocol):
    """What is trained, and how a step and a validation of it go."""

    kind: str  # names the task in checkpoints
    objective: tuple[str, int]  # the metric that picks the best checkpoint; +1: more is better, -1: less

    @property
    def model(self) -> nn.Module:
        """Called with a batch; its outputs go to `loss`."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains."""

    def loss(self, outputs: Any, batch: Any) -> tuple[Tensor, dict[str, float]]:
        """The loss of one micro-batch, differentiable, and what else is worth logging."""

    def evidence(self, batch: Any) -> int:
        """How much of a micro-batch the loss learns from: superpixels, pairs, labelled voxels; 0: its loss is empty."""

    def nothing_to_learn(self, frames: str) -> str:
        """The error for batches without evidence; `frames` names some of their frames."""

    def validate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Metrics over the validation data of all workers; every worker calls it."""

    def state(self) -> dict[str, Any]:
        """The entries of a checkpoint that hold weights."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Puts `state` back, strictly."""


class Loader(Protocol):
    """Where one worker's batches come from."""

    steps_per_epoch: int

    def train(self, first_step: int, last_step: int) -> Iterator[Any]:
        """This worker's micro-batches of the optimizer steps [first_step, last_step), in order."""

    def validation(self) -> Iterable[Any]:
        """This worker's share of the validation batches."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    step: int
    epoch: int
    metrics: dict[str, float]  # the last validation's


class Diverged(RedactedError, RuntimeError):
    """The loss is no longer a finite number, or no longer a sensible one."""


class NothingToLearn(RedactedError, RuntimeError):
    """Batches in a row hold nothing that the loss learns from, so its 0 says nothing; the message names frames."""


class OutOfMemory(RedactedError, RuntimeError):
    """A batch does not fit into the GPU's memory; the message names the keys that make it smaller."""


@contextlib.contextmanager
def _fitting(device: torch.device, when: str, advice: str) -> Iterator[None]:
    """Turns CUDA's error about its memory into one that says what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        detail = str(error).strip().split(". ")
        raise OutOfMemory(f"{when}: {device} ran out of memory; {advice} (PyTorch: {'. '.join(detail[:3])})") from error


def _smaller_steps(optim: OptimConfig) -> str:
    """What makes the batches of a step smaller."""
    held = optim.batch_size // (workers.world_size() * optim.accumulate)
    keys = [f"lower optim.batch_size (now {optim.batch_size})"]
    keys += [f"raise optim.accumulate (now {optim.accumulate})"] if held > 1 else []
    keys += ["set optim.precision to bfloat16"] if optim.precision == "float32" else []
    return f"a batch holds {held} keyframes: {' or '.join(keys)}"


def fit(
    task: Task,
    loader: Loader,
    config: Config,
    checkpoints: CheckpointFolder,
    device: torch.device,
    log: Callable[[int, dict[str, float]], None],
    flush: Callable[[], None] = lambda: None,
    enough: Callable[[int, dict[str, float]], bool] = lambda epoch, metrics: False,
    note: Callable[[str], None] = lambda text: None,
    prepare: Callable[[], None] = lambda: None,
) -> Outcome:
    """Trains `task` to the end of `config.optim`, from the newest checkpoint in the folder if there is one.

    `log(step, metrics)` is called on rank 0 only, and so is `flush()` before each checkpoint: what is logged up to a
    checkpoint must outlast a kill as the checkpoint does. `note(text)` tells the user, on rank 0, from which step a
    resumed run goes on. `enough(epoch, metrics)` is asked on every rank, with the
    same metrics (the validation's, and "loss", the last training step's), whenever an epoch was validated: true ends
    training there. `prepare()` is called on every rank before a run of no steps is validated. Raises `Diverged` when a
    loss is NaN or infinite, before that step changes any weight, `OutOfMemory` when a batch does not fit into the GPU's
    memory, and `NothingToLearn` where `EMPTY_STEPS` steps in a row, or all of a shorter run, have no evidence on any
    worker.
    """
    run = _Run(task, loader, config, checkpoints, device, flush)
    if run.step and workers.rank() == 0:
        note(f"{checkpoints.path}: going on from step {run.step}")
    log_every, checkpoint_every = config.run.log_every, config.run.checkpoint_every
    if run.step >= run.last_step and not run.metrics:
        prepare()
        run.validate()
    batches = iter(loader.train(run.step, run.last_step))
    meter = _Meter(config.optim.batch_size)
    # A run that was killed just after its last epoch's checkpoint must end there, too.
    ended = run.step > 0 and run.step % loader.steps_per_epoch == 0 and enough(run.epoch, run.metrics)
    while run.step < run.last_step and not ended:
        with _fitting(device, f"step {run.step + 1}", _smaller_steps(config.optim)):
            values = run.train_step(batches, meter)
        run.require_evidence()
        ends_epoch = run.step % loader.steps_per_epoch == 0 or run.step == run.last_step
        if run.step % log_every == 0 or ends_epoch:
            values = workers.mean_over_workers(values, device)
            if workers.rank() == 0:
                log(run.step, {**values, **meter.read(device)})
        if ends_epoch:
            improved = run.validate()
            if workers.rank() == 0:
                log(run.step, {**run.metrics, "epoch": run.step / loader.steps_per_epoch})
            run.metrics["loss"] = values["loss"]  # of the epoch's last step, over all workers; it is logged already
            run.save(best=improved)
            meter.reset()
            ended = run.step % loader.steps_per_epoch == 0 and enough(run.epoch, run.metrics)
        elif run.step % checkpoint_every == 0:
            run.save()
    return Outcome(run.step, run.epoch, run.metrics)


class _Run:
    """The state of one run: weights, optimizer, position and the best score so far."""

    def __init__(
        self,
        task: Task,
        loader: Loader,
        config: Config,
        checkpoints: CheckpointFolder,
        device: torch.device,
        flush: Callable[[], None],
    ) -> None:
        self.task, self.loader, self.config, self.device = task, loader, config, device
        self.checkpoints, self.flush = checkpoints, flush
        self.last_step = total_steps(config.optim, loader.steps_per_epoch)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.best: float | None = None
        task.model.to(device)
        self.optimizer = build_optimizer(task.parameter_groups(), config.optim)
        self.precision = _DTYPES[config.optim.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self._resume()
        self.evidence = _Evidence(self.step)
        self.model = _wrap(workers.synchronise_batch_norm(task.model, device), device)

    @property
    def epoch(self) -> int:
        """Whole epochs done."""
        return self.step // self.loader.steps_per_epoch

    def train_step(self, batches: Iterator[Any], meter: _Meter) -> dict[str, float]:
        """One optimizer step; returns this worker's loss, the learning rate and what the task reports."""
        config, accumulate = self.config, self.config.optim.accumulate
        factor = learning_rate_factor(config.optim, self.step, self.loader.steps_per_epoch, self.last_step)
        rate = set_learning_rate(self.optimizer, factor)
        # Seeded by position: what draws from the global generator repeats after a resume, on every rank.
        torch.manual_seed(_step_seed(config.run.seed, self.step))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total: dict[str, float] = {}
        for turn in range(accumulate):
            with meter.waiting():
                batch = next(batches)
            batch = batch.to(self.device, non_blocking=True)
            # Gradients meet the other workers' once a step, not once a micro-batch.
            with self._unsynchronised(turn < accumulate - 1):
                with torch.autocast(self.device.type, self.precision, self.precision != torch.float32):
                    outputs = self.model(batch)
                loss, extra = self.task.loss(outputs, batch)
                if self.evidence.count == 0:  # counting waits for the GPU; once there is evidence, no more is needed
                    self.evidence.add(self.task.evidence(batch), getattr(batch, "tokens", ()))
                for name, value in {"loss": float(loss.detach()), **extra}.items():
                    total[name] = total.get(name, 0.0) + value / accumulate
                if not math.isfinite(total["loss"]):
                    raise Diverged(
                        f"step {self.step + 1}: the loss is {total['loss']} at learning rate {rate:.3g}; "
                        f"lower optim.lr (now {config.optim.lr})"
                    )
                self.scaler.scale(loss / accumulate).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        meter.steps += 1
        return {**total, "lr": rate}

    def require_evidence(self) -> None:
        """Raises `NothingToLearn`, on every rank at the same step, where no worker had anything to learn from.

        A single step may have nothing: random crops and cuboids can leave a small frame without a pair.
        """
        seen = self.evidence
        seen.steps += 1
        is_whole_run = seen.since == 0 and self.step == self.last_step
        if seen.steps < EMPTY_STEPS and not is_whole_run:
            return
        if workers.sum_over_workers({"evidence": float(seen.count)}, self.device)["evidence"] == 0:
            first, shown = self.step - seen.steps + 1, ", ".join(dict.fromkeys(seen.tokens)) or "of other workers"
            where = f"steps {first} to {self.step}" if seen.steps > 1 else f"step {self.step}"
            raise NothingToLearn(f"{where}: {self.task.nothing_to_learn(shown)}")
        self.evidence = _Evidence(None)

    def validate(self) -> bool:
        """Takes new validation metrics; true when they are the best so far."""
        advice = f"lower data.val_batch_size (now {self.config.data.val_batch_size})"
        with _fitting(self.device, f"validation after step {self.step}", advice):
            self.metrics = self.task.validate(self.loader.validation())
        if not math.isfinite(self.metrics.get("val_loss", 0.0)):
            raise Diverged(
                f"step {self.step}: the validation loss is {self.metrics['val_loss']}; lower optim.lr (now "
                f"{self.config.optim.lr})"
            )
        name, sign = self.task.objective
        improved = self.best is None or sign * self.metrics[name] > sign * self.best
        self.best = self.metrics[name] if improved else self.best
        return improved

    def save(self, best: bool = False) -> None:
        """Rank 0 writes a checkpoint, and a second one under its own name when it is the best."""
        if workers.rank() != 0:
            return
        state = {
            "kind": self.task.kind,
            **self.task.state(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "config": public_dict(self.config),
            "metrics": self.metrics,
            "best": self.best,
        }
        self.flush()
        # The best first: a kill in between repeats the epoch, the other way round the best would be lost.
        if best:
            self.checkpoints.save_best(state)
        self.checkpoints.save(state)

    def _resume(self) -> None:
        expected = Expected(self.task.kind, self.task.state(), self.optimizer, self.scaler.state_dict(), self.last_step)
        state = newest_on_every_worker(self.checkpoints, self.device, expected.misfit)
        if state is None:
            return
        self.task.load_state(state)
        # Settings that a checkpoint of another torch lacks are the run's own.
        own = self.optimizer.state_dict()["param_groups"]
        groups = [{**mine, **saved} for mine, saved in zip(own, state["optimizer"]["param_groups"], strict=True)]
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.metrics, self.best = state["step"], state["metrics"], state["best"]

    def _unsynchronised(self, apply: bool) -> contextlib.AbstractContextManager[Any]:
        if apply and isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()


def _wrap(model: nn.Module, device: torch.device) -> nn.Module:
    if workers.world_size() == 1:
        return model
    ids = [device.index or 0] if device.type == "cuda" else None
    # Batch norm is synchronised already, so the buffers agree without broadcasting them.
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)


def _step_seed(seed: int, step: int) -> int:
    """A seed for every (seed, step, rank). The generators take 64 bits: large ones wrap around."""
    return (seed * 1_000_003 + step * workers.world_size() + workers.rank()) % 2**64


class _Evidence:
    """What this worker's steps since `since` (None: since a step that is not the run's first) had to learn from."""

    def __init__(self, since: int | None) -> None:
        self.since, self.steps, self.count = since, 0, 0
        self.tokens: list[str] = []

    def add(self, count: int, tokens: Sequence[str]) -> None:
        self.count += count
        self.tokens = [*self.tokens, *tokens][:_NAMED_FRAMES]


class _Meter:
    """Throughput, time spent waiting for data, and memory."""

    def __init__(self, samples_per_step: int) -> None:
        self.samples_per_step = samples_per_step
        self.reset()

    def reset(self) -> None:
        self.start, self.steps, self.waited = time.perf_counter(), 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def read(self, device: torch.device) -> dict[str, float]:
        elapsed = max(time.perf_counter() - self.start, 1e-9)
        # ru_maxrss counts KiB on Linux.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        values = {
            "samples_per_second": self.steps * self.samples_per_step / elapsed,
            "loader_wait_share": self.waited / elapsed,
            "memory_gib": peak,
        }
        if device.type == "cuda":
            values["gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        self.reset()
        return values
