"""A search in MLflow: one run for the search, one for each fraction, one for each trial and final.

The tree mirrors the search's folders. The driver alone makes runs; a job attaches to its own by id. Nothing waits for
the store: what it missed while it was away is made up for at the next job's end, at the search's end, or when the same
command runs again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from slidr.config import Config
from slidr.data import storage
from slidr.data.storage import DataError
from slidr.tracking import (
    Journal,
    JournalError,
    RunHandle,
    TrackingError,
    connect,
    record_config,
    start_run,
    tracking_uri,
)
from slidr.training.runs import RunFolder, folder_of
from slidr.tuning.jobs import End, Job, fraction_name, job_config, search_folder
from slidr.urls import redact_url, redacting_logger

T = TypeVar("T")
_log = redacting_logger(__name__)
_PAUSE_S = 30.0  # before a store that did not answer is tried again
_STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
_NOTE, _MIRRORED = "mlflow_run_id", "mlflow_mirrored"


class SearchTracker:
    """Keeps the tree of one search. Its methods return at once, without an error, while the store is away."""

    def __init__(self, config: Config, tags: dict[str, str]) -> None:
        self._config, self._tags = config, tags
        self._inside = replace(config, tracking=replace(config.tracking, uri=tracking_uri(config)))
        self._known: dict[str, str] = {}  # run ids by folder, of the runs that this process made or found
        self._parents: list[str] = []  # the runs of the search and of its fractions
        self._running: list[str] = []  # the runs of jobs that have been started and have not ended
        self._listed: dict[str, dict[str, str]] = {}  # run ids by name, of what the store had below a parent
        self._fresh = False  # the store knows nothing of this search: notes of earlier ids mean nothing
        self._retry_at = 0.0
        self._away = False

    @property
    def run_id(self) -> str | None:
        """The search's own run, once there is one."""
        return self._known.get(search_folder(self._config).path)

    def start(self, job: Job) -> RunHandle | None:
        """The job's run, made or taken up again; None while the store is away."""
        return self.trying(lambda: self._start(job))

    def end(self, job: Job, end: End, files: Sequence[str] = ()) -> bool:
        """Completes the job's run: all metrics, how it ended, files as artifacts. True when it is complete."""
        return bool(self.trying(lambda: self._end(job, end, files)))

    def close(self, status: str, files: Sequence[str] = ()) -> bool:
        """Ends the runs of the fractions and of the search; `files` become the search's artifacts.

        Where the search did not finish, the runs of jobs under way end with it.
        """
        return bool(self.trying(lambda: self._close(status, files)))

    def _start(self, job: Job) -> RunHandle:
        config = job_config(self._inside, job)
        handle = RunHandle(tracking_uri(self._config), self._run(config, folder_of(config), job))
        self._running.append(handle.run_id)
        return handle

    def _end(self, job: Job, end: End, files: Sequence[str]) -> bool:
        config = job_config(self._inside, job)
        folder = folder_of(config)
        # Below a parent that the store knows: one that was replaced has other parents, and misses everything.
        parent = self._fraction(job.group.fraction)
        if folder.note(_MIRRORED) == f"{parent}/{folder.note(_NOTE)}":
            return True
        handle = RunHandle(tracking_uri(self._config), self._run(config, folder, job))
        if not Journal(folder.file("metrics.jsonl"), handle).send():
            return False
        client = connect(handle.uri)
        if end.score is not None:
            client.log_metric(handle.run_id, "score", end.score, step=end.steps)
        for key, value in {"end": end.status, "reason": end.reason or ""}.items():
            client.set_tag(handle.run_id, key, redact_url(value)[:5000])
        for path in files:
            client.log_artifact(handle.run_id, path)
        client.set_terminated(handle.run_id, _STATUS[end.status])
        self._running = [run_id for run_id in self._running if run_id != handle.run_id]
        folder.note(_MIRRORED, f"{parent}/{handle.run_id}")
        return True

    def _close(self, status: str, files: Sequence[str]) -> bool:
        self._search()
        client = connect(tracking_uri(self._config))
        assert self.run_id is not None
        for path in files:
            _log_file(client, self.run_id, path)
        for run_id in [*(self._running if status != "FINISHED" else []), *self._parents]:
            client.set_terminated(run_id, status)
        return True

    def _run(self, config: Config, folder: RunFolder, job: Job) -> str:
        """A job's run below its fraction's."""
        parent = self._fraction(job.group.fraction)
        name = f"{fraction_name(job.group.fraction)} {job.group.method} {job.name}"
        values = {
            "fraction": repr(job.group.fraction),
            "method": job.group.method,
            "kind": job.kind,
            "index": str(job.index),
            "round": str(job.round),
        }
        without = () if job.group.method == "pretrained" else ("parent_sha256",)
        return self._made(config, folder, name, parent, values, without)

    def _search(self) -> str:
        folder, earlier = search_folder(self._config), self.run_id
        if earlier is not None:
            return earlier
        earlier = folder.note(_NOTE)
        run_id = self._made(self._config, folder, f"tune-{self._config.run.name}", None, {"kind": "search"})
        self._fresh = earlier is not None and run_id != earlier
        self._parents.append(run_id)
        return run_id

    def _fraction(self, fraction: float) -> str:
        parent, name = self._search(), fraction_name(fraction)
        folder = RunFolder(storage.join(search_folder(self._config).path, name))
        config = replace(self._inside, data=replace(self._config.data, train_fraction=fraction))
        run_id = self._made(config, folder, name, parent, {"kind": "fraction", "fraction": repr(fraction)})
        if run_id not in self._parents:
            self._parents.append(run_id)
        return run_id

    def _made(
        self,
        config: Config,
        folder: RunFolder,
        name: str,
        parent: str | None,
        tags: dict[str, str],
        without: Sequence[str] = (),  # of the search's tags
    ) -> str:
        """The run of a folder: known, found in the store by the folder's note or by its name and parent, or new."""
        if folder.path not in self._known:
            ours = {key: value for key, value in self._tags.items() if key not in without}
            tags = {**ours, **tags, **({} if parent is None else {"mlflow.parentRunId": parent})}
            earlier = None if self._fresh else folder.note(_NOTE)
            if earlier is None and parent is not None:
                earlier = self._unnoted(parent, name)
                if earlier is not None:
                    record_config(connect(tracking_uri(config)), earlier, config)
                    storage.delete(folder.file("metrics.jsonl.sent"))
                    folder.note(_NOTE, earlier)
            run_id = start_run(config, "tune", earlier, name, tags).run_id
            if run_id != earlier:
                folder.note(_NOTE, run_id)
                storage.delete(folder.file("metrics.jsonl.sent"))  # a new run has seen nothing yet
            self._known[folder.path] = run_id
        return self._known[folder.path]

    def _unnoted(self, parent: str, name: str) -> str | None:
        """The run of that name below a parent, which a process made that was killed before it could note it.

        It may lack parameters.
        """
        if parent not in self._listed:  # once: listing all for each new run would take ever longer
            client = connect(tracking_uri(self._config))
            experiment = client.get_run(parent).info.experiment_id
            listed: dict[str, str] = {}
            for run in _children(client, experiment, parent):
                listed.setdefault(run.info.run_name, run.info.run_id)
            self._listed[parent] = listed
        return self._listed[parent].get(name)

    def trying(self, call: Callable[[], T]) -> T | None:
        if time.monotonic() < self._retry_at:
            return None
        try:
            value = call()
        except (TrackingError, JournalError, DataError, OSError) as error:  # the search must go on
            if not self._away:
                _log.warning("%s; the search goes on and sends later", error)
            self._away, self._retry_at = True, time.monotonic() + _PAUSE_S
            self._listed.clear()  # the call may have made a run before it failed
            return None
        self._away = False
        return value

    def hurry(self) -> None:
        """Lets the next call try the store at once."""
        self._retry_at = 0.0


