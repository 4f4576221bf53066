"""MLflow's door: every run's parameters, code version, metrics and files.

The driver creates the store, the experiment and the run, once (several processes that open a fresh sqlite
store at the same moment break it). Workers attach to the run by its id. Metrics go to a journal file in the run's
folder first and to MLflow in batches, so that a tracking server that goes away costs nothing: what it missed
is sent when it is back, or by the next process that attaches.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidr.config import Config, fingerprint, public_dict
from slidr.data import storage

_log = logging.getLogger(__name__)
_SEND_SECONDS = 5.0
_BATCH = 500  # MLflow takes at most 1000 metrics a request
# A server that is gone must not hold training up for MLflow's default minutes of retries.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


@dataclass(frozen=True)
class RunHandle:
    """Where a run lives; small and picklable, for workers."""

    uri: str
    run_id: str


def tracking_uri(config: Config) -> str:
    """The configured MLflow URI; without one, an sqlite file in `run.folder`."""
    if config.tracking.uri is not None:
        return config.tracking.uri
    return f"sqlite:///{Path(config.run.folder).resolve() / 'mlflow.db'}"


def start_run(config: Config, stage: str, run_id: str | None = None) -> RunHandle:
    """Creates (or, given `run_id`, reopens) the MLflow run of a stage; called in the driver only."""
    client = _client(tracking_uri(config))
    handle_uri = tracking_uri(config)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
            return RunHandle(handle_uri, run_id)
        except Exception as error:  # the store was removed or replaced: the run is recorded anew
            _log.warning("MLflow does not know run %s any more (%s)", run_id, type(error).__name__)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        location = None
        if config.tracking.uri is None:
            location = (Path(config.run.folder).resolve() / "mlartifacts").as_uri()
        experiment_id = client.create_experiment(config.tracking.experiment, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    run = client.create_run(
        experiment_id,
        run_name=f"{stage}-{config.run.name}",
        tags={"stage": stage, "config_fingerprint": fingerprint(config), **code_version()},
    )
    _log_params(client, run.info.run_id, config)
    client.log_dict(run.info.run_id, public_dict(config), "config.yaml")
    return RunHandle(handle_uri, run.info.run_id)


def end_run(handle: RunHandle, status: str, tags: dict[str, str] | None = None) -> None:
    """Marks a run "FINISHED", "FAILED" or "KILLED", with last tags such as checkpoint paths."""
    client = _client(handle.uri)
    for name, value in (tags or {}).items():
        client.set_tag(handle.run_id, name, value)
    client.set_terminated(handle.run_id, status)


class Journal:
    """A run's metrics: one JSON line each in `path`, and, given a handle, the same in MLflow."""

    def __init__(self, path: str | Path, handle: RunHandle | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.handle = handle
        self._cursor = self.path.with_name(self.path.name + ".sent")  # bytes of the journal that MLflow has
        self._last_try = time.monotonic()
        self._warned = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics at a step; sends to MLflow every few seconds."""
        line = json.dumps({"step": step, "time_ms": int(time.time() * 1000), "metrics": metrics})
        with self.path.open("ab") as file:
            # A kill in the middle of a line must not swallow this one.
            start = b"" if self._ends_whole() else b"\n"
            file.write(start + line.encode() + b"\n")
        if time.monotonic() - self._last_try > _SEND_SECONDS:
            self.send()

    def send(self) -> bool:
        """Sends what MLflow does not have yet; false, with one warning, where the store cannot be reached."""
        self._last_try = time.monotonic()
        if self.handle is None or not self.path.exists():
            return True
        sent = self._sent()
        with self.path.open("rb") as file:
            file.seek(sent)
            fresh = file.read()
        try:
            self._send_lines(fresh.splitlines())
        except Exception as error:  # any failure of a remote store; training must go on
            if not self._warned:
                _log.warning(
                    "MLflow at %s cannot be reached (%s); metrics wait in %s and are sent later",
                    self.handle.uri.split("@")[-1],
                    type(error).__name__,
                    self.path,
                )
            self._warned = True
            return False
        storage.write_bytes_atomic(self._cursor, str(sent + len(fresh)).encode())
        self._warned = False
        return True

    def _sent(self) -> int:
        """Bytes of the journal that MLflow has; after damage, none: a metric sent twice is the same metric."""
        try:
            return int(self._cursor.read_text())
        except (OSError, ValueError):
            return 0

    def _ends_whole(self) -> bool:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _send_lines(self, lines: Iterable[bytes]) -> None:
        from mlflow.entities import Metric

        assert self.handle is not None
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        metrics = [
            Metric(name, float(value), entry["time_ms"], entry["step"])
            for entry in entries
            for name, value in entry["metrics"].items()
        ]
        client = _client(self.handle.uri) if metrics else None
        for first in range(0, len(metrics), _BATCH):
            assert client is not None
            client.log_batch(self.handle.run_id, metrics=metrics[first : first + _BATCH])


def read_journal(path: str | Path) -> dict[int, dict[str, float]]:
    """Metrics by step; where a resumed run repeated a step, the later value counts."""
    by_step: dict[int, dict[str, float]] = {}
    if Path(path).exists():
        for line in Path(path).read_bytes().splitlines():
            entry = _entry(line)
            if entry is None:
                continue
            by_step.setdefault(entry["step"], {}).update(entry["metrics"])
    return by_step


def _entry(line: bytes) -> dict[str, Any] | None:
    """A journal line, or None for one that a kill cut short."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def code_version() -> dict[str, str]:
    """The commit of the source tree, and whether it was changed since; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def serve_ui(uri: str, port: int) -> int:
    """Runs MLflow's web page on loopback until interrupted; returns its exit status.

    A tracking server has a page of its own: its address is printed instead.
    """
    if uri.startswith(("http://", "https://")):
        print(f"MLflow's page is at {uri.split('@')[-1]}")
        return 0
    _make_folder(uri)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri]
    return subprocess.call([*command, "--host", "127.0.0.1", "--port", str(port)])


def _client(uri: str) -> Any:
    for name, value in _IMPATIENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    _make_folder(uri)
    return MlflowClient(tracking_uri=uri)


def _make_folder(uri: str) -> None:
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)


def _log_params(client: Any, run_id: str, config: Config) -> None:
    from mlflow.entities import Param

    params = [Param(key, str(value)[:6000]) for key, value in _flatten(public_dict(config))]
    for first in range(0, len(params), 100):
        client.log_batch(run_id, params=params[first : first + 100])


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
