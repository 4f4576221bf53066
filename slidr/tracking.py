"""MLflow's door: every run's parameters, code version, metrics and files.

The driver creates the store, the experiment and the run, once (several processes that open a fresh sqlite
store at the same moment break it). Workers attach to the run by its id. Metrics go to a journal file in the run's
folder first and to MLflow in batches, so that a tracking server that goes away costs nothing: what it missed
is sent when it is back, or by the next process that attaches.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidr.config import Config, fingerprint, public_dict
from slidr.data import storage

_log = logging.getLogger(__name__)
_SEND_SECONDS = 5.0
_UPLOAD_SECONDS = 30.0  # between uploads of a journal in an object store
_SQLITE = "sqlite:///"
_AWAY_SECONDS = 60.0  # before a store that did not answer is tried again
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such run; a deleted one
_BATCH = 500  # MLflow takes at most 1000 metrics a request
# A server that is gone must not hold training up for MLflow's default minutes of retries.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}


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


def start_run(
    config: Config,
    stage: str,
    run_id: str | None = None,
    name: str | None = None,
    tags: dict[str, str] | None = None,
) -> RunHandle:
    """Creates (or, given `run_id`, reopens) the MLflow run of a stage; called in the driver only.

    A new run is called `name` (default: the stage and `run.name`) and carries `tags` besides the stage, the config's
    fingerprint and the code version.
    """
    from mlflow.exceptions import MlflowException

    client = connect(tracking_uri(config))
    handle_uri = tracking_uri(config)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
            return RunHandle(handle_uri, run_id)
        except MlflowException as error:
            # Only where the store was replaced, or the run deleted, is it recorded anew; a store that is busy or away
            # must not give it a twin.
            if error.error_code not in _GONE:
                raise
            _log.warning("MLflow does not know run %s any more (%s)", run_id, error.error_code)
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        location = None
        if handle_uri.startswith(_SQLITE):  # beside the file, not in whatever folder this process works in
            location = (Path(handle_uri.removeprefix(_SQLITE)).resolve().parent / "mlartifacts").as_uri()
        experiment_id = client.create_experiment(config.tracking.experiment, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    run = client.create_run(
        experiment_id,
        run_name=name or f"{stage}-{config.run.name}",
        tags={"stage": stage, "config_fingerprint": fingerprint(config), **code_version(), **(tags or {})},
    )
    record_config(client, run.info.run_id, config)
    return RunHandle(handle_uri, run.info.run_id)


def record_config(client: Any, run_id: str, config: Config) -> None:
    """Logs the parameters that a run does not have yet, and the config as a file of it."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    params = [Param(key, str(value)[:6000]) for key, value in _flatten(public_dict(config)) if key not in known]
    for first in range(0, len(params), 100):
        client.log_batch(run_id, params=params[first : first + 100])
    client.log_dict(run_id, public_dict(config), "config.yaml")


def end_run(handle: RunHandle, status: str, tags: dict[str, str] | None = None) -> None:
    """Marks a run "FINISHED", "FAILED" or "KILLED", with last tags such as checkpoint paths."""
    client = connect(handle.uri)
    for name, value in (tags or {}).items():
        client.set_tag(handle.run_id, name, value)
    client.set_terminated(handle.run_id, status)


class JournalError(RuntimeError):
    """A journal that cannot be written; the message says where and why."""


