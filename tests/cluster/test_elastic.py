"""Room that Ray holds for launches that are no more, and for one that is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    ResourceRequestPriority,
    get_or_create_autoscaling_coordinator,
)
from ray.experimental.internal_kv import _internal_kv_put
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR as TIMEOUT
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from slidr.cluster.elastic import _NOTES, impatient, take_back_requests
from slidr.training.runs import RunFolder


@pytest.mark.ray
def test_what_killed_launches_asked_for_is_taken_back_and_what_living_ones_ask_for_is_not(
    ray_cluster: None, tmp_path: Path
) -> None:
    coordinator = get_or_create_autoscaling_coordinator()
    own, other, ghosts = (RunFolder(str(tmp_path / name)) for name in ("own", "other", "ghosts"))

    def ask(request: str) -> None:
        ray.get(
            coordinator.request_resources.remote(
                requester_id=request, resources=[{"CPU": 1}], expire_after_s=180, priority=ResourceRequestPriority.HIGH
            )
        )

    def holds(request: str) -> bool:
        return bool(ray.get(coordinator.get_reserved_resources.remote(request)))

    take_back_requests(own, "own-1")
    take_back_requests(other, "other-1")
    _internal_kv_put(ghosts.path.encode(), b"train-ghost-1 99999999", namespace=_NOTES)  # of a driver that is no more
    requests = ["train-own-1", "train-other-1", "train-ghost-1"]
    for request in requests:
        ask(request)
    try:
        assert [holds(request) for request in requests] == [True, True, True]  # one of three CPUs each
        take_back_requests(own, "own-2")
        assert [holds(request) for request in requests] == [False, True, False]
        ask("train-own-2")
        take_back_requests(own, "own-3")
        assert not holds("train-own-2")
    finally:
        for request in requests:
            ray.get(coordinator.cancel_request.remote(request))


def test_an_elastic_run_asks_for_places_again_soon_unless_the_user_chose_how_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    with impatient():
        assert get_env_vars_to_propagate()[TIMEOUT] == "10"  # what Ray hands its controller
    assert TIMEOUT not in os.environ
    monkeypatch.setenv(TIMEOUT, "90")
    with impatient():
        assert get_env_vars_to_propagate()[TIMEOUT] == "90"
    assert os.environ[TIMEOUT] == "90"
