"""Room that Ray holds for launches that are no more, and for one that is."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

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

    def launch(run_id: str) -> SimpleNamespace:
        return SimpleNamespace(train_run_context=SimpleNamespace(run_id=run_id))

    take_back_requests(own, launch("own-1"))
    take_back_requests(other, launch("other-1"))
    # Of a driver that is no more.
    _internal_kv_put(f"99999999 {ghosts.path}".encode(), b"train-ghost-1", namespace=_NOTES)
    requests = ["train-own-1", "train-other-1", "train-ghost-1"]
    for request in requests:
        ask(request)
    try:
        assert [holds(request) for request in requests] == [True, True, True]  # one of three CPUs each
        take_back_requests(own, launch("own-2"))
        assert [holds(request) for request in requests] == [False, True, False]
        ask("train-own-2")
        take_back_requests(own, launch("own-3"))
        assert not holds("train-own-2")
    finally:
        for request in requests:
            ray.get(coordinator.cancel_request.remote(request))


@pytest.mark.ray
def test_a_ray_that_answers_otherwise_is_a_warning_and_no_failed_run(
    ray_cluster: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    take_back_requests(RunFolder(str(tmp_path / "run")), SimpleNamespace())  # a trainer without a run of Ray's
    assert "Ray may hold room for killed runs for up to three minutes (AttributeError:" in caplog.text


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
