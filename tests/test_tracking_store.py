"""MLflow's store: behind a password, made by several processes at once, damaged, moved, mistyped."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from tracking_servers import PASSWORD, TOKEN, USER, mlflow_server, password_proxy, self_signed

from slidr import tracking, tracking_file
from slidr.config import Config, RunConfig, TrackingConfig
from slidr.preflight import outputs
from slidr.tracking import Journal, TrackingError, check_store, connect, start_run
from slidr.training.runs import folder_of


def in_folder(folder: Path, name: str = "run", uri: str | None = None) -> Config:
    return Config(run=RunConfig(folder=str(folder), name=name), tracking=TrackingConfig(uri=uri))


def doctor_says(config: Config) -> tuple[str, str]:
    found = outputs.tracking_server(config)
    return found.status, f"{found.what}; {found.next}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        yield port


@pytest.fixture(scope="module")
def guarded(server: int) -> Iterator[int]:
    with password_proxy(server) as port:
        yield port


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USERNAME", "PASSWORD", "TOKEN", "INSECURE_TLS"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)


def test_a_run_is_recorded_by_a_server_behind_a_password(guarded: int, tmp_path: Path) -> None:
    uri = f"http://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{guarded}"
    config = in_folder(tmp_path, "guarded", uri)
    assert doctor_says(config) == (("ok", f"http://127.0.0.1:{guarded}; "))
    folder = folder_of(config)
    run = tracking.open_run(config, "pretrain", folder)
    Journal(folder.file("metrics.jsonl"), run).log(1, {"loss": 2.0})
    tracking.finish_run(folder, run, "FINISHED")
    client = connect(uri)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert [m.value for m in client.get_metric_history(run.run_id, "loss")] == [2.0]
    assert [f.path for f in client.list_artifacts(run.run_id)] == ["config.yaml"]
    assert PASSWORD not in str(client.get_run(run.run_id).to_dictionary())


def test_a_server_gets_the_credentials_of_the_environment(
    guarded: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_folder(tmp_path, uri=f"http://127.0.0.1:{guarded}")
    status, text = doctor_says(config)
    assert status == "error"
    assert "refuses the credentials, or wants some (401)" in text
    assert "MLFLOW_TRACKING_TOKEN" in text
    with pytest.raises(TrackingError, match="refuses the credentials"):
        start_run(config, "pretrain")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    assert doctor_says(config)[0] == "ok"
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert doctor_says(config)[0] == "ok"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "guest")
    assert "does not allow this user to do that (403)" in doctor_says(config)[1]


def test_a_wrong_password_is_told_and_not_shown(guarded: int, tmp_path: Path) -> None:
    config = in_folder(tmp_path, uri=f"http://someone:wr0ng-s3cret@127.0.0.1:{guarded}")
    with pytest.raises(TrackingError) as caught:
        start_run(config, "pretrain")
    for text in (doctor_says(config)[1], str(caught.value)):
        assert "401" in text
        assert "s3cret" not in text


def test_a_certificate_that_nobody_trusts_is_told_and_can_be_accepted(
    server: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    with password_proxy(server, self_signed(tmp_path)) as port:
        config = in_folder(tmp_path, uri=f"https://127.0.0.1:{port}")
        status, text = doctor_says(config)
        assert status == "error"
        assert "certificate" in text
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        assert doctor_says(config)[0] == "ok"


def test_a_server_that_is_not_mlflow_is_told(tmp_path: Path, server: int) -> None:
    status, text = doctor_says(in_folder(tmp_path, uri=f"http://127.0.0.1:{server}/elsewhere"))
    assert (status, "404" in text) == ("error", True)
    status, text = doctor_says(in_folder(tmp_path, uri=f"http://127.0.0.1:{server}/?token=s3cret"))
    assert (status, "MLFLOW_TRACKING_TOKEN" in text, "s3cret" in text) == ("error", True, False)


def _start_in(folders: list[Path], barrier: object, name: str, answers: object) -> None:
    import mlflow  # noqa: F401  # before the race begins

    for folder in folders:
        barrier.wait()  # type: ignore[attr-defined]
        try:
            answers.put((folder.name, start_run(in_folder(folder, name), "pretrain").run_id))  # type: ignore[attr-defined]
        except Exception as error:
            answers.put((folder.name, error))  # type: ignore[attr-defined]


def test_first_runs_of_three_processes_at_the_same_moment_all_begin(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    folders = [tmp_path / f"try-{number}" for number in range(3)]
    barrier, answers = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_start_in, args=(folders, barrier, name, answers)) for name in "abc"]
    for process in processes:
        process.start()
    got = [answers.get(timeout=120) for _ in range(3 * len(folders))]
    for process in processes:
        process.join()
    assert [answer for _, answer in got if isinstance(answer, Exception)] == []
    for folder in folders:
        client = connect(f"sqlite:///{folder}/mlflow.db")
        (experiment,) = client.search_experiments(filter_string="name = 'slidr'")
        found = {run.info.run_id for run in client.search_runs([experiment.experiment_id])}
        assert found == {run_id for name, run_id in got if name == folder.name}
        assert sorted(path.name for path in folder.iterdir()) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]


_DIES = """
import os, sys
from slidr import tracking_file
real = tracking_file._copy
tracking_file._copy = lambda database, to: (real(database, to), os._exit(9))
from slidr.tracking import connect
connect(sys.argv[1])
"""


def test_a_process_killed_while_it_makes_the_store_leaves_none(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert subprocess.run([sys.executable, "-c", _DIES, uri]).returncode == 9
    assert not (tmp_path / "mlflow.db").exists()
    assert any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())
    assert start_run(in_folder(tmp_path), "pretrain").uri == uri
    assert not any(path.name.startswith(".tmp-") for path in tmp_path.iterdir())


_DIES_WRITING = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.execute("PRAGMA cache_size = 1")  # pages reach the disk before the end of the transaction
database.execute("BEGIN")
database.execute("UPDATE experiments SET name = name || ' half'")
database.execute("CREATE TABLE large (content)")
database.executemany("INSERT INTO large VALUES (?)", [("x" * 4000,)] * 100)
os._exit(9)
"""


