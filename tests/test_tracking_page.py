"""MLflow's page: it ends with its command, and a port that is taken is an error."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slidr import tracking_page
from slidr.tracking_page import PageError, serve_ui

ROOT = Path(__file__).parents[1]


@pytest.fixture
def port() -> int:
    """One that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_taken_port_ends_the_command_with_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"run: {{folder: {tmp_path / 'runs'}}}\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "slidr.cli", "ui", str(tmp_path / "config.yaml"), "--tracking.ui_port", number],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert (
        f"slidr ui: tracking.ui_port: 127.0.0.1:{number} cannot be listened on (Address already in use)" in done.stderr
    )
    assert "--tracking.ui_port" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("number", [65536, -1, 1 << 40])
def test_a_port_that_does_not_exist_is_refused(tmp_path: Path, number: int) -> None:
    with pytest.raises(PageError, match=rf"127\.0\.0\.1:{number} cannot be listened on"):
        serve_ui(f"sqlite:///{tmp_path}/mlflow.db", number)


def stand_in(monkeypatch: pytest.MonkeyPatch, script: str) -> list[int]:
    """Another program in place of MLflow's server; its process numbers, once it is started."""
    started: list[int] = []

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        process = real([sys.executable, "-c", script], stdout=subprocess.PIPE, **options)
        assert process.stdout is not None
        started.extend(int(pid) for pid in process.stdout.readline().split())
        if len(started) > 1:
            signal.setitimer(signal.ITIMER_REAL, 0.5)  # once it runs, and not before
        return process

    real = subprocess.Popen
    monkeypatch.setattr(tracking_page, "connect", lambda uri: None)
    monkeypatch.setattr(tracking_page.subprocess, "Popen", popen)
    return started


def test_a_server_that_ends_by_itself_is_an_error_whatever_its_status(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "print(flush=True)")
    with pytest.raises(PageError, match=rf"127\.0\.0\.1:{port} ended by itself with status 0"):
        serve_ui(f"sqlite:///{tmp_path}/mlflow.db", port)


def test_an_interruption_ends_the_servers_children_too(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's main process does not end the ones that serve when it is killed."""
    script = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(os.getpid(), child.pid, flush=True)\ntime.sleep(600)"
    )
    started = stand_in(monkeypatch, script)
    before = signal.signal(signal.SIGALRM, lambda number, frame: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        with pytest.raises(KeyboardInterrupt):
            serve_ui(f"sqlite:///{tmp_path}/mlflow.db", port)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(started) == 2
    deadline = time.monotonic() + 30
    while any(lives(pid) for pid in started):
        assert time.monotonic() < deadline, started
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
