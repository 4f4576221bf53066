"""The one checkpoint format, and the folder that keeps checkpoints.

A checkpoint is a dict of tensors and plain values, written by ``torch.save`` and read with ``weights_only=True``:

    format     1
    kind       "pretrain" or another task's name
    student    state dict under the published names
    head       state dict of the teacher's trainable head, where there is one
    optimizer  its state dict; scaler: the gradient scaler's
    step       optimizer steps done, over all epochs
    epoch      epochs done
    config     the run's whole config as plain dicts
    metrics    the newest validation metrics
    best       the best value so far of the metric that picks the best checkpoint

There are no random states in it: everything random in training is drawn from (seed, step, rank). It is written
beside its final name and renamed, so a kill leaves either the old folder or the new one.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from slidr.data import storage
from slidr.models import archive
from slidr.models.files import open_weights
from slidr.training import workers
from slidr.training.schema import schema_problem
from slidr.urls import RedactedError, redact_url, redacting_logger

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.pt$")
_BEST = "best.pt"
_NONE, _UNREADABLE = -1, -2  # in the place of a step number
_log = redacting_logger(__name__)
Misfit = Callable[[dict[str, Any]], str | None]  # why a run cannot go on from a checkpoint; None: it can


class CheckpointError(RedactedError, ValueError):
    """A checkpoint that cannot be used; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class CheckpointFolder:
    """A run's checkpoints: the newest `keep`, and the best."""

    path: str
    keep: int = 3

    def save(self, state: dict[str, Any]) -> str:
        """Writes `state` under its step number, then removes checkpoints beyond the newest `keep`.

        Returns the path. The old ones go only after the new one is whole, so a full disk costs none of them.
        """
        path = storage.join(self.path, f"step-{state['step']:08d}.pt")
        write(path, state)
        for old in self.steps()[: -self.keep]:
            storage.delete(storage.join(self.path, f"step-{old:08d}.pt"))
        return path

    def save_best(self, state: dict[str, Any]) -> str:
        """Writes `state` as the best so far; returns the path."""
        path = storage.join(self.path, _BEST)
        write(path, state)
        return path

    def steps(self) -> list[int]:
        """Step numbers of the checkpoints there are, ascending."""
        matches = (_NAME.search(name) for name in storage.list_names(self.path))
        return sorted(int(match.group(1)) for match in matches if match)

    def newest(self, misfit: Misfit | None = None) -> dict[str, Any] | None:
        """The newest checkpoint that is intact and has no `misfit`, or None; others are passed over with a warning.

        What a writer that was killed left half-written is removed.
        """
        storage.sweep_temporary(self.path)
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step, misfit)
            except (CheckpointError, storage.DataError) as error:
                _log.warning("%s; going on from the one before", error)
        if steps:
            raise CheckpointError(
                f"{redact_url(self.path)}: none of its {len(steps)} checkpoints can be used; move them away"
            )
        return None

    def read(self, step: int, misfit: Misfit | None = None) -> dict[str, Any]:
        """The checkpoint of a step. Raises `CheckpointError` or `DataError` where it cannot be used."""
        path = storage.join(self.path, f"step-{step:08d}.pt")
        state = read(path, misfit)
        if state["step"] != step:
            raise CheckpointError(_unusable(path, f"is the checkpoint of step {state['step']}, by its contents"))
        return state

    def best(self, misfit: Misfit | None = None) -> dict[str, Any] | None:
        """The best checkpoint, or None where none was kept. Raises as `read` does."""
        path = storage.join(self.path, _BEST)
        return read(path, misfit) if _BEST in storage.list_names(self.path) else None  # a broken link is a damaged one


def newest_on_every_worker(
    checkpoints: CheckpointFolder, device: torch.device, misfit: Misfit | None = None
) -> dict[str, Any] | None:
    """`checkpoints.newest(misfit)` as worker 0 sees it, read by every worker, so that all go on from the same step.

    Every worker must call it. Raises `CheckpointError` on all of them where one cannot read what worker 0 can.
    """
    state: dict[str, Any] | None = None
    problem: Exception | None = None
    if workers.rank() == 0:
        try:
            state = checkpoints.newest(misfit)
        except Exception as error:  # whatever it is: the other workers wait to hear of it
            problem = error
    step = workers.gather_int(_UNREADABLE if problem else _NONE if state is None else state["step"], device)[0]
    if problem is not None:
        raise problem
    if step == _UNREADABLE:
        raise CheckpointError(f"{redact_url(checkpoints.path)}: worker 0 cannot read its checkpoints")
    if workers.rank() != 0:
        try:
            state = checkpoints.read(step, misfit) if step != _NONE else None
            agrees = step != _NONE or not checkpoints.steps()
        except (CheckpointError, storage.DataError):
            agrees = False
    else:
        agrees = True
    strangers = [rank for rank, flag in enumerate(workers.gather_int(int(agrees), device)) if not flag]
    if strangers:
        what = f"its checkpoint of step {step}" if step != _NONE else "that there is no checkpoint"
        raise CheckpointError(
            f"{redact_url(checkpoints.path)}: worker 0 sees {what}, workers {strangers} do not; run.folder must be "
            f"storage that every node sees"
        )
    return state


def write(path: str, state: dict[str, Any]) -> None:
    """Writes one checkpoint, whole or not at all."""
    write_weights(path, {"format": FORMAT, **state})


def write_weights(path: str, values: dict[str, Any]) -> None:
    """Writes any dict of tensors and plain values with ``torch.save``, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    try:
        storage.write_bytes_atomic(path, buffer.getvalue())
    except OSError as error:
        raise CheckpointError(
            f"{redact_url(path)}: cannot be written ({error.strerror or error}); what was saved before is intact: "
            f"free space, then continue with --run.resume"
        ) from error


def read(path: str, misfit: Misfit | None = None) -> dict[str, Any]:
    """One checkpoint, on the CPU.

    Raises `CheckpointError` for a file that is damaged (its checksums are compared), of another kind, lacks entries or
    has a `misfit`, `DataError` where there is no regular file.
    """
    size = 0
    try:
        with open_weights(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            state = archive.load(file)
    except archive.Damaged as error:
        raise CheckpointError(_unusable(path, f"{size} bytes; {error}")) from None
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"{redact_url(path)}: checkpoint format {str(found)[:40]}, expected {FORMAT}; foreign weights go through "
            f"student.weights"
        )
    problem = schema_problem(state) or (misfit(state) if misfit is not None else None)
    if problem is not None:
        raise CheckpointError(_unusable(path, problem))
    return state


def _unusable(path: str, reason: str) -> str:
    return f"{redact_url(path)}: not a readable checkpoint ({reason})"
