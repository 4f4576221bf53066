"""What makes elastic runs soon as large as there is room for, after lost nodes, killed drivers and new nodes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import ray

from slidr.training.runs import RunFolder
from slidr.urls import redacting_logger

_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_PLACES_S = 10
_ANSWER_S = 10.0
_NOTES = b"slidr-requests"  # in the cluster's own store: "driver run-folder" -> request
_log = redacting_logger(__name__)


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
            os.environ.pop(_START_TIMEOUT, None)


def take_back_requests(folder: RunFolder, trainer: Any) -> None:
    """Takes back what launches whose drivers are no more had asked Ray for, and notes what this one asks for.

    Ray holds that for them until 180 s after they were killed, before those who ask later: an elastic run would begin
    with the workers that there is room for beside such ghosts, or wait. Ray's view of the nodes, up to 20 s old, is
    brought up to date as well. Notes lie in the cluster's own store, one for each run and driver: its newest launch. A
    driver's own earlier launch of a run has ended, so that is taken back, too; what another living driver asked for is
    not. All of this is private to Ray: where it is not as expected, a line says so and training begins without it.
    """
    try:
        from ray._private import state as ray_state
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
        from ray.experimental.internal_kv import (
            _internal_kv_del,
            _internal_kv_get,
            _internal_kv_list,
            _internal_kv_put,
        )

        coordinator = default_autoscaling_coordinator.get_or_create_autoscaling_coordinator()
        living = {job["JobID"] for job in ray_state.state.job_table() if not job["IsDead"]}
        driver = ray.get_runtime_context().get_job_id()
        own = f"{driver} {folder.path}".encode()
        stale = [
            (key, request.decode())
            for key in _internal_kv_list(b"", namespace=_NOTES)
            if (key == own or key.split(b" ", 1)[0].decode() not in living)
            and (request := _internal_kv_get(key, namespace=_NOTES)) is not None
        ]
        for key, _ in stale:  # first: what cannot be taken back now is not tried by every later launch
            _internal_kv_del(key, namespace=_NOTES)
        _internal_kv_put(own, f"train-{trainer.train_run_context.run_id}".encode(), namespace=_NOTES)
        ray.get([coordinator.cancel_request.remote(request) for _, request in stale], timeout=_ANSWER_S)
        ray.get(coordinator.get_reserved_resources.remote("nobody", recompute=True), timeout=_ANSWER_S)
    except Exception as error:  # all of it comes right by itself, later
        _log.warning("Ray may hold room for killed runs for up to three minutes (%s: %s)", type(error).__name__, error)