def test_a_store_whose_writer_was_killed_in_a_transaction_is_used_as_it_was_before(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "runs")
    path, config = tmp_path / "runs" / "mlflow.db", in_folder(tmp_path / "runs", "next")
    uri = tracking.tracking_uri(config)
    for use in (lambda: check_store(uri, "slidr"), lambda: start_run(config, "pretrain")):
        assert subprocess.run([sys.executable, "-c", _DIES_WRITING, str(path)]).returncode == 9
        assert path.with_name("mlflow.db-journal").stat().st_size > 0
        use()
        assert connect(uri).get_experiment_by_name("slidr") is not None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of one run, for copying."""
    folder = tmp_path_factory.mktemp("store")
    start_run(in_folder(folder), "pretrain")
    return folder


def edit(folder: Path, statement: str) -> None:
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database, database:
        database.execute(statement)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'slidr'", "as a deleted one; restore it"),
        ("UPDATE alembic_version SET version_num = 'ffffffffffff'", "written by a newer MLflow than"),
        ("DELETE FROM alembic_version", "its tables have no version; move the file away"),
        ("ALTER TABLE experiments RENAME TO gone", "is damaged (no such table: experiments)"),
    ],
)
def test_a_store_that_no_run_can_use_is_named_by_the_run_and_by_the_doctor(
    statement: str, said: str, store: Path, tmp_path: Path
) -> None:
    shutil.copytree(store, tmp_path / "runs")
    edit(tmp_path / "runs", statement)
    config = in_folder(tmp_path / "runs")
    status, text = doctor_says(config)
    assert status == "error"
    assert said in text
    with pytest.raises(TrackingError) as caught:
        start_run(config, "pretrain")
    assert said in str(caught.value)
    assert str(tmp_path / "runs" / "mlflow.db") in str(caught.value)


def test_a_deleted_experiment_can_be_replaced_by_another_name(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "runs")
    edit(tmp_path / "runs", "UPDATE experiments SET lifecycle_stage = 'deleted' WHERE name = 'slidr'")
    config = in_folder(tmp_path / "runs")
    config = replace(config, tracking=replace(config.tracking, experiment="another"))
    assert doctor_says(config)[0] == "ok"
    start_run(config, "pretrain")


@pytest.mark.parametrize(
    "content", [b"no database at all, but long enough to be read as one" * 100, b"SQLite format 3\0"]
)
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(content)
    assert "is damaged" in doctor_says(in_folder(tmp_path))[1]
    with pytest.raises(TrackingError, match=r"mlflow\.db is damaged .*move the file away"):
        start_run(in_folder(tmp_path), "pretrain")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_is_named_and_not_waited_for(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for use in (connect, lambda uri: check_store(uri, "slidr")):
        with pytest.raises(TrackingError, match=r"mlflow\.db is not a file .*; choose another run\.folder"):
            use(uri)


def test_an_empty_file_becomes_a_store(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    assert doctor_says(in_folder(tmp_path))[0] == "ok"
    start_run(in_folder(tmp_path), "pretrain")


def test_an_older_mlflows_store_is_brought_up_to_date_and_kept_as_it_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from alembic import command
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base

    older = [script.revision for script in tracking_file._script().walk_revisions()][12]
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{tmp_path}/mlflow.db")
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        config = utils._get_alembic_config(str(engine.url))
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    engine.dispose()
    location = tracking_file.artifact_location(tmp_path / "mlflow.db")
    values = f"VALUES (7, 'slidr', 'active', '{location}')"
    edit(tmp_path, f"INSERT INTO experiments (experiment_id, name, lifecycle_stage, artifact_location) {values}")
    assert doctor_says(in_folder(tmp_path))[0] == "ok"
    handle = start_run(in_folder(tmp_path), "pretrain")
    assert connect(handle.uri).get_run(handle.run_id).info.experiment_id == "7"
    assert "was written by an older MLflow" in caplog.text
    with contextlib.closing(sqlite3.connect(tmp_path / f"mlflow.db.before-{older}")) as copy:
        assert copy.execute("SELECT version_num FROM alembic_version").fetchone() == (older,)


MISTYPED = {
    "one slash": "sqlite:/tmp/mlflow.db",
    "two slashes": "sqlite://mlflow.db",
    "in memory": "sqlite:///:memory:",
    "no file": "sqlite:///",
    "another letter": "htp://someone:s3cret@127.0.0.1:5000",
    "a path": "mlruns",
    "a file URI": "file:///tmp/mlruns",
    "a database without its package": "postgresql://someone:s3cret@127.0.0.1/mlflow",
    "an open bracket": "http://[::1",
    "a large port": "http://127.0.0.1:99999",
    "no port": "http://127.0.0.1:port",
    "a long host": f"http://{'a' * 400}:5000",
    "no host": "http://",
    "a NUL": "sqlite:////tmp/a\0b/mlflow.db",
    "a long name": f"sqlite:////tmp/{'a' * 400}/mlflow.db",
}


@pytest.mark.parametrize("uri", MISTYPED.values(), ids=MISTYPED)
def test_a_mistyped_uri_is_named_by_the_run_and_by_the_doctor(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrackingError) as by_doctor:
        check_store(uri, "slidr")
    with pytest.raises(TrackingError) as by_run:
        start_run(in_folder(tmp_path, uri=uri), "pretrain")
    for error in (by_doctor.value, by_run.value):
        assert error.next
        assert "s3cret" not in str(error)
    assert list(tmp_path.iterdir()) == []


def test_a_moved_store_writes_artifacts_beside_itself_again(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    before = start_run(in_folder(old, "before"), "pretrain")
    old.rename(new)
    with caplog.at_level(logging.WARNING):
        after = start_run(in_folder(new, "after"), "pretrain")
    assert "was moved: its artifacts are in" in caplog.text
    assert not old.exists()
    client = connect(after.uri)
    for run_id in (before.run_id, after.run_id):
        assert client.get_run(run_id).info.artifact_uri == (new / "mlartifacts" / run_id / "artifacts").as_uri()
        assert [file.path for file in client.list_artifacts(run_id)] == ["config.yaml"]
    caplog.clear()
    start_run(in_folder(new, "again"), "pretrain")
    assert caplog.text == ""


def test_a_chosen_artifact_location_on_another_disk_stays_whatever_its_name(tmp_path: Path) -> None:
    config, elsewhere = in_folder(tmp_path / "runs"), tmp_path / "disk" / "mlartifacts"
    elsewhere.mkdir(parents=True)
    connect(tracking.tracking_uri(config)).create_experiment("slidr", artifact_location=elsewhere.as_uri())
    handle = start_run(config, "pretrain")
    assert connect(handle.uri).get_run(handle.run_id).info.artifact_uri.startswith(elsewhere.as_uri())
    assert list(elsewhere.glob("*/artifacts/config.yaml"))


def test_another_ones_artifact_location_stays_what_it_is(tmp_path: Path) -> None:
    config = in_folder(tmp_path / "runs")
    elsewhere = (tmp_path / "elsewhere").as_uri()
    connect(tracking.tracking_uri(config)).create_experiment("slidr", artifact_location=elsewhere)
    handle = start_run(config, "pretrain")
    assert connect(handle.uri).get_run(handle.run_id).info.artifact_uri.startswith(elsewhere)


def test_a_fault_of_our_own_is_not_taken_for_a_store_that_is_away(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "runs")
    client = connect(f"sqlite:///{tmp_path}/runs/mlflow.db")
    with pytest.raises(TypeError):
        client.log_batch(no_such_argument=1)
    with pytest.raises(AttributeError):
        client.no_such_call()
