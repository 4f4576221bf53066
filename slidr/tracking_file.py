"""MLflow's store in a file of this machine (sqlite): made whole or not at all, brought up to date, found where it lies.

MLflow itself makes the tables of a fresh file in some fifty steps, without a lock: of several processes that do so at
the same moment most fail, and what they leave may be broken for good. So one process makes the file under another
name, holding a lock, and renames it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from slidr.config.paths import from_file_uri
from slidr.data import storage
from slidr.tracking_errors import ELSEWHERE, MOVE_AWAY, TrackingError, is_foreign, tracking_error
from slidr.training.locks import held
from slidr.training.runs import RunError
from slidr.urls import redacting_logger

SQLITE = "sqlite:///"
ARTIFACTS = "mlartifacts"  # the folder beside the file that holds the artifacts of runs
_WAIT_S = 120.0  # for another process to make the file
_BUSY_S = 20.0
_log = redacting_logger(__name__)
# Where MLflow's tables name files of a run.
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)


def file_of(uri: str) -> Path | None:
    """The absolute path of the file that an sqlite URI names; None for any other URI.

    Raises `TrackingError` for an sqlite URI that names no file.
    """
    if not uri.startswith("sqlite:"):
        return None
    path = uri.removeprefix(SQLITE).partition("?")[0]
    if not uri.startswith(SQLITE) or path in ("", ":memory:") or "\0" in path:
        raise TrackingError(
            uri, "is not a file's URI", "write sqlite:////absolute/path/mlflow.db or sqlite:///relative/mlflow.db",
            lasting=True,
        )  # fmt: skip
    return Path(path).absolute()


def prepare(uri: str, path: Path) -> None:
    """Makes the file's tables where there are none yet, and those of an older MLflow this version's.

    Raises `TrackingError`.
    """
    if exists(uri, path) and _revision(uri, path) == _head():
        _require_tables(uri, path)
        return
    try:
        with held(f"{path}.lock", f"MLflow's store {path}", _WAIT_S, "run again once it is made"), _telling(uri):
            if not path.exists():
                _create(path)
            elif (found := _revision(uri, path)) != _head():
                _upgrade(uri, path, found)
    except (RunError, OSError) as error:
        raise TrackingError(uri, f"cannot be made ({error})", ELSEWHERE) from error


def exists(uri: str, path: Path) -> bool:
    """Whether the file is there. Raises `TrackingError` for a path that no file can have, and what is not a file."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise TrackingError(uri, "is not a file (a folder, FIFO or device is there)", ELSEWHERE, lasting=True)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise TrackingError(uri, f"cannot be made ({error.strerror})", ELSEWHERE, lasting=True) from error
    return True


def check_file(uri: str, path: Path, experiment: str) -> None:
    """Raises the `TrackingError` that a run would end with; of a file that is there, which stays as it is."""
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise TrackingError(uri, "may not be written", ELSEWHERE, lasting=True)
    found = _revision(uri, path)
    if found is None and _tables(uri, path):
        raise _half_made(uri)
    if found not in (None, _head()) and found not in _revisions():
        raise _newer(uri, found)
    if found == _head():
        _require_tables(uri, path)
        with _reading(uri, path) as database:
            query = "SELECT lifecycle_stage, experiment_id FROM experiments WHERE name = ?"
            row = database.execute(query, (experiment,)).fetchone()
        if row is not None and row[0] == "deleted":
            raise deleted_experiment(uri, experiment, row[1])


def deleted_experiment(uri: str, experiment: str, number: object) -> TrackingError:
    """The error of an experiment that was deleted on MLflow's page."""
    restore = f"mlflow experiments restore --experiment-id {number}"
    return TrackingError(
        uri, f"holds the experiment {experiment!r} as a deleted one",
        f"restore it (MLFLOW_TRACKING_URI={uri} {restore}) or choose another --tracking.experiment", lasting=True,
    )  # fmt: skip


def artifact_location(path: Path) -> str:
    """Where the artifacts of runs in this file go."""
    return (path.resolve().parent / ARTIFACTS).as_uri()


def follow_move(uri: str, path: Path, located: str | None) -> None:
    """Makes a store that was moved or copied write artifacts beside itself again; `located`: its experiment's location.

    Only locations of the form that this project makes (`.../mlartifacts` of a file system) are changed, with a
    warning: runs recorded before are then found in the new place, too. A folder that exists, where there is none beside
    the file, was chosen by the user and stays.
    """
    here = artifact_location(path)
    located = located or ""
    if located == here or not (located.startswith("file:///") and located.endswith(f"/{ARTIFACTS}")):
        return
    if os.path.isdir(from_file_uri(located)) and not os.path.isdir(from_file_uri(here)):
        return
    _log.warning("%s was moved: its artifacts are in %s from now on, no longer in %s", path, here, located)
    with _telling(uri), contextlib.closing(sqlite3.connect(path, timeout=_BUSY_S)) as database, database:
        for table, column in _LOCATIONS:
            if column in {row[1] for row in database.execute(f"PRAGMA table_info({table})")}:
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE {column} = ? OR substr({column}, 1, ?) = ? || '/'",
                    (here, len(located) + 1, located, len(located) + 1, located),
                )


