"""Whether a machine or a cluster can run a job: how each line is when all is well, and what it says when not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from preflight_cases import by_name

from slidr.cluster.session import Node
from slidr.config import ClusterConfig, Config
from slidr.preflight import machine
from slidr.sparse.cpu_kernels import Obstacle


def test_only_pythons_that_the_lock_file_is_for_are_well() -> None:
    assert [machine.python(version).status for version in ((3, 11), (3, 12), (3, 10), (3, 13))] == [
        "ok", "ok", "error", "error",
    ]  # fmt: skip


def test_a_pinned_package_of_another_version_is_a_warning_and_a_missing_one_an_error() -> None:
    right = by_name(list(machine.packages(machine.installed)))
    assert {"ray", "mlflow"} <= right.keys()
    assert {finding.status for finding in right.values()} == {"ok"}
    wrong = by_name(list(machine.packages(lambda name: None if name == "mlflow" else "0.1")))
    assert (wrong["ray"].status, wrong["mlflow"].status) == ("warning", "error")
    assert "requirements.lock" in wrong["ray"].next


def test_an_engine_that_is_not_installed_is_an_error(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.cpu_kernels, "obstacle", lambda: None)
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert machine.engine(prepared).status == "ok"
    config = replace(prepared, student=replace(prepared.student, engine="minkowski"))
    finding = machine.engine(config)
    assert (finding.status, "build_minkowski.sh .venv/bin/python" in finding.next) == ("error", True)


def test_an_engine_that_could_be_faster_is_a_warning_with_what_would_help_on_this_machine(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for obstacle in (Obstacle("llvmlite is not installed", "pip install llvmlite"), Obstacle("no FMA", "another CPU")):
        monkeypatch.setattr(machine.cpu_kernels, "obstacle", lambda found=obstacle: found)
        finding = machine.engine(prepared)
        assert (finding.status, finding.next) == ("warning", obstacle.next)
        assert obstacle.what in finding.what
    on_gpu = replace(prepared, cluster=replace(prepared.cluster, use_gpu=True))
    assert machine.engine(on_gpu).status == "ok"


def test_a_gpu_that_is_asked_for_here_and_missing_is_an_error(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    wants = replace(prepared, cluster=replace(prepared.cluster, use_gpu=True))
    assert machine.gpu(prepared).status == "ok"
    assert machine.gpu(wants).status == "error"
    elsewhere = replace(wants, cluster=replace(wants.cluster, address="192.0.2.1:6379"))
    assert machine.gpu(elsewhere).status == "ok"


def test_a_machine_without_room_for_workers_and_loader_is_an_error_unless_an_autoscaler_may_come(
    prepared: Config,
) -> None:
    def with_workers(workers: int, **more: float) -> Config:
        return replace(prepared, cluster=ClusterConfig(num_workers=workers, local_cpus=2, **more))  # type: ignore[arg-type]

    assert machine.room(with_workers(1)).status == "ok"
    assert machine.room(with_workers(0)).status == "ok"
    refused = machine.room(with_workers(2))
    assert refused.status == "error"
    assert "need 3 CPUs, the cluster has 2" in refused.what
    assert machine.room(with_workers(2, scale_up_s=60)).status == "warning"


def test_a_running_cluster_is_asked_what_it_has(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(prepared, cluster=replace(prepared.cluster, address="auto", num_workers=2))
    monkeypatch.setattr(machine.session, "start", lambda cluster: False)
    monkeypatch.setattr(machine.session, "nodes", lambda: [Node(2), Node(1)])
    assert machine.cluster(config).status == "ok"
    assert "2 nodes, 3 CPUs" in machine.cluster(config).what
    monkeypatch.setattr(machine.session, "nodes", lambda: [Node(1)])
    assert machine.cluster(config).status == "error"


def test_a_cluster_that_does_not_answer_is_an_error(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cluster: ClusterConfig) -> bool:
        raise machine.session.ClusterError("no Ray cluster answers")

    monkeypatch.setattr(machine.session, "start", refuse)
    finding = machine.cluster(replace(prepared, cluster=replace(prepared.cluster, address="auto")))
    assert (finding.status, finding.what) == ("error", "no Ray cluster answers")


def test_a_cluster_that_cannot_be_joined_is_shown_with_its_own_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cluster: ClusterConfig) -> None:
        raise machine.session.ClusterError(
            "cluster.address: a:1: the token was refused (none found); set RAY_AUTH_MODE"
        )

    monkeypatch.setattr(machine.session, "start", refuse)
    found = machine.cluster(Config(cluster=ClusterConfig(address="a:1")))
    assert (found.status, found.next) == ("error", "set RAY_AUTH_MODE")
    assert found.what == "cluster.address: a:1: the token was refused (none found)"
