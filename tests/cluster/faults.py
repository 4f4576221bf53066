"""Faults, made on purpose: a cluster of real processes on this machine, and SIGKILL.

Linux only: who works for whom is read from /proc.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# A node that is gone refuses to answer and is noticed within about 3 s (by Ray's own settings, five times as long); one
# that is only slow to answer, on a busy machine, is not taken for gone.
QUICK_DETECTION = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 20_000,
    "health_check_failure_threshold": 3,
}
# `ray`, which would replace 127.0.0.1 by an address that the outside can reach, or else refuse a second node.
_RAY = """
from ray._private import ray_constants, services
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
from ray.scripts.scripts import main
main()
"""
_OBJECT_STORE_BYTES = 200 << 20
_POLL_S = 0.02
SUPERPIXEL_WORKER, TRAIN_WORKER = "ray::Map", "RayTrainWorker"  # in the titles of Ray's processes while they work


@dataclass
class Node:
    """A node: its `ray start --block` process, above all its others, and what that printed."""

    process: subprocess.Popen[bytes]
    log: Path


class FaultCluster:
    """A head without CPUs and nodes that can be killed, all on loopback, with a token of their own.

    Jobs reach it by `address` and `environment`. `quick`: lost nodes are noticed sooner than by Ray's own settings.
    """

    def __init__(self, cpus: Sequence[int], quick: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slidr-"))  # not below pytest's: paths of sockets are short
        self.address = f"127.0.0.1:{_free_port()}"
        self.environment = clean_environment()
        self.nodes: list[Node] = []
        port = self.address.rpartition(":")[2]
        options = ["--system-config", json.dumps(QUICK_DETECTION)] if quick else []
        try:
            self._head = self._start(
                "--head", "--port", port, "--num-cpus", "0", "--include-dashboard", "false",
                "--temp-dir", str(self.folder), *options,
            )  # fmt: skip
            _await_start(self._head)
            for count in cpus:  # one by one: of several that start at once, one may never be found by the head
                self.add_node(count)
        except BaseException:
            self.stop()
            raise

    def add_node(self, cpus: int) -> Node:
        """Another node, which is there when this returns."""
        node = self._start_node(cpus)
        self.nodes.append(node)
        _await_start(node)
        return node

    def kill_node(self, node: Node) -> None:
        """As if the machine lost its power: every process of the node, at once, without warning."""
        self.nodes.remove(node)
        kill_tree(node.process)

    def workers(self, title: str) -> list[tuple[Node, int]]:
        """Each process of the nodes whose title holds `title`, with its node."""
        return [(node, pid) for node in self.nodes for pid in process_tree(node.process.pid) if title in title_of(pid)]

    def __enter__(self) -> FaultCluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends all of it and leaves nothing."""
        for node in [*self.nodes, *([self._head] if hasattr(self, "_head") else [])]:
            kill_tree(node.process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start_node(self, cpus: int) -> Node:
        return self._start("--address", self.address, "--num-cpus", str(cpus))

    def _start(self, *arguments: str) -> Node:
        log = self.folder / f"node-{secrets.token_hex(4)}.log"
        command = [
            sys.executable, "-c", _RAY, "start", "--block", "--node-ip-address", "127.0.0.1",
            "--dashboard-agent-listen-port", "0", "--object-store-memory", str(_OBJECT_STORE_BYTES),
        ]  # fmt: skip
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*command, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        return Node(process, log)


def kill_worker(cluster: FaultCluster, title: str) -> int:
    """SIGKILL to one working process of that title; returns its process number."""
    victim = _await_workers(cluster, title)[-1][1]
    kill(victim)
    return victim


def kill_working_node(cluster: FaultCluster, title: str) -> None:
    """Ends a node on which a process of that title works."""
    cluster.kill_node(_await_workers(cluster, title)[-1][0])


def pids_of(cluster: FaultCluster, title: str) -> list[int]:
    """The process numbers of those that work under that title: at least one."""
    return [pid for _, pid in _await_workers(cluster, title)]


def await_end(pids: Sequence[int], timeout_s: float = 60) -> None:
    """Waits until none of the processes is left."""
    deadline = time.monotonic() + timeout_s
    while any(title_of(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there after {timeout_s:g} s: {[title_of(pid) for pid in pids]}"
        time.sleep(_POLL_S)


def kill(pid: int) -> None:
    """SIGKILL to one process. Raises `ProcessLookupError` where it has ended before."""
    os.kill(pid, signal.SIGKILL)


def _await_workers(cluster: FaultCluster, title: str, timeout_s: float = 60) -> list[tuple[Node, int]]:
    deadline = time.monotonic() + timeout_s
    while not (found := cluster.workers(title)):
        assert time.monotonic() < deadline, f"no process {title} within {timeout_s:g} s"
        time.sleep(_POLL_S)
    return found


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and to all below it; nothing where it has ended."""
    for pid in process_tree(process.pid) if process.poll() is None else []:
        try:
            kill(pid)
        except ProcessLookupError:
            continue
    process.wait()


def process_tree(root: int) -> list[int]:
    """A process and all below it, parents first."""
    pids = [root]
    for pid in pids:
        try:
            tasks = list(Path(f"/proc/{pid}/task").iterdir())
            pids += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:  # ended meanwhile
            continue
    return pids


def title_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def clean_environment() -> dict[str, str]:
    """This process's, without what binds it to another cluster; loopback only, a token of its own, one thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    root = str(Path(__file__).resolve().parents[2])
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nor may drivers and workers replace it
        "RAY_raylet_start_wait_time_s": "90",  # a busy machine must not fail a test
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


def _await_start(node: Node, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while "Ray runtime started" not in node.log.read_text(errors="replace"):
        waiting = node.process.poll() is None and time.monotonic() < deadline
        assert waiting, f"no node:\n{node.log.read_text(errors='replace')}"
        time.sleep(_POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
