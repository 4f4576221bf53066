"""What makes elastic runs soon as large as there is room for, after lost nodes, killed drivers and new nodes."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import ray
from ray._private import state as ray_state
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

from slidr.training.runs import RunFolder

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_PLACES_S = 10
_ANSWER_S = 10.0
_NOTES = b"slidr-requests"  # in the cluster's own store: run folder -> "request driver"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """In the block, places for workers that do not come are asked for again soon, and then as many as there are.

    Right after a node is lost Ray still counts it, for up to half a minute, and an elastic group asks for places that
    it then waits for in vain: by default for a minute. (A group of fixed size would ask for the same again, so there
    the minute costs nothing.) The time is that of reserving places, not of starting workers in them; it may run out
    any number of times. Ray takes it from the environment of the process that calls `fit`; who has set it keeps it.
    """
    chosen = _START_TIMEOUT in os.environ
    os.environ.setdefault(_START_TIMEOUT, str(_PLACES_S))
    try:
        yield
    finally:
        if not chosen:
            del os.environ[_START_TIMEOUT]


def take_back_requests(folder: RunFolder, run_id: str) -> None:
    """Takes back what launches that were killed had asked Ray for, and notes what this one (`run_id`, Ray's) asks for.

    Ray holds that for them until 180 s after they were killed, before those who ask later: an elastic run would begin
    with the workers that there is room for beside such ghosts, or wait. Ray's view of the nodes, up to 20 s old, is
    brought up to date as well. The notes are in the cluster's own store, one a run: its newest launch and its driver.
    """
    try:
        coordinator = get_or_create_autoscaling_coordinator()
        living = {job["JobID"] for job in ray_state.state.job_table() if not job["IsDead"]}
        for key in _internal_kv_list(b"", namespace=_NOTES):
            request, driver = (_internal_kv_get(key, namespace=_NOTES) or b" ").decode().split(" ")
            if key == folder.path.encode() or driver not in living:
                ray.get(coordinator.cancel_request.remote(request), timeout=_ANSWER_S)
                _internal_kv_del(key, namespace=_NOTES)
        driver = ray.get_runtime_context().get_job_id()
        _internal_kv_put(folder.path.encode(), f"train-{run_id} {driver}".encode(), namespace=_NOTES)
        ray.get(coordinator.get_reserved_resources.remote("nobody", recompute=True), timeout=_ANSWER_S)
    except Exception as error:  # all of it comes right by itself, later
        _log.warning("Ray may hold room for killed runs for up to three minutes (%s)", type(error).__name__)
