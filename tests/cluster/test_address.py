"""Clusters that do not answer, that refuse a token, that cannot start: named within seconds, with what to do."""

from __future__ import annotations

import functools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import FaultCluster, clean_environment
from ray._private import services

from slidr.cluster import address
from slidr.cluster.address import ClusterError, require_answer

# Connects as every command does; prints what came of it.
_CONNECT = """
import json, sys
from slidr.cluster import session
from slidr.config import ClusterConfig
try:
    session.start(ClusterConfig(address=None if sys.argv[1] == "null" else sys.argv[1], local_cpus=1))
    print(json.dumps({"nodes": len(session.nodes())}))
except session.ClusterError as error:
    print(json.dumps({"error": str(error)}))
"""


def connect(where: str, environment: dict[str, str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", _CONNECT, where], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which `ray start` notes its cluster, on a machine where none runs."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "find_gcs_addresses", functools.lru_cache(lambda: set()))
    monkeypatch.setattr(services, "resolve_ip_for_localhost", lambda host: host)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


@pytest.fixture
def closed() -> Iterator[str]:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_a_note_of_a_cluster_that_has_ended_is_named_with_its_file_and_what_to_do(noted: Path, closed: str) -> None:
    noted.write_text(closed)
    with pytest.raises(ClusterError) as refused:
        require_answer("auto")
    message = str(refused.value)
    assert message.startswith(f"cluster.address: auto: {noted} names {closed}: no Ray cluster answers")
    assert "remove the file" in message
    assert "cluster.address: null" in message


@pytest.mark.parametrize("text", ["", "rubbish {}", "\0", "127.0.0.1:x", "a" * 100_000])
def test_a_damaged_note_is_named_too(noted: Path, text: str) -> None:
    noted.write_text(text)
    with pytest.raises(ClusterError, match=r"cluster\.address: auto: .*ray_current_cluster") as refused:
        require_answer("auto")
    assert len(str(refused.value)) < 600


def test_without_a_note_the_file_that_is_missing_is_named(noted: Path) -> None:
    with pytest.raises(ClusterError, match=rf"no Ray cluster runs on this machine and there is no {noted}; start one"):
        require_answer("auto")


def test_what_listens_and_does_not_answer_as_ray_does_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another program has been given the port of a cluster that has ended."""
    monkeypatch.setattr(address, "ANSWER_S", 0.5)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        where = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ClusterError, match=rf"{where}: no Ray cluster answers \(something listens there"):
            require_answer(where)

        def greet() -> None:
            while True:
                try:
                    client, _ = mute.accept()
                except OSError:
                    return
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(ClusterError, match=rf"{where}: no Ray cluster answers \(something listens there"):
            require_answer(where)


def test_the_job_servers_address_is_not_taken_for_the_clusters() -> None:
    with pytest.raises(ClusterError, match=r"http://127\.0\.0\.1:8265: is the address of a job server.*HOST:6379"):
        require_answer("http://127.0.0.1:8265")


def test_sigterm_ends_a_process_that_waits_for_a_silent_address() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        script = (
            "import sys\nfrom slidr.interrupts import interruptible\n"
            "from slidr.cluster.address import require_answer\n"
            "with interruptible('do this') as interruption:\n"
            "    print('connects', flush=True)\n"
            "    try:\n        require_answer(sys.argv[1])\n"
            "    except KeyboardInterrupt:\n        sys.exit(interruption.status)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", script, f"127.0.0.1:{mute.getsockname()[1]}"],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"connects\n"
        mute.settimeout(30)
        with mute.accept()[0], mute.accept()[0]:  # the first look, then the question
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 143
        process.communicate()


def test_a_folder_too_long_for_sockets_is_named_with_its_length_and_the_limit(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    refused = connect("null", {**clean_environment(), "TMPDIR": str(folder)})["error"]
    assert str(folder) in refused
    assert "the system takes 107; set RAY_TMPDIR to a shorter folder, such as /tmp" in refused
    path = refused.partition("its socket ")[2].partition(" would")[0]
    assert f"a path of {len(path)} bytes" in refused
    assert "less busy" not in refused


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = connect("null", {**clean_environment(), "RAY_TMPDIR": str(tmp_path / "file")})["error"]
    assert f"Ray keeps its files in {tmp_path / 'file' / 'ray'}: set RAY_TMPDIR" in refused
    assert "less busy" not in refused


@pytest.mark.chaos
def test_a_clusters_token_is_asked_for_and_a_refusal_says_so(tmp_path: Path) -> None:
    with FaultCluster(cpus=[]) as cluster:
        mine = {**cluster.environment, "HOME": str(tmp_path)}
        assert connect(cluster.address, mine) == {"nodes": 1}
        answers = f"cluster.address: {cluster.address}: the cluster answers, but refused this process's token"
        none = {name: value for name, value in mine.items() if name != "RAY_AUTH_TOKEN"}
        cases = {
            "it took the one of RAY_AUTH_TOKEN": {**mine, "RAY_AUTH_TOKEN": "0" * 64},
            "none was found": none,
            "RAY_AUTH_MODE is disabled, so none was sent": {**mine, "RAY_AUTH_MODE": "disabled"},
        }
        for sent, environment in cases.items():
            refused = connect(cluster.address, environment)["error"]
            assert refused.startswith(f"{answers} ({sent})"), refused
            assert "RAY_AUTH_TOKEN_PATH" in refused
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(mine["RAY_AUTH_TOKEN"] + "\n")
        assert connect(cluster.address, none) == {"nodes": 1}
