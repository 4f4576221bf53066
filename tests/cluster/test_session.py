"""A private cluster: reachable from this machine only, silent towards the world, and gone when it is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from slidr.cluster import session
from slidr.config import ClusterConfig

# Run in a process of its own: prints what the cluster that it started looks like from inside.
_PROBE = """
import json, os, pathlib, sys
from slidr.cluster import session
from slidr.config import ClusterConfig

def listening():
    "Local addresses on which this process's descendants listen."
    children, found = [os.getpid()], set()
    for pid in children:
        tasks = pathlib.Path(f"/proc/{pid}/task")
        children += [int(c) for t in tasks.glob("*/children") for c in t.read_text().split()]
    inodes = set()
    for pid in children:
        for fd in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(os.readlink(fd))
            except OSError:
                pass
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            field = line.split()
            if field[3] == "0A" and f"socket:[{field[9]}]" in inodes:
                found.add(field[1].split(":")[0])
    return sorted(found)

started = session.start(ClusterConfig(), num_cpus=2)
again = session.start(ClusterConfig(), num_cpus=5)
import ray

@ray.remote
def environment():
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

inside = ray.get(environment.remote())
print(json.dumps({
    "started": started, "again": again, "cpus": session.available_cpus(), "listening": listening(),
    "auth": inside.get("RAY_AUTH_MODE"), "token": len(inside.get("RAY_AUTH_TOKEN", "")),
    "telemetry": inside.get("RAY_USAGE_STATS_ENABLED"),
}))
session.stop()
"""


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="looks at Linux's /proc")
def test_a_private_cluster_keeps_to_itself(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", _PROBE],
        env={**clean, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert (seen["started"], seen["again"], seen["cpus"]) == (True, False, 2)
    # 127.0.0.1 as the kernel writes it, for IPv4 and for IPv4 inside IPv6.
    assert seen["listening"]
    assert set(seen["listening"]) <= {"0100007F", "0000000000000000FFFF00000100007F"}
    assert (seen["auth"], seen["token"], seen["telemetry"]) == ("token", 64, "0")
    assert not (tmp_path / ".ray").exists()
    assert done.stderr == ""


def test_an_address_where_nothing_listens_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(session.ClusterError, match=f"cluster.address: {address}: no Ray cluster answers"):
            session.start(ClusterConfig(address=address))
        with pytest.raises(session.ClusterError, match="start one with `ray start --head`"):
            session.start(ClusterConfig(address=f"ray://{address}"))
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(session.ClusterError, match=address):
            session.start(ClusterConfig())


@pytest.mark.parametrize("error", [None, RuntimeError("no cluster")])
def test_a_handler_of_sigterm_outlives_rays_own(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: None)  # as Ray does
        if error is not None:
            raise error

    def own(number: int, frame: object) -> None: ...

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", init)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(session, "_quieten", lambda level: None)
    monkeypatch.setattr(session, "require_answer", lambda address: None)
    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(session.ClusterError) if error is not None else contextlib.nullcontext():
            session.start(ClusterConfig(address="10.0.0.1:6379"))
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
