"""Runs in MLflow: created or reopened by the driver, completed at their end; their code version, parameters and files.

The driver creates the store, the experiment and the run, once; workers attach to the run by its id. Metrics take the
way of `slidr.tracking_journal`; what MLflow's store raises is a `TrackingError` (`slidr.tracking_errors`).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slidr.config import Config, fingerprint, public_dict
from slidr.data import storage
from slidr.tracking_errors import TrackingError
from slidr.tracking_file import artifact_location, deleted_experiment, file_of, follow_move
from slidr.tracking_journal import Journal, JournalError, RunHandle, read_journal
from slidr.tracking_store import Client, check_store, connect, tracking_uri
from slidr.training.runs import RunFolder
from slidr.urls import redact_url, redacting_logger

__all__ = [
    "Journal",
    "JournalError",
    "RunHandle",
    "TrackingError",
    "check_store",
    "connect",
    "finish_run",
    "open_run",
    "read_journal",
    "record_config",
    "start_run",
    "tracking_uri",
]
NOTE, ENDED = "mlflow_run_id", "mlflow_ended"  # of a run's folder: its run, and whether that is complete
_log = redacting_logger(__name__)
_GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # no such run; a deleted one


def open_run(config: Config, stage: str, folder: RunFolder) -> RunHandle:
    """The MLflow run of a folder, which notes it: the one that it has already, or a new one.

    A new one gets every metric of the folder's journal, also those that an earlier run, now gone, has had.
    """
    earlier = folder.note(NOTE)
    run = start_run(config, stage, earlier)
    storage.delete(folder.file(ENDED))
    if run.run_id != earlier:
        storage.delete(folder.file("metrics.jsonl.sent"))
        folder.note(NOTE, run.run_id)
    return run


def finish_run(
    folder: RunFolder, run: RunHandle, status: str, tell: Callable[[int, int], None] = lambda sent, size: None
) -> None:
    """Sends what MLflow lacks of a folder's metrics and ends its run as "FINISHED", "FAILED" or "KILLED".

    Whatever the store does, nothing is raised: a warning says what is missing, and the next call makes up for it. A
    run that is complete already costs nothing.
    """
    if status == "FINISHED" and folder.note(ENDED) == run.run_id:
        return
    tags = {"checkpoints": redact_url(folder.checkpoints.path)}
    try:
        if status != "FINISHED":  # first: a signal that ended the run may be followed by SIGKILL within seconds
            end_run(run, status, tags)
        complete = Journal(folder.file("metrics.jsonl"), run).send(tell)
        # A run of an earlier version may be FINISHED without the note: ending it again would change its end time.
        if status == "FINISHED" and connect(run.uri).get_run(run.run_id).info.status != status:
            end_run(run, status, tags)
        if complete and status == "FINISHED":
            folder.note(ENDED, run.run_id)
    except (
        TrackingError,
        JournalError,
        OSError,
        storage.DataError,
    ) as error:  # a result counts more
        _log.warning("MLflow does not know yet that the run is %s (%s)", status, redact_url(str(error)))
        if status == "FINISHED" and getattr(error, "code", "") in _GONE:  # deleted there: nothing is left to complete
            folder.note(ENDED, run.run_id)


def finish_again(config: Config, folder: RunFolder, tell: Callable[[int, int], None] = lambda sent, size: None) -> None:
    """Completes the MLflow run of a finished folder whose driver ended before it could; else does nothing."""
    try:
        run_id = folder.note(NOTE)
        if run_id is not None:
            finish_run(folder, RunHandle(tracking_uri(config), run_id), "FINISHED", tell)
    except storage.DataError as error:  # a damaged note; the scores are shown all the same
        _log.warning("%s: MLflow may not know that the run is FINISHED", error)


def start_run(
    config: Config,
    stage: str,
    run_id: str | None = None,
    name: str | None = None,
    tags: dict[str, str] | None = None,
) -> RunHandle:
    """Creates (or, given `run_id`, reopens) the MLflow run of a stage; called in the driver only.

    A new run is called `name` (default: the stage and `run.name`) and carries `tags` besides the stage, the config's
    fingerprint and the code version. Raises `TrackingError`.
    """
    uri = tracking_uri(config)
    client = connect(uri)
    if run_id is not None and not re.fullmatch("[0-9a-f]{32}", run_id):
        _log.warning("%r is not an MLflow run's id (mlflow_run_id is damaged): the run is recorded again", run_id[:40])
        run_id = None
    experiment_id = _experiment(client, uri, config.tracking.experiment)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
            return RunHandle(uri, run_id)
        except TrackingError as error:
            # Only where the store was replaced, or the run deleted, is it recorded again; a store that is busy or away
            # must not give it a twin.
            if error.code not in _GONE:
                raise
            _log.warning("MLflow does not know run %s any more (%s)", run_id, error.code)
    run = client.create_run(
        experiment_id,
        run_name=name or f"{stage}-{config.run.name}",
        tags={"stage": stage, "config_fingerprint": fingerprint(config), **code_version(), **(tags or {})},
    )
    record_config(client, run.info.run_id, config)
    return RunHandle(uri, run.info.run_id)


def _experiment(client: Client, uri: str, name: str) -> str:
    """The id of the experiment, made where there is none. Raises `TrackingError` for one that was deleted."""
    path = file_of(uri)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        # Of a file: beside it, not in whatever folder this process works in.
        location = None if path is None else artifact_location(path)
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except TrackingError as error:
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was quicker
    if experiment.lifecycle_stage == "deleted":
        raise deleted_experiment(uri, name, experiment.experiment_id)
    if path is not None:
        follow_move(uri, path, experiment.artifact_location)
    return str(experiment.experiment_id)


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
        client.set_tag(handle.run_id, name, redact_url(value))
    client.set_terminated(handle.run_id, status)


def code_version() -> dict[str, str]:
    """The commit of the source tree, and whether it was changed since; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        dirty = bool(_git(here, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git_commit": commit, "git_dirty": str(dirty).lower()}


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()