class Journal:
    """A run's metrics: one JSON line each in `path`, and, given a handle, the same in MLflow.

    An object store cannot append: there the lines are kept in memory and uploaded whole by `flush`, every half a
    minute and whenever the caller asks for it, as before each checkpoint.
    """

    def __init__(self, path: str | Path, handle: RunHandle | None = None) -> None:
        self.path = os.fspath(path)
        self.handle = handle
        self._remote = storage.is_remote(self.path)
        self._lines = bytearray(_read(self.path) if self._remote else b"")  # of an object store's journal
        self._uploaded = len(self._lines)
        self._cursor = storage.sibling(self.path, ".sent")  # bytes of the journal that MLflow has
        self._last_upload = time.monotonic()
        self._next_try = self._last_upload + _SEND_SECONDS
        self._warned = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics at a step; sends to MLflow every few seconds. Raises `JournalError` where it cannot write."""
        self._append({"step": step, "time_ms": int(time.time() * 1000), "metrics": metrics})
        if time.monotonic() > self._next_try:
            sent = self.send()
            # Counted from the end of the try: one that ran into time-outs must not be followed by the next at once.
            self._next_try = time.monotonic() + (_SEND_SECONDS if sent else _AWAY_SECONDS)

    def note(self, text: str) -> None:
        """Adds a line for whoever follows the run. Raises `JournalError` where it cannot write."""
        self._append({"time_ms": int(time.time() * 1000), "note": text})
        self.flush()

    def flush(self) -> None:
        """Makes what was logged visible to others; on this machine it is already."""
        if len(self._lines) > self._uploaded:
            with self._writing():
                storage.write_bytes_atomic(self.path, bytes(self._lines))
            self._uploaded, self._last_upload = len(self._lines), time.monotonic()

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Within the block, this project's log warnings of this process are lines of the journal too.

        A worker's own output stays on its node; whoever follows the journal shows them (`slidr.cluster.progress`).
        """
        handler, logger = _JournalHandler(self), logging.getLogger("slidr")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            self.flush()

    def send(self) -> bool:
        """Sends what MLflow does not have yet; false, with one warning, where the store cannot be reached."""
        if self.handle is None:
            return True
        sent = self._sent()
        fresh = self._after(sent)
        if not fresh:
            return True
        try:
            self._send_lines(fresh.splitlines())
            storage.write_bytes_atomic(self._cursor, str(sent + len(fresh)).encode())
        except Exception as error:  # any failure of a remote store; training must go on
            if not self._warned:
                self._warned = True
                _log.warning(
                    "MLflow at %s cannot be reached (%s); metrics wait in %s and are sent later",
                    self.handle.uri.split("@")[-1],
                    type(error).__name__,
                    self.path,
                )
            return False
        self._warned = False
        return True

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        if self._remote:
            self._lines += line
            if time.monotonic() - self._last_upload > _UPLOAD_SECONDS:
                self.flush()
            return
        with self._writing():
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                # A kill in the middle of a line must not swallow this one.
                file.write(line if self._ends_whole() else b"\n" + line)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be written ({error.strerror or error})") from error

    def _after(self, start: int) -> bytes:
        """The journal from a byte on."""
        if self._remote:
            return bytes(self._lines[start:])
        if not os.path.exists(self.path):
            return b""
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read()

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _sent(self) -> int:
        """Bytes of the journal that MLflow has; after damage, none: a metric sent twice is the same metric."""
        try:
            return int(storage.read_bytes(self._cursor))
        except ValueError:  # no file, or no number in it
            return 0

    def _send_lines(self, lines: Iterable[bytes]) -> None:
        from mlflow.entities import Metric

        assert self.handle is not None
        entries = [entry for line in lines if (entry := _entry(line)) is not None]
        metrics = [
            Metric(name, float(value), entry["time_ms"], entry["step"])
            for entry in entries
            for name, value in entry["metrics"].items()
        ]
        client = connect(self.handle.uri) if metrics else None
        for first in range(0, len(metrics), _BATCH):
            assert client is not None
            client.log_batch(self.handle.run_id, metrics=metrics[first : first + _BATCH])


def read_journal(path: str | Path) -> dict[int, dict[str, float]]:
    """Metrics by step; where a resumed run repeated a step, the later value counts."""
    by_step: dict[int, dict[str, float]] = {}
    for line in _read(os.fspath(path)).splitlines():
        entry = _entry(line)
        if entry is not None:
            by_step.setdefault(entry["step"], {}).update(entry["metrics"])
    return by_step


class _JournalHandler(logging.Handler):
    """Writes warnings as lines of a journal."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._journal._append({"time_ms": int(record.created * 1000), "warning": record.getMessage()})
            self._journal.flush()
        except Exception:
            self.handleError(record)


def _read(path: str) -> bytes:
    """A journal's bytes; none where there is no file yet."""
    return storage.read_bytes(path) if storage.exists(path) else b""


def _entry(line: bytes) -> dict[str, Any] | None:
    """A journal line of metrics; None for a message's, or one that a kill cut short."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if "metrics" in entry else None


def code_version() -> dict[str, str]:
    """The commit of the source tree, and whether it was changed since; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def unreachable(uri: str, timeout: float = 2.0) -> str | None:
    """Why a tracking store cannot be used, or None. A server is asked once; of a file, its folder is looked at."""
    if uri.startswith(("http://", "https://")):
        scheme, _, rest = uri.rstrip("/").partition("://")
        try:
            with urllib.request.urlopen(f"{scheme}://{rest.split('@')[-1]}/health", timeout=timeout) as answer:
                return None if answer.status == 200 else f"answers with status {answer.status}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            return f"does not answer ({getattr(error, 'reason', error)})"
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        while not os.path.exists(folder):  # false, too, where it may not be looked for
            folder = folder.parent
        return None if os.access(folder, os.W_OK) else f"{folder} cannot be written"
    return None


def connect(uri: str) -> Any:
    """MLflow's client of a store, quiet and impatient."""
    for name, value in (_IMPATIENT | _QUIET).items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    _make_folder(uri)
    return MlflowClient(tracking_uri=uri)


def _make_folder(uri: str) -> None:
    if uri.startswith(_SQLITE):
        Path(uri.removeprefix(_SQLITE)).parent.mkdir(parents=True, exist_ok=True)


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
