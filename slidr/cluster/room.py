"""Whether a cluster holds a training job, before it and while it runs, and the wait for an autoscaler to enlarge it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from slidr.cluster import session
from slidr.cluster.session import ClusterError, Node
from slidr.config import ClusterConfig
from slidr.urls import redacting_logger

_POLL_S = 5.0
_REMIND_S = 600.0  # between lines about the same wait
_log = redacting_logger(__name__)


def check_room(cluster: ClusterConfig) -> None:
    """Raises `ClusterError` unless the connected cluster holds the workers and the loader at the same time.

    Where `cluster.scale_up_s` is not 0, an autoscaler is asked for what is missing and given that long.
    """
    problem = shortage(cluster, session.nodes())
    if problem is not None and cluster.scale_up_s > 0:
        problem = _await_nodes(cluster, problem)
    if problem is not None:
        raise ClusterError(problem)


def shortage(cluster: ClusterConfig, nodes: Sequence[Node]) -> str | None:
    """What nodes lack for the workers and the loader, and what to do about it; None where nothing is missing.

    Workers that reserve every CPU would wait for ever for samples that no CPU is left to make. A worker does not
    span nodes.
    """
    missing = _missing(cluster, nodes)
    return None if missing is None else "; ".join(missing)


def _missing(cluster: ClusterConfig, nodes: Sequence[Node]) -> tuple[str, str] | None:
    """What is needed and what is there, and what to do about it."""
    # An elastic run begins with its fewest workers, and each keeps the CPUs for its loading.
    workers, cpus = cluster.min_workers, cluster.reserved_cpus
    loader = 0 if cluster.elastic else cluster.loader_cpus
    needed, have = workers * cpus + loader, sum(node.cpus for node in nodes)
    if have < needed:
        return (
            f"cluster: {workers} workers x {cpus} CPUs + {loader} loader CPUs need {needed} CPUs, the cluster has "
            f"{have}",
            "lower cluster.num_workers or cluster.cpus_per_worker, or add nodes (a cluster started here takes "
            "cluster.local_cpus)",
        )
    places = sum(node.cpus // cpus for node in nodes)
    if places < workers:
        return (
            f"cluster.cpus_per_worker: {workers} workers of {cpus} CPUs, but the nodes have room for {places} such "
            f"workers",
            "lower cluster.cpus_per_worker or add larger nodes",
        )
    if not cluster.use_gpu:
        return None
    gpus = sum(node.gpus for node in nodes)
    if gpus < workers:
        return (
            f"cluster.use_gpu: {workers} workers need as many GPUs, the cluster has {gpus}",
            "lower cluster.num_workers or set cluster.use_gpu: false",
        )
    beside = sum(min(node.gpus, node.cpus // cpus) for node in nodes)
    if beside < workers:
        return (
            f"cluster.cpus_per_worker: {workers} workers of 1 GPU and {cpus} CPUs, but the nodes with GPUs have CPUs "
            f"for {beside} such workers",
            "lower cluster.cpus_per_worker",
        )
    return None


def telling_waits(
    cluster: ClusterConfig, end_and_go_on: str, tell: Callable[[str], None] = _log.warning, poll_s: float = _POLL_S
) -> contextlib.AbstractContextManager[None]:
    """While the block runs, says when nodes have gone without which the job cannot go on, and when others have come.

    `end_and_go_on` is what to do for whoever has none to add. Nodes count as Ray counts them: one that vanished goes as
    soon as Ray has missed it.
    """
    if not cluster.elastic:  # a run that has lost loader CPUs goes on with those that are left, slower
        cluster = replace(cluster, loader_cpus=min(1, cluster.loader_cpus))

    def missing(nodes: Sequence[Node]) -> str | None:
        problem = _missing(cluster, nodes)
        return None if problem is None else problem[0]

    return _telling(missing, f", if no step follows, {end_and_go_on}", tell, poll_s)


def telling_waits_for_a_cpu(
    what: str, end_and_go_on: str, tell: Callable[[str], None] = _log.warning, poll_s: float = _POLL_S
) -> contextlib.AbstractContextManager[None]:
    """As `telling_waits`, for tasks of one CPU each, such as superpixels: any node with a CPU will do."""

    def missing(nodes: Sequence[Node]) -> str | None:
        have = sum(node.cpus for node in nodes)
        return None if have > 0 else f"{what} need 1 CPU for each task, the cluster has {have}"

    return _telling(missing, f" {end_and_go_on}", tell, poll_s)


@contextlib.contextmanager
def _telling(
    missing: Callable[[Sequence[Node]], str | None], advice: str, tell: Callable[[str], None], poll_s: float
) -> Iterator[None]:
    """While the block runs, says what nodes lack, every `_REMIND_S` seconds: Ray waits for them silently."""
    stop = threading.Event()

    def watch() -> None:
        told: float | None = None  # when the wait was last told of
        while not stop.wait(poll_s):
            try:
                nodes = session.nodes()
            except Exception:  # a head that does not answer says nothing of room
                continue
            problem = missing(nodes)
            if problem is None:
                if told is not None:
                    tell(f"nodes have come, there is room again ({_in_words(nodes)}): going on")
                told = None
            elif told is None or time.monotonic() - told > _REMIND_S:
                tell(
                    f"waiting for a node: {problem} ({_in_words(nodes)}); add one (`ray start --address=...`, or "
                    f"leave it to the autoscaler) and it goes on by itself, or{advice}"
                )
                told = time.monotonic()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(poll_s)  # it may be asking a head that does not answer


def _in_words(nodes: Sequence[Node]) -> str:
    """What there is to work on, such as "nodes: 4 CPUs, 2 CPUs + 1 GPUs"."""
    each = [f"{node.cpus} CPUs" + (f" + {node.gpus} GPUs" if node.gpus else "") for node in nodes]
    return "nodes: " + (", ".join(words for words, node in zip(each, nodes, strict=True) if node.cpus) or "none")


def of_one_job(cluster: ClusterConfig) -> ClusterConfig:
    """What one job of a search needs: a single worker loads its own samples."""
    return replace(cluster, loader_cpus=0) if cluster.max_workers == 1 else cluster


def bundles(cluster: ClusterConfig) -> list[dict[str, float]]:
    """What a training job reserves, as Ray's autoscaler wants to hear it: one entry a worker, one a loader CPU."""
    worker: dict[str, float] = {"CPU": cluster.reserved_cpus}
    if cluster.use_gpu:
        worker["GPU"] = 1
    loader = 0 if cluster.elastic else cluster.loader_cpus
    return [worker] * cluster.max_workers + [{"CPU": 1.0}] * loader


def _await_nodes(cluster: ClusterConfig, problem: str | None) -> str | None:
    """What is still missing once the autoscaler had its time, or None.

    The request is taken back at the end, so that nodes that idle later may go.
    """
    session.request_nodes(bundles(cluster))
    end = time.monotonic() + cluster.scale_up_s
    try:
        while problem is not None and time.monotonic() < end:
            time.sleep(min(_POLL_S, cluster.scale_up_s))
            problem = shortage(cluster, session.nodes())
    finally:
        session.request_nodes([])
    if problem is None:
        return None
    return f"{problem}; no autoscaler brought them within cluster.scale_up_s ({cluster.scale_up_s:g} s)"
