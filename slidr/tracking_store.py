"""The way to MLflow's store, a file or a server: quiet, without long waits, each error in a sentence."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import Any

from slidr.config import Config
from slidr.tracking_errors import ELSEWHERE, TrackingError, is_foreign, refused, tracking_error
from slidr.tracking_file import check_file, deleted_experiment, exists, file_of, prepare

# A server that is gone must not hold training up for MLflow's default minutes of retries.
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
_LOOK_S = 10.0  # that a server has to answer the look before a job
_WEB = ("http://", "https://")


def tracking_uri(config: Config) -> str:
    """The configured MLflow URI; without one, an sqlite file in `run.folder`."""
    if config.tracking.uri is not None:
        return config.tracking.uri
    return f"sqlite:///{Path(config.run.folder).resolve() / 'mlflow.db'}"


class Client:
    """MLflow's client of one store. What its calls raise about the store is a `TrackingError`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        path = file_of(uri)
        _require_scheme(uri)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            prepare(uri, path)
        from mlflow import MlflowClient

        self._client = _telling(uri, MlflowClient)(tracking_uri=uri)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        return _telling(self.uri, value) if callable(value) else value


def connect(uri: str) -> Client:
    """MLflow's client of a store; the store of an sqlite file is made where there is none yet.

    Raises `TrackingError`, as every call of the client does.
    """
    _quieten()
    try:
        return Client(uri)
    except OSError as error:
        raise TrackingError(uri, f"cannot be made ({error.strerror or error})", ELSEWHERE) from error


def check_store(uri: str, experiment: str) -> None:
    """Raises the `TrackingError` with which a run would end at once; nothing is made or changed.

    A server is asked once, with the credentials that MLflow itself would use; of a file its tables are looked at.
    """
    path = file_of(uri)
    if path is not None and not exists(uri, path):
        folder = path.parent
        while not os.path.exists(folder):  # false, too, where it may not be looked for
            folder = folder.parent
        if not os.access(folder, os.W_OK):
            raise TrackingError(
                uri, f"cannot be made: {folder} cannot be written", ELSEWHERE,
                lasting=True,
            )  # fmt: skip
        return
    _quieten()
    _require_scheme(uri)
    if path is not None:
        check_file(uri, path, experiment)
    elif uri.startswith(_WEB):
        _check_server(uri, experiment)
    else:
        known = _telling(uri, _look_up)(uri, experiment)
        if known is not None and known.lifecycle_stage == "deleted":
            raise deleted_experiment(uri, experiment, known.experiment_id)


def _check_server(uri: str, experiment: str) -> None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    if "?" in uri or "#" in uri:
        raise TrackingError(
            uri, "has a query, which no server would get", "set MLFLOW_TRACKING_TOKEN instead of a token in the URI",
            lasting=True,
        )  # fmt: skip
    answer = _telling(uri, http_request)(
        get_default_host_creds(uri), "/api/2.0/mlflow/experiments/get-by-name", "GET",
        params={"experiment_name": experiment}, timeout=_LOOK_S, max_retries=0, raise_on_status=False,
    )  # fmt: skip
    known = _record(answer.text)
    if answer.status_code == 404 and known.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
        return  # the first run makes it
    if answer.status_code != 200:
        raise refused(uri, answer.status_code)
    found = known.get("experiment")
    if not isinstance(found, dict):
        raise TrackingError(uri, "answers, but not as MLflow does", "check tracking.uri: is it MLflow's address?")
    if found.get("lifecycle_stage") == "deleted":
        raise deleted_experiment(uri, experiment, found.get("experiment_id"))


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _look_up(uri: str, experiment: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri).get_experiment_by_name(experiment)


def _require_scheme(uri: str) -> None:
    """Raises `TrackingError` for a URI of a kind that MLflow does not know."""
    from mlflow.environment_variables import MLFLOW_ALLOW_FILE_STORE
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    _telling(uri, _tracking_store_registry.get_store_builder, _unknown)(uri)
    scheme, separator, _ = uri.partition(":")
    if (not separator or scheme == "file") and not MLFLOW_ALLOW_FILE_STORE.get():
        raise _unknown(uri, None)


def _unknown(uri: str, error: Exception | None) -> TrackingError:
    return TrackingError(
        uri, "is not a kind of store that MLflow has",
        "set tracking.uri to http://HOST:5000 or sqlite:////folder/mlflow.db, or to null for a file in run.folder",
        lasting=True,
    )  # fmt: skip


def _telling(uri: str, call: Any, described: Any = tracking_error) -> Any:
    """The same call; what it raises about the store becomes a `TrackingError`."""

    @functools.wraps(call, updated=())
    def wrapped(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except TrackingError:
            raise
        except Exception as error:
            if not is_foreign(error):
                raise
            raise described(uri, error) from error

    return wrapped


def _quieten() -> None:
    for name, value in (_IMPATIENT | _QUIET).items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401  # it sets its loggers up

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # It logs the traceback of whatever it raises; this project prints what is raised once.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
