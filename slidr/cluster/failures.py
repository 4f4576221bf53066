"""What a failed training worker says: the cause in one line, and whether another try could end otherwise.

A worker that is killed, or whose node is lost, is started again (`cluster.max_failures`). An error that this project
raises itself (a loss that diverged, a damaged file, a full disk) would only come back: it ends the run at once.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from ray.train import UserCallback

from slidr.urls import RedactedError

_OUR_ERROR = re.compile(r"slidr(\.\w+)+: ")  # as a traceback's last line names it
# Between the tracebacks of errors that led to each other.
_BETWEEN = ("Traceback (most recent call last)", "The above exception was", "During handling of the above")
_NO_SPACE = re.compile(r"OSError: \[Errno 28\] .*")  # ENOSPC


# Of ours, those that say nothing of the training: a disk that is full, a folder that is in use.
_OUTSIDE = {"CheckpointError", "InUse", "JournalError", "OSError", "RunError"}


class WouldFailAgain(RedactedError, RuntimeError):
    """An error in a worker that a restart cannot mend; the message is the worker's, `kind` its class's name."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind

    @property
    def outside(self) -> bool:
        """Whether the cause lies outside the training: the same training may succeed once it is mended."""
        return self.kind in _OUTSIDE


class EndAtOnce(UserCallback):
    """Ends a run whose worker failed by an error of ours, however many restarts it has left.

    Ray asks it in the run's controller, and takes an exception of a callback for the run's end.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, error in sorted(worker_exceptions.items()):
            ours = _ours(error)
            if ours is not None:
                kind, message = ours
                raise WouldFailAgain(f"worker {rank}: {message}", kind)


def cause(error: BaseException) -> str:
    """The line that says what went wrong in a worker, out of Ray's nested reports."""
    ended = getattr(error, "controller_failure", None)
    if isinstance(ended, WouldFailAgain):
        return str(ended)
    failures: dict[int, Exception] = getattr(error, "worker_failures", None) or {}
    # The worker that failed by itself, before those that then missed it.
    for rank, failure in sorted(failures.items(), key=lambda item: (_ours(item[1]) is None, item[0])):
        ours = _ours(failure)
        return f"worker {rank}: {_error_line(failure) if ours is None else ours[1]}"
    return _error_line(error)


def _error_line(error: BaseException) -> str:
    """The line of an error's text that says what went wrong.

    Of a traceback that is the last line that follows an indented one: Ray adds advice on retries and memory below it.
    Of any other text it is the first line.
    """
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    named = [line for before, line in pairwise(lines) if before[0].isspace() and not line[0].isspace()]
    named = [line for line in named if not line.startswith(_BETWEEN)]
    return named[-1] if named else lines[0].strip() if lines else type(error).__name__


def _ours(error: BaseException) -> tuple[str, str] | None:
    """Class and message of an error that this project raised, in a worker or in a loading task of it; else None."""
    if type(error).__module__.split(".")[0] == "slidr":
        return type(error).__name__, str(error)
    # Ray wraps errors of other processes, and Ray Data's end with advice on retries: the traceback tells.
    for line in str(error).strip().splitlines():
        if _OUR_ERROR.match(line):
            name, _, message = line.partition(": ")
            return name.rpartition(".")[2], message
        if _NO_SPACE.match(line):
            return "OSError", line
    return None
