"""What the terminal shows of a run that other processes train."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from slidr.cluster.progress import counting, follow
from slidr.tracking import Journal


@pytest.mark.parametrize("enabled", [True, False])
def test_what_a_worker_says_reaches_the_driver_once_with_and_without_a_bar(
    enabled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path)
    journal._append({"time_ms": 0, "warning": "of an earlier launch"})
    with caplog.at_level(logging.WARNING), follow(path, 2, enabled):
        time.sleep(0.2)
        journal.note("going on from step [1]")
        journal.log(1, {"loss": 3.25})
        journal._append({"time_ms": 0, "warning": "step-00000001.pt: damaged"})
    assert [record.getMessage() for record in caplog.records] == ["step-00000001.pt: damaged"]
    shown = capfd.readouterr().err
    assert ("loss 3.25" in shown) == enabled
    assert shown.count("going on from step [1]") == enabled


def test_metrics_in_an_object_store_are_followed_too(
    bucket: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidr.cluster.progress._POLL_REMOTE_SECONDS", 0.1)
    path = f"{bucket.partition('?')[0]}/followed/metrics.jsonl?{bucket.partition('?')[2]}"
    with follow(path, 2):
        journal = Journal(path)
        journal.log(2, {"loss": 3.5})
        journal.flush()
    assert "training 2/2 loss 3.5" in capfd.readouterr().err


def test_where_there_is_no_terminal_counted_work_is_a_line_now_and_then(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100, 10))  # each look at it is ten seconds after the one before
    monkeypatch.setattr("slidr.cluster.progress.time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr("slidr.cluster.progress._PLAIN_SECONDS", 20.0)
    with counting("superpixels", 6) as count:
        for good in (True, True, True, False, True):
            count(good)
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["superpixels 0/6", "superpixels 2/6, 0.1 a second", "superpixels (1 failed) 4/6, 0.1 a second"]
    with counting("superpixels", 6, enabled=False) as count:
        for _ in range(3):
            count(True)
    assert capfd.readouterr().err == ""


def test_lines_of_a_journal_that_are_not_records_are_passed_over(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b"\xff\xfe",
        b"[" * 100_000,
        b"3",
        b"null",
        b'"metrics"',
        b'["metrics"]',
        b'{"metrics": 3, "step": 1}',
        b'{"metrics": {"loss": 1.0}}',
        b'{"metrics": {"loss": 1.0}, "step": "one"}',
        b'{"metrics": {"loss": "much", "lr": [1]}, "step": 1}',
        b'{"note": 3, "warning": {}}',
        b'{"note": "whole"}',
    ]
    with follow(path, 2):
        time.sleep(0.2)
        path.write_bytes(b"\n".join(lines) + b"\n")
        Journal(path).log(2, {"loss": 3.5})
    shown = capfd.readouterr().err
    assert "training 2/2 loss 3.5" in shown
    assert "whole" in shown
    assert "Traceback" not in shown
