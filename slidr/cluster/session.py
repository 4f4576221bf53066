"""Ray's front door: start a private cluster on this machine, or join the one that is named.

Import this module before any other import of ray: it turns telemetry off, which Ray reads once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU tasks leave CUDA_VISIBLE_DEVICES alone

import ray
import ray.data
from ray._private import ray_constants
from ray.autoscaler.sdk import request_resources

from slidr.cluster.address import ClusterError, address_of, refused_connection, refused_start, require_answer
from slidr.config import ClusterConfig

__all__ = ["ClusterError", "Node", "start"]
OBJECT_STORE_BYTES = 1 << 30  # of a private cluster; by default Ray takes 30 % of the machine's memory


@dataclass(frozen=True)
class Node:
    """What one machine of a cluster has."""

    cpus: int
    gpus: int = 0
    memory: int = 0  # bytes that Ray hands out to tasks


def start(
    cluster: ClusterConfig,
    *,
    num_cpus: int | None = None,
    log_to_driver: bool = False,
    level: int = logging.ERROR,
) -> bool:
    """Connects this process to Ray; true where that started a new cluster.

    The cluster is `cluster.address`, else the one in the environment's RAY_ADDRESS (as inside `ray job submit`), else
    a private one on loopback with `num_cpus` CPUs (default: `cluster.local_cpus`, else this machine's), without
    dashboard or telemetry. A process that is connected already stays as it is. Raises `ClusterError` where an
    address does not answer, the cluster refuses this process's token, or none can be started here.
    """
    if ray.is_initialized():
        return False
    address = address_of(cluster)
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": log_to_driver}
    if address == "local":
        _keep_token_out_of_home()
        listen_on_loopback_only()
        options |= {
            "num_cpus": num_cpus if num_cpus is not None else cluster.local_cpus,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
    else:
        require_answer(address)
    with warnings.catch_warnings(), _own_sigterm():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            ray.init(address=address, **options)
        except Exception as error:  # Ray raises the bare class where a machine is too slow to start a node in time
            ray.shutdown()
            raise (refused_start(error) if address == "local" else refused_connection(address, error)) from error
    _quieten(level)
    return address == "local"


def stop() -> None:
    """Disconnects; a private cluster ends with it."""
    ray.shutdown()


def available_cpus() -> int:
    """CPUs of the whole cluster, busy ones included."""
    return int(ray.cluster_resources().get("CPU", 0))


def nodes() -> list[Node]:
    """The nodes that are alive, and what each has in all, whether busy or not."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(int(r.get("CPU", 0)), int(r.get("GPU", 0)), int(r.get("memory", 0))) for r in resources]


def request_nodes(bundles: list[dict[str, float]]) -> None:
    """Tells an autoscaler, where there is one, what must fit at the same time; [] takes that back."""
    request_resources(bundles=bundles)


def machines() -> list[str]:
    """Host names of this process's machine and of all that may run workers."""
    nodes = (node for node in ray.nodes() if node["Alive"])
    hosts = {node["NodeManagerHostname"] for node in nodes if {"CPU", "GPU"} & node["Resources"].keys()}
    return sorted(hosts | {socket.gethostname()})


def _quieten(level: int) -> None:
    """Ray Data says little and draws nothing: the stages draw their own progress."""
    logging.getLogger("ray.data").setLevel(level)
    ray.data.DataContext.get_current().enable_progress_bars = False


def listen_on_loopback_only() -> None:
    """Makes Ray open every port of a cluster started from this process on 127.0.0.1.

    Ray replaces any spelling of localhost by the machine's outward address, and listens there, unless it
    takes this machine for one that cannot be part of a cluster; a private cluster is on such a machine.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keeps this process's own handler of SIGTERM, if it has one: Ray sets another."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _keep_token_out_of_home() -> None:
    """A private cluster's token lives in this process and its children only.

    Ray guards a new cluster with a token, for which it would write a file into the home directory. Whoever
    has set up Ray's authentication himself keeps it.
    """
    chosen = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    if not chosen:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
