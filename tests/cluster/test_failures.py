"""The line that a user reads about a failed worker: the worker's own, out of what Ray prints around it."""

from __future__ import annotations

import traceback
from types import SimpleNamespace
from typing import Any

import pytest

from slidr.cluster.failures import cause


def failed(error: Exception, text: str) -> Exception:
    """A run's failure as Ray Train reports it: one worker's error with the traceback that it had there."""
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError(text, {0: UserExceptionWithTraceback(error, text)})


@pytest.mark.ray
def test_the_error_of_a_loading_task_is_named_and_not_rays_advice_on_retries(ray_cluster: None) -> None:
    import ray.data

    def load(row: dict[str, Any]) -> dict[str, Any]:
        raise KeyError("no such camera")

    with pytest.raises(Exception, match="no such camera") as raised:
        ray.data.range(1).map(load).take_all()
    text = "".join(traceback.format_exception(raised.value))
    assert "To change retry attempts" in text, "Ray says something else now: look again"
    assert cause(failed(raised.value, text)) == "worker 0: KeyError: 'no such camera'"


ADVICE = (
    "Failed to process a block after 1/1 attempts (total backoff 0.0s).\n"
    "To change retry attempts, backoff, or which errors are retried, configure `ray.data.DataContext.get_current()`."
)


FRAME = "Traceback (most recent call last):\n  File 'a.py', line 1, in f\n    g()\n"
THEN = "\nThe above exception was the direct cause of the following exception:\n\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{FRAME}KeyError: 'x'\n{ADVICE}\n", "KeyError: 'x'"),
        (f"{FRAME}ValueError: first\n{THEN}{FRAME}    ^^^\nRuntimeError: second\n{ADVICE}", "RuntimeError: second"),
        (f"{FRAME}slidr.data.storage.DataError: a.jpg: is truncated\n{ADVICE}", "a.jpg: is truncated"),
        ("Killed: the node runs low on memory.\nTo adjust the threshold, ...", "Killed: the node runs low on memory."),
        ("", "UserExceptionWithTraceback"),
    ],
    ids=["advice below", "chained", "ours", "no traceback", "empty"],
)
def test_the_line_that_is_shown_is_the_errors_own(text: str, line: str) -> None:
    assert cause(failed(KeyError("x"), text)) == f"worker 0: {line}"


def test_without_a_workers_failure_the_controllers_own_line_is_shown() -> None:
    assert cause(RuntimeError("no room\nmore on that")) == "no room"
    ended = SimpleNamespace(controller_failure=None, worker_failures=None)
    assert cause(ended) == str(ended)  # type: ignore[arg-type]
