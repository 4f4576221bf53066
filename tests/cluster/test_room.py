"""What a training job needs of a cluster, and the wait for an autoscaler."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.cluster import room, session
from slidr.cluster.room import bundles, check_room, shortage, telling_waits, telling_waits_for_a_cpu
from slidr.cluster.session import ClusterError, Node
from slidr.config import ClusterConfig

nodes = st.lists(st.builds(Node, st.integers(0, 9), st.integers(0, 3)), max_size=5)
configs = st.builds(
    ClusterConfig,
    num_workers=st.integers(1, 5),
    use_gpu=st.booleans(),
    cpus_per_worker=st.integers(1, 4),
    loader_cpus=st.integers(1, 4),
)


@pytest.mark.ray
def test_a_cluster_too_small_for_workers_and_loader_is_refused_with_the_numbers(ray_cluster: None) -> None:
    with pytest.raises(ClusterError, match=r"3 workers x 1 CPUs \+ 1 loader CPUs need 4 CPUs, the cluster has 3"):
        check_room(ClusterConfig(num_workers=3))
    with pytest.raises(ClusterError, match="use_gpu"):
        check_room(ClusterConfig(use_gpu=True))
    check_room(ClusterConfig(num_workers=2))


@given(configs, nodes)
def test_room_means_that_a_placement_by_hand_succeeds(cluster: ClusterConfig, there: list[Node]) -> None:
    # Workers first, one at a time, wherever one still fits; the loader takes any CPUs that are left.
    left = [[node.cpus, node.gpus] for node in there]
    placed = 0
    for place in left:
        while placed < cluster.num_workers and place[0] >= cluster.cpus_per_worker:
            if cluster.use_gpu and place[1] < 1:
                break
            place[0] -= cluster.cpus_per_worker
            place[1] -= cluster.use_gpu
            placed += 1
    fits = placed == cluster.num_workers and sum(cpus for cpus, _ in left) >= cluster.loader_cpus
    assert (shortage(cluster, there) is None) == fits


def test_gpu_workers_whose_cpus_are_on_other_nodes_are_refused() -> None:
    cluster = ClusterConfig(num_workers=2, use_gpu=True, cpus_per_worker=4)
    message = shortage(cluster, [Node(4, 2), Node(32, 0)])
    assert message is not None
    assert "2 workers of 1 GPU and 4 CPUs" in message
    assert "CPUs for 1 such workers" in message


@given(configs)
def test_the_autoscaler_is_asked_for_exactly_what_the_job_reserves(cluster: ClusterConfig) -> None:
    asked = bundles(cluster)
    assert sum(bundle["CPU"] for bundle in asked) == (
        cluster.num_workers * cluster.cpus_per_worker + cluster.loader_cpus
    )
    assert sum(bundle.get("GPU", 0) for bundle in asked) == cluster.num_workers * cluster.use_gpu


def test_training_waits_for_nodes_that_an_autoscaler_brings_and_takes_its_request_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    growing = iter([[Node(0)], [Node(0)], [Node(0), Node(2)]])
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(session, "nodes", lambda: next(growing))
    monkeypatch.setattr(session, "request_nodes", asked.append)
    monkeypatch.setattr(room, "_POLL_S", 0.01)
    cluster = ClusterConfig(scale_up_s=60)
    check_room(cluster)
    assert asked == [bundles(cluster), []]


def test_a_wait_for_nodes_that_never_come_ends_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(session, "nodes", lambda: [Node(1)])
    monkeypatch.setattr(session, "request_nodes", asked.append)
    with pytest.raises(ClusterError, match=r"need 2 CPUs, the cluster has 1.*within cluster\.scale_up_s \(0\.05 s\)"):
        check_room(ClusterConfig(scale_up_s=0.05))
    assert asked[-1] == []


def test_an_elastic_run_needs_room_for_its_fewest_workers_each_with_its_loader() -> None:
    def fits(low: int, high: int, loader_cpus: int, *cpus: int) -> bool:
        cluster = ClusterConfig(num_workers=(low, high), loader_cpus=loader_cpus)
        return shortage(cluster, [Node(count) for count in cpus]) is None

    assert fits(1, 8, 1, 2)
    assert not fits(1, 8, 1, 1, 1)  # a worker and its loader are on one node
    assert fits(2, 8, 1, 2, 2)
    assert not fits(2, 8, 1, 3)
    assert fits(1, 2, 4, 3)  # 2 of the 4 loader CPUs beside each
    assert not fits(1, 2, 4, 2)
    assert bundles(ClusterConfig(num_workers=(1, 2), loader_cpus=4)) == [{"CPU": 3}] * 2


def test_a_wait_for_a_lost_node_is_told_once_with_what_to_do_and_so_is_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [[Node(0), Node(2), Node(2)], *[[Node(0), Node(2)]] * 3, [Node(0), Node(2), Node(4)]]
    looks = iter(seen)
    done = threading.Event()

    def nodes() -> list[Node]:
        look = next(looks, None)
        if look is None:
            done.set()
        return seen[-1] if look is None else look

    said: list[str] = []
    monkeypatch.setattr(session, "nodes", nodes)
    with telling_waits(ClusterConfig(num_workers=2), "end it", said.append, poll_s=0.001):
        assert done.wait(10)
    assert said == [
        "waiting for a node: cluster: 2 workers x 1 CPUs + 1 loader CPUs need 3 CPUs, the cluster has 2 (nodes: 2 "
        "CPUs); add one (`ray start --address=...`, or leave it to the autoscaler) and it goes on by itself, or, if "
        "no step follows, end it",
        "nodes have come, there is room again (nodes: 2 CPUs, 4 CPUs): going on",
    ]


@pytest.mark.parametrize(("left", "waits"), [([3, 2], False), ([3], False), ([2], True), ([1, 1, 1], True)])
def test_no_wait_is_told_of_a_run_that_goes_on_with_fewer_loader_cpus(
    monkeypatch: pytest.MonkeyPatch, left: list[int], waits: bool
) -> None:
    cluster = ClusterConfig(num_workers=1, cpus_per_worker=2, loader_cpus=4)
    assert shortage(cluster, [Node(4), Node(2)]) is None
    assert shortage(cluster, [Node(cpus) for cpus in left]) is not None  # it would not be begun now
    looks, done = 0, threading.Event()

    def nodes() -> list[Node]:
        nonlocal looks
        looks += 1
        if looks > 2:
            done.set()
        return [Node(cpus) for cpus in left]

    said: list[str] = []
    monkeypatch.setattr(session, "nodes", nodes)
    with telling_waits(cluster, "end it", said.append, poll_s=0.001):
        assert done.wait(10)
    assert len(said) == waits


def test_a_wait_that_lasts_is_told_again_and_a_head_that_does_not_answer_is_no_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks = iter([ConnectionError("the head is away"), [Node(1)], [Node(1)]])
    done = threading.Event()

    def nodes() -> list[Node]:
        look = next(looks, None)
        if look is None:
            done.set()
            return [Node(2)]
        if isinstance(look, Exception):
            raise look
        return look

    said: list[str] = []
    monkeypatch.setattr(session, "nodes", nodes)
    monkeypatch.setattr(room, "_REMIND_S", 0.0)
    with telling_waits(ClusterConfig(), "end it", said.append, poll_s=0.001):
        assert done.wait(10)
    assert [line.split(":")[0] for line in said] == ["waiting for a node"] * 2 + [
        "nodes have come, there is room again (nodes"
    ]


def test_superpixels_that_wait_for_a_first_cpu_say_so_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([[Node(0)], [Node(0)], [Node(0), Node(1)]])
    done = threading.Event()

    def nodes() -> list[Node]:
        look = next(looks, None)
        if look is None:
            done.set()
        return [Node(0), Node(1)] if look is None else look

    said: list[str] = []
    monkeypatch.setattr(session, "nodes", nodes)
    with telling_waits_for_a_cpu("superpixels", "end it", said.append, poll_s=0.001):
        assert done.wait(10)
    assert said == [
        "waiting for a node: superpixels need 1 CPU for each task, the cluster has 0 (nodes: none); add one (`ray "
        "start --address=...`, or leave it to the autoscaler) and it goes on by itself, or end it",
        "nodes have come, there is room again (nodes: 1 CPUs): going on",
    ]
