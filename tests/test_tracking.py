"""Runs and metrics as MLflow's own client reads them back, and stores that go away."""

from __future__ import annotations

import itertools
import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slidr import tracking, tracking_journal
from slidr.config import Config, RunConfig, TrackingConfig
from slidr.data import storage
from slidr.tracking import Journal, JournalError, RunHandle, end_run, read_journal, start_run, tracking_uri
from slidr.tracking_errors import TrackingError


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return Config(run=RunConfig(folder=str(tmp_path_factory.mktemp("runs")), name="first"))


@pytest.fixture(scope="module")
def handle(config: Config) -> RunHandle:
    return start_run(config, "pretrain")


def test_a_run_is_recorded_with_its_parameters_code_version_and_metrics(
    config: Config, handle: RunHandle, tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "metrics.jsonl", handle)
    for step in range(1, 4):
        journal.log(step, {"loss": 1 / step, "lr": 0.5})
    assert journal.send()
    end_run(handle, "FINISHED", {"checkpoints": "somewhere"})

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(config))
    run = client.get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == str(config.optim.lr)
    assert run.data.tags["checkpoints"] == "somewhere"
    assert run.data.tags["stage"] == "pretrain"
    history = client.get_metric_history(handle.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert [f.path for f in client.list_artifacts(handle.run_id)] == ["config.yaml"]


def test_a_second_process_sends_only_what_is_new(config: Config, handle: RunHandle, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    path = tmp_path / "metrics.jsonl"
    first = Journal(path, handle)
    first.log(1, {"twice": 1.0})
    first.send()
    second = Journal(path, handle)
    second.log(2, {"twice": 2.0})
    second.send()
    history = MlflowClient(tracking_uri=tracking_uri(config)).get_metric_history(handle.run_id, "twice")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0)]


def test_metrics_wait_for_a_store_that_is_away_and_arrive_later(
    config: Config, handle: RunHandle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    path = tmp_path / "metrics.jsonl"
    away = Journal(path, RunHandle("http://user:secret@127.0.0.1:9", handle.run_id))
    with caplog.at_level(logging.WARNING):
        away.log(1, {"late": 4.0})
        assert not away.send()
        assert not away.send()
    assert caplog.text.count("cannot be reached") == 1
    assert "secret" not in caplog.text
    assert read_journal(path) == {1: {"late": 4.0}}
    assert Journal(path, handle).send()
    history = MlflowClient(tracking_uri=tracking_uri(config)).get_metric_history(handle.run_id, "late")
    assert [m.value for m in history] == [4.0]


def test_a_store_in_trouble_does_not_give_a_run_a_twin(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    run_id = tracking.start_run(config, "pretrain").run_id
    client = MlflowClient(tracking_uri=tracking.tracking_uri(config))
    experiment = client.get_run(run_id).info.experiment_id
    before = len(client.search_runs([experiment]))

    def busy(*arguments: Any, **options: Any) -> None:
        raise MlflowException("database is locked")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "update_run", busy)
        with pytest.raises(TrackingError, match="locked"):
            tracking.start_run(config, "pretrain", run_id)
    assert len(client.search_runs([experiment])) == before
    client.delete_run(run_id)
    assert tracking.start_run(config, "pretrain", run_id).run_id != run_id
    assert tracking.start_run(config, "pretrain", 32 * "0").run_id != 32 * "0"


def test_a_store_that_lets_time_run_out_is_left_alone_for_a_while(
    handle: RunHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, tries = [0.0], []
    monkeypatch.setattr(tracking_journal, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))

    def hang(uri: str) -> None:
        tries.append(now[0])
        now[0] += 20.0
        raise TrackingError(uri, "cannot be reached (no answer in time)", "start the server")

    monkeypatch.setattr(tracking_journal, "connect", hang)
    journal = tracking.Journal(tmp_path / "metrics.jsonl", handle)
    for step in range(100):
        now[0] += 1.0
        journal.log(step, {"loss": 1.0})
    assert [late - early >= 60.0 for early, late in itertools.pairwise(tries)] == [True]


def test_the_later_value_of_a_repeated_step_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m.jsonl")
    journal.log(5, {"loss": 2.0, "lr": 0.1})
    journal.log(5, {"loss": 1.0})
    assert read_journal(tmp_path / "m.jsonl") == {5: {"loss": 1.0, "lr": 0.1}}


def test_a_line_cut_short_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    Journal(path).log(1, {"loss": 2.0})
    with path.open("a") as file:
        file.write('{"step": 2, "time_ms"')
    Journal(path).log(3, {"loss": 1.0})
    assert read_journal(path) == {1: {"loss": 2.0}, 3: {"loss": 1.0}}


def test_warnings_within_a_block_are_lines_that_are_no_metrics(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    journal = Journal(path)
    with journal.warnings():
        journal.log(1, {"loss": 2.0})
        logging.getLogger("slidr.training.checkpoint").warning("%s is damaged", "step-1.pt")
        logging.getLogger("elsewhere").warning("not ours")
    logging.getLogger("slidr").warning("after the block")
    assert read_journal(path) == {1: {"loss": 2.0}}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["warning"] for line in lines if "warning" in line] == ["step-1.pt is damaged"]


def test_a_note_is_a_line_that_is_no_metric(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "m.jsonl")
    journal.note("going on from step 1")
    journal.log(2, {"loss": 2.0})
    assert read_journal(journal.path) == {2: {"loss": 2.0}}
    assert json.loads((tmp_path / "m.jsonl").read_text().splitlines()[0])["note"] == "going on from step 1"


def test_a_journal_in_an_object_store_holds_what_was_flushed_and_goes_on_from_it(bucket: str) -> None:
    path = storage.join(bucket, "runs", "one", "metrics.jsonl")
    journal = Journal(path)
    journal.log(1, {"loss": 2.0})
    assert not storage.exists(path)
    journal.flush()
    journal.log(2, {"loss": 9.0})  # lost with its process
    again = Journal(path)
    again.log(2, {"loss": 1.0})
    again.flush()
    assert read_journal(path) == {1: {"loss": 2.0}, 2: {"loss": 1.0}}


def test_a_journal_that_cannot_be_written_says_where_and_why(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").mkdir()
    with pytest.raises(JournalError, match=r"m\.jsonl: cannot be written \(Is a directory"):
        Journal(tmp_path / "m.jsonl").log(1, {"loss": 1.0})


def test_the_default_store_is_sqlite_beside_the_runs(tmp_path: Path) -> None:
    assert tracking_uri(Config(run=RunConfig(folder=str(tmp_path)))) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri(Config(tracking=TrackingConfig(uri="http://host"))) == "http://host"


def test_the_code_version_names_a_commit_of_this_checkout() -> None:
    version = tracking.code_version()
    assert version == {} or (len(version["git_commit"]) == 40 and version["git_dirty"] in ("true", "false"))
