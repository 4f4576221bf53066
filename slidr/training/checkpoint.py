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
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch

from slidr.data import storage
from slidr.training import workers

FORMAT = 1
_NAME = re.compile(r"step-(\d{8})\.pt$")
_BEST = "best.pt"
_NONE, _UNREADABLE = -1, -2  # in the place of a step number
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
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

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that can be read, or None; damaged ones are passed over with a warning.

        What a writer that was killed left half-written is removed.
        """
        storage.sweep_temporary(self.path)
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.read(step)
            except (CheckpointError, storage.DataError) as error:
                _log.warning("%s; going on from the one before", error)
        if steps:
            raise CheckpointError(f"{self.path}: none of its {len(steps)} checkpoints can be read; move them away")
        return None

    def read(self, step: int) -> dict[str, Any]:
        """The checkpoint of a step. Raises `CheckpointError` or `DataError` where it cannot be read."""
        return read(storage.join(self.path, f"step-{step:08d}.pt"))

    def best(self) -> dict[str, Any] | None:
        """The best checkpoint, or None where none was kept."""
        path = storage.join(self.path, _BEST)
        return read(path) if storage.exists(path) else None


def newest_on_every_worker(checkpoints: CheckpointFolder, device: torch.device) -> dict[str, Any] | None:
    """`checkpoints.newest()` as worker 0 sees it, read by every worker, so that all go on from the same step.

    Every worker must call it. Raises `CheckpointError` on all of them where one cannot read what worker 0 can.
    """
    state, problem = None, None
    if workers.rank() == 0:
        try:
            state = checkpoints.newest()
        except CheckpointError as error:
            problem = error
    step = workers.gather_int(_UNREADABLE if problem else _NONE if state is None else state["step"], device)[0]
    if problem is not None:
        raise problem
    if step == _UNREADABLE:
        raise CheckpointError(f"{checkpoints.path}: worker 0 cannot read its checkpoints")
    if workers.rank() != 0:
        try:
            state = checkpoints.read(step) if step != _NONE else None
            agrees = step != _NONE or not checkpoints.steps()
        except (CheckpointError, storage.DataError):
            agrees = False
    else:
        agrees = True
    strangers = [rank for rank, flag in enumerate(workers.gather_int(int(agrees), device)) if not flag]
    if strangers:
        what = f"its checkpoint of step {step}" if step != _NONE else "that there is no checkpoint"
        raise CheckpointError(
            f"{checkpoints.path}: worker 0 sees {what}, workers {strangers} do not; run.folder must be storage that "
            f"every node sees"
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
            f"{path}: cannot be written ({error.strerror or error}); what was saved before is intact: free space, "
            f"then continue with --run.resume"
        ) from error


def read(path: str) -> dict[str, Any]:
    """One checkpoint, on the CPU. Raises `CheckpointError` for a file that is damaged or of another kind."""
    data = storage.read_bytes(path, storage.WEIGHTS_BYTES)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several unrelated types for a damaged archive
        reason = type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({len(data)} bytes; {reason})") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"{path}: checkpoint format {found}, expected {FORMAT}; foreign weights go through student.weights"
        )
    return state
