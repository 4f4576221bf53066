"""Runs and metrics as MLflow's own client reads them back, and stores that go away."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slidr import tracking, tracking_journal
from slidr.config import Config, RunConfig, TrackingConfig
from slidr.data import storage
from slidr.tracking import Journal, JournalError, RunHandle, end_run, read_journal, start_run, tracking_uri
from slidr.tracking_errors import TrackingError
from slidr.training.runs import RunFolder


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


DAMAGED = {
    "a number": "7",
    "a list": "[1]",
    "no step": '{"time_ms": 1, "metrics": {"loss": 1.0}}',
    "no time": '{"step": 2, "metrics": {"loss": 1.0}}',
    "a step that is a text": '{"step": "2", "time_ms": 1, "metrics": {"loss": 1.0}}',
    "a step that is too large": '{"step": 9223372036854775808, "time_ms": 1, "metrics": {"loss": 1.0}}',
    "a negative step": '{"step": -1, "time_ms": 1, "metrics": {"loss": 1.0}}',
    "no metrics": '{"step": 2, "time_ms": 1, "metrics": null}',
    "a value that is a text": '{"step": 2, "time_ms": 1, "metrics": {"loss": "x"}}',
    "neither": '{"step": 2, "time_ms": 1}',
    "nested": "[" * 100_000 + "]" * 100_000 + "}",
}


class Store:
    """MLflow's client as a journal uses it: it keeps what it is sent, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[Any]] = []
        self.away = False
        monkeypatch.setattr(tracking_journal, "connect", lambda uri: self)

    def log_batch(self, run_id: str, metrics: list[Any]) -> None:
        if self.away:
            raise TrackingError("http://host", "cannot be reached (Connection refused)", "start the server")
        assert len(metrics) <= 1000, "MLflow takes no more"
        self.batches.append(metrics)

    @property
    def steps(self) -> list[int]:
        return [metric.step for metrics in self.batches for metric in metrics]


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_line_that_is_not_a_record_is_named_and_all_others_are_sent(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = Store(monkeypatch), tmp_path / "m.jsonl"
    journal = Journal(path, RunHandle("http://host", "0"))
    journal.log(1, {"loss": 2.0})
    with path.open("a") as file:
        file.write(damage + "\n")
    journal.log(3, {"loss": 1.0})
    assert journal.send()
    assert store.steps == [1, 3]
    if damage.endswith("}"):
        assert f"{path}: line 2 is damaged (" in caplog.text
    assert read_journal(path) == {1: {"loss": 2.0}, 3: {"loss": 1.0}}
    caplog.clear()
    journal.log(4, {"loss": 1.0})
    assert journal.send()
    assert store.steps == [1, 3, 4]
    assert caplog.text == "", "it is named once"


def test_a_metric_whose_name_mlflow_does_not_take_costs_no_other(
    config: Config, handle: RunHandle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    journal = Journal(tmp_path / "m.jsonl", handle)
    for step, name in enumerate(("../up", "a\x00b", "n" * 251, "named", "ok/under score-1.0:2")):
        journal.log(step, {name: 1.0})
    assert journal.send()
    assert "is not a metric's name" in caplog.text
    known = MlflowClient(tracking_uri=tracking_uri(config)).get_run(handle.run_id).data.metrics
    assert {"named", "ok/under score-1.0:2"} <= known.keys()


@pytest.mark.parametrize("cursor", [b"99999999", b"17", b"-3", b"x", b"\xff\xfe", b"", b"9" * 5000])
def test_a_damaged_cursor_loses_no_metric(cursor: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, path = Store(monkeypatch), tmp_path / "m.jsonl"
    journal = Journal(path, RunHandle("http://host", "0"))
    for step in (1, 2):
        journal.log(step, {"loss": 1.0})
    (tmp_path / "m.jsonl.sent").write_bytes(cursor)
    assert journal.send()
    assert store.steps == [1, 2]
    assert journal.send()
    assert store.steps == [1, 2]


def test_a_line_that_is_still_being_written_is_sent_once_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = Store(monkeypatch), tmp_path / "m.jsonl"
    Journal(path).log(1, {"loss": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:20])
    sender = Journal(path, RunHandle("http://host", "0"))
    assert sender.send()
    assert store.steps == [1]
    path.write_bytes(whole + whole.replace(b'"step": 1', b'"step": 2'))
    assert sender.send()
    assert store.steps == [1, 2]


def test_a_cursor_that_cannot_be_written_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(monkeypatch)
    journal = Journal(tmp_path / "m.jsonl", RunHandle("http://host", "0"))
    journal.log(1, {"loss": 1.0})
    (tmp_path / "m.jsonl.sent").mkdir()
    assert not journal.send()
    assert not journal.send()
    assert caplog.text.count("m.jsonl.sent: cannot be written") == 1
    (tmp_path / "m.jsonl.sent").rmdir()
    assert journal.send()
    assert store.steps == [1, 1, 1], "a metric sent twice is the same metric"
    assert not journal.pending()


def test_a_tail_without_a_line_end_is_left_for_later_however_long_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, path = Store(monkeypatch), tmp_path / "m.jsonl"
    Journal(path).log(1, {"loss": 1.0})
    path.write_bytes(path.read_bytes() + bytes(2 * tracking_journal._LONGEST_LINE + 1))  # as after a power failure

    def tell(sent: int, size: int) -> None:
        raise AssertionError(f"{sent} of {size} bytes: nothing else can be sent")

    journal = Journal(path, RunHandle("http://host", "0"))
    assert journal.send(tell)
    assert store.steps == [1]
    assert not journal.pending()
    journal.log(2, {"loss": 1.0})
    assert journal.send()
    assert store.steps == [1, 2]


def test_a_step_waits_for_one_slice_of_a_backlog_and_the_end_sends_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, now, count = Store(monkeypatch), [0.0], 4 * tracking_journal.SLICE
    monkeypatch.setattr(tracking_journal, "time", SimpleNamespace(time=time.time, monotonic=lambda: now[0]))
    line = json.dumps({"step": 1, "time_ms": 1, "metrics": {"loss": 1.0, "lr": 0.5}})
    path = tmp_path / "m.jsonl"
    path.write_text("".join(line.replace('"step": 1', f'"step": {step}') + "\n" for step in range(count)))
    journal = Journal(path, RunHandle("http://host", "0"))
    for step in (count, count + 1):
        now[0] += 100.0
        before = len(store.steps)
        journal.log(step, {"loss": 1.0})
        assert len(store.steps) - before == 2 * tracking_journal.SLICE, "two metrics a line"
    told: list[tuple[int, int]] = []
    assert journal.send(lambda sent, size: told.append((sent, size)))
    assert store.steps == [step for step in range(count) for _ in range(2)] + [count, count + 1]
    assert [sent < size for sent, size in told] == [True, True]


def test_a_fault_of_our_own_is_not_taken_for_a_store_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path / "m.jsonl", RunHandle("http://host", "0"))
    journal.log(1, {"loss": 1.0})
    monkeypatch.setattr(tracking_journal, "connect", lambda uri, missing: None)
    with pytest.raises(TypeError):
        journal.send()


def test_a_journal_that_is_not_a_file_is_an_error_and_no_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(JournalError, match=r"m\.jsonl: cannot be written"):
        Journal(tmp_path / "m.jsonl").log(1, {"loss": 1.0})
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)):
        path = tmp_path / f"{make}"[:12].strip("<")
        make(path)
        with pytest.raises(storage.DataError, match=re.escape(str(path))):
            read_journal(path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_run_that_mlflow_lost_is_recorded_again_with_all_its_metrics(tmp_path: Path, config: Config) -> None:
    from mlflow import MlflowClient

    folder, client = RunFolder(str(tmp_path)), MlflowClient(tracking_uri=tracking_uri(config))
    first = tracking.open_run(config, "pretrain", folder)
    Journal(folder.file("metrics.jsonl"), first).log(1, {"loss": 1.0})
    tracking.finish_run(folder, first, "FAILED")
    assert client.get_run(first.run_id).info.status == "FAILED"
    client.delete_run(first.run_id)
    second = tracking.open_run(config, "pretrain", folder)
    tracking.finish_run(folder, second, "FINISHED")
    assert [m.value for m in client.get_metric_history(second.run_id, "loss")] == [1.0]
    assert client.get_run(second.run_id).info.status == "FINISHED"
    folder.note("mlflow_run_id", "\x00damaged")
    third = tracking.open_run(config, "pretrain", folder)
    assert third.run_id not in (first.run_id, second.run_id)


def test_a_run_is_ended_once_and_a_store_that_is_away_only_delays_that(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    folder, client = RunFolder(str(tmp_path)), MlflowClient(tracking_uri=tracking_uri(config))
    run = tracking.open_run(config, "pretrain", folder)
    Journal(folder.file("metrics.jsonl")).log(1, {"late": 1.0})
    away = replace(config, tracking=TrackingConfig(uri="http://user:s3cret@127.0.0.1:9"))
    tracking.finish_again(away, folder)
    assert "cannot be reached" in caplog.text
    assert "s3cret" not in caplog.text
    tracking.finish_again(config, folder)
    assert client.get_run(run.run_id).info.status == "FINISHED"
    assert "late" in client.get_run(run.run_id).data.metrics
    monkeypatch.setattr(tracking, "end_run", None)  # from now on MLflow is not even asked
    tracking.finish_again(config, folder)


def test_a_finished_run_of_an_earlier_version_keeps_the_time_at_which_it_ended(tmp_path: Path, config: Config) -> None:
    from mlflow import MlflowClient

    folder, client = RunFolder(str(tmp_path)), MlflowClient(tracking_uri=tracking_uri(config))
    run = tracking.open_run(config, "pretrain", folder)
    client.set_terminated(run.run_id, "FINISHED", end_time=1_000)
    tracking.finish_again(config, folder)
    assert client.get_run(run.run_id).info.end_time == 1_000
    assert folder.note(tracking.ENDED) == run.run_id


def test_a_damaged_note_of_a_finished_run_costs_a_warning_and_no_result(
    tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mlflow_run_id").write_bytes(b"\xff\xfe")
    tracking.finish_again(config, RunFolder(str(tmp_path)))
    assert "mlflow_run_id: is damaged" in caplog.text


def test_a_run_that_a_signal_ended_is_marked_before_its_backlog_is_sent(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    def ended_again(journal: Journal, tell: object) -> bool:
        raise KeyboardInterrupt

    folder = RunFolder(str(tmp_path))
    run = tracking.open_run(config, "pretrain", folder)
    monkeypatch.setattr(Journal, "send", ended_again)
    with pytest.raises(KeyboardInterrupt):
        tracking.finish_run(folder, run, "KILLED")
    assert MlflowClient(tracking_uri=tracking_uri(config)).get_run(run.run_id).info.status == "KILLED"