def read_search(uri: str, run_id: str) -> list[dict[str, Any]]:
    """Every trial and final below a search's run, read back from MLflow: the same names as in `trials.parquet`.

    The curve is that of `val_miou`. Sorted by fraction, method, kind (trials first) and index.
    """
    client = connect(uri)
    experiment = client.get_run(run_id).info.experiment_id
    rows = []
    for fraction in _children(client, experiment, run_id):
        for run in _children(client, experiment, fraction.info.run_id):
            tags, params, metrics = run.data.tags, run.data.params, run.data.metrics
            head = params["optim.head_lr"]
            history = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "val_miou")}
            rows.append(
                {
                    "fraction": float(tags["fraction"]),
                    "method": tags["method"],
                    "kind": tags["kind"],
                    "index": int(tags["index"]),
                    "round": int(tags["round"]),
                    "seed": int(params["run.seed"]),
                    "status": tags.get("end", "running"),
                    "score": metrics.get("score"),
                    "lr": float(params["optim.lr"]),
                    "head_lr": None if head == "None" else float(head),
                    "weight_decay": float(params["optim.weight_decay"]),
                    "batch_size": int(params["optim.batch_size"]),
                    "epochs": int(params["optim.epochs"]),
                    "curve": [value for _, value in sorted(history.items())],
                    "run_id": run.info.run_id,
                }
            )
    return sorted(rows, key=lambda row: (row["fraction"], row["method"], row["kind"] == "final", row["index"]))


def _children(client: Any, experiment: str, run_id: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _log_file(client: Any, run_id: str, path: str) -> None:
    """A file of this machine or of an object store as an artifact; MLflow takes files of this machine."""
    if not storage.is_remote(path):
        client.log_artifact(run_id, path)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, storage.name_of(path))
        copy.write_bytes(storage.read_bytes(path, storage.WEIGHTS_BYTES))
        client.log_artifact(run_id, str(copy))


def existing(folder: RunFolder, names: Sequence[str]) -> list[str]:
    """Those of a folder's files that are there."""
    return [path for path in map(folder.file, names) if Path(path).exists()]
