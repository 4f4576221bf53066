"""MLflow's web page over the runs: a server of its own on loopback, which ends with the command that started it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys

from slidr.tracking_store import connect
from slidr.urls import RedactedError, redact_url

_END_S = 10.0  # for the server to end by itself


class PageError(RedactedError, RuntimeError):
    """MLflow's page cannot be served; the message says why and what to do."""


def serve_ui(uri: str, port: int) -> int:
    """Runs MLflow's page on 127.0.0.1:`port` until interrupted; then all its processes end.

    A tracking server has a page of its own: its address is printed, and 0 returned. Raises `PageError` where the port
    cannot be had, or where the server ends by itself, `TrackingError` for a store that cannot be used.
    """
    if uri.startswith(("http://", "https://")):
        print(f"MLflow's page is at {redact_url(uri)}")
        return 0
    _require_free(port)
    connect(uri)  # makes the store of a file, under a lock; MLflow's server would without one
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    # A group of its own: MLflow's own main process leaves the others behind when it is ended alone.
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], start_new_session=True)
    try:
        status = server.wait()
    finally:
        _end(server)
    raise PageError(
        f"MLflow's page at 127.0.0.1:{port} ended by itself with status {status}; what it printed above says why, or "
        f"choose another --tracking.ui_port"
    )


def _require_free(port: int) -> None:
    """Raises `PageError` where nothing can listen on that port of loopback: MLflow would say so and exit with 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: a port just left is free
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise PageError(
                f"tracking.ui_port: 127.0.0.1:{port} cannot be listened on ({reason}); end what uses it, as an earlier "
                f"`slidr ui`, or choose another --tracking.ui_port from 1024 to 65535"
            ) from error


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ends every process of the server's group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_END_S)