def _create(path: Path) -> None:
    import sqlalchemy
    from mlflow.store.db import utils

    storage.sweep_temporary(path.parent)
    temporary = path.parent / storage.temporary_name()
    engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.pool.StaticPool)  # in memory: no step waits
    try:
        utils._initialize_tables(engine)
        with contextlib.closing(engine.raw_connection()) as made:
            _copy(made.driver_connection, temporary)
        os.replace(temporary, path)
    finally:
        engine.dispose()
        temporary.unlink(missing_ok=True)


def _copy(database: Any, to: Path) -> None:
    """Writes a database into a new file, which then is on the disk."""
    with contextlib.closing(sqlite3.connect(to)) as file:
        database.backup(file)


def _upgrade(uri: str, path: Path, found: str | None) -> None:
    """Brings an older MLflow's file to this version's tables; the file as it was stays beside it."""
    from mlflow.store.db import utils

    if not _tables(uri, path):
        path.unlink()  # an empty file
        return _create(path)
    if found is None:
        raise _half_made(uri)
    if found not in _revisions():
        raise _newer(uri, found)
    copy = path.with_name(f"{path.name}.before-{found}")
    if not copy.exists():
        with contextlib.closing(sqlite3.connect(path, timeout=_BUSY_S)) as old:
            partial = copy.with_name(storage.temporary_name())
            _copy(old, partial)
            os.replace(partial, copy)
    _log.warning("%s was written by an older MLflow: brought up to date; as it was: %s", path, copy)
    engine = utils.create_sqlalchemy_engine(f"{SQLITE}{path}")
    try:
        utils._upgrade_db(engine)
    except Exception as error:
        engine.dispose()
        shutil.copyfile(copy, path)
        raise TrackingError(
            uri, f"was written by an older MLflow and cannot be brought up to date ({type(error).__name__})",
            MOVE_AWAY, lasting=True,
        ) from error  # fmt: skip
    finally:
        engine.dispose()


@contextlib.contextmanager
def _telling(uri: str) -> Iterator[None]:
    """Within the block a database's errors are `TrackingError`s."""
    try:
        yield
    except (TrackingError, RunError):
        raise
    except Exception as error:
        if not is_foreign(error):
            raise
        raise tracking_error(uri, error) from error


@contextlib.contextmanager
def _reading(uri: str, path: Path) -> Iterator[sqlite3.Connection]:
    """The database, for queries. What a killed writer left half-written is rolled back, which needs mode=rw."""
    location = f"{path.absolute().as_uri()}?mode=rw"
    with _telling(uri), contextlib.closing(sqlite3.connect(location, uri=True, timeout=_BUSY_S)) as database:
        yield database


def _tables(uri: str, path: Path) -> set[str]:
    with _reading(uri, path) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _revision(uri: str, path: Path) -> str | None:
    """The version of MLflow's tables in a file, as MLflow names it; None where it says none."""
    with _reading(uri, path) as database:
        if not database.execute("SELECT name FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
            return None
        row = database.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])


@lru_cache(maxsize=1)
def _script() -> Any:
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils

    return ScriptDirectory.from_config(utils._get_alembic_config(db_url=""))


def _head() -> str:
    """The version of the tables that this MLflow writes."""
    return str(_script().get_current_head())


@lru_cache(maxsize=1)
def _revisions() -> frozenset[str]:
    """All versions that this MLflow knows."""
    return frozenset(script.revision for script in _script().walk_revisions())


def _require_tables(uri: str, path: Path) -> None:
    """Raises `TrackingError` where a table is missing: MLflow would begin to make them all again."""
    from mlflow.store.db import utils

    missing = set(utils.Base.metadata.tables) - _tables(uri, path)
    if missing:
        raise TrackingError(uri, f"is damaged (no such table: {min(missing)})", MOVE_AWAY, lasting=True)


def _half_made(uri: str) -> TrackingError:
    return TrackingError(
        uri, "is half made, or not MLflow's: its tables have no version",
        MOVE_AWAY, lasting=True,
    )  # fmt: skip


def _newer(uri: str, found: str | None) -> TrackingError:
    from mlflow.version import VERSION

    return TrackingError(
        uri, f"was written by a newer MLflow than {VERSION} (its tables are of version {found})",
        "install that MLflow, or choose another --tracking.uri or --run.folder", lasting=True,
    )  # fmt: skip
