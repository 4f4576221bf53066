"""The table that `make chaos` prints: what it counts, and what it must not hide."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fault_book import FaultBook
from fault_jobs import TrainingWork
from small_disk import SmallDisk
from training_runs import named

from slidr.config import Config, RunConfig
from slidr.training import checkpoint


def test_a_row_counts_each_kind_and_an_unfinished_fault_is_neither_survived_nor_free(tmp_path: Path) -> None:
    book = FaultBook()
    one, two, other = (book.open(kind, "steps") for kind in ("killed", "killed", "full"))
    one.seconds, one.lost, one.again = 4.0, 0, 2
    two.seconds = 10.0  # recovered, and then the test failed
    book.close([one])
    assert [line.split("|")[1:-1] for line in book.table().splitlines()][2:] == [
        [" killed ", " 2        ", " 1        ", " ?    ", " ?          ", " 7 (4 to 10)        "],
        [" full   ", " 1        ", " 0        ", " ?    ", " ?          ", " never              "],
    ]
    book.write(tmp_path / "new" / "chaos.json", rounds=3)
    report = json.loads((tmp_path / "new" / "chaos.json").read_text())
    assert report["rounds"] == 3
    assert report["faults"][0]["seconds"] == [4.0, 10.0]
    assert other.survived is False


def test_a_fault_that_lost_something_or_was_not_seen_to_recover_is_not_entered_as_survived() -> None:
    book = FaultBook()
    entry = book.open("killed", "steps")
    with pytest.raises(AssertionError, match="nobody saw it recover"):
        book.close([entry])
    entry.seconds, entry.lost = 1.0, 3
    with pytest.raises(AssertionError, match="3 steps lost"):
        book.close([entry])
    assert not entry.survived


def test_a_fault_that_this_machine_does_not_allow_has_a_row_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = tmp_path / "unshare"
    denied.write_text("#!/bin/sh\necho 'unshare: unshare failed:' >&2; echo 'not | permitted' >&2; exit 1\n")
    denied.chmod(0o755)
    book = FaultBook()
    for path, fault in ((f"{tmp_path}:{os.environ['PATH']}", "full"), (str(tmp_path / "nothing"), "fuller")):
        monkeypatch.setenv("PATH", path)
        with pytest.raises(OSError, match="no disk can be mounted") as refused:
            SmallDisk(mib=1)
        book.skip(fault, str(refused.value))
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in book.table().splitlines()][2:] == [
        ["full", "0", "skipped", "", "", "no disk can be mounted: unshare: unshare failed: not / permitted"],
        ["fuller", "0", "skipped", "", "", "no disk can be mounted: needs util-linux's unshare"],
    ]
    book.write(tmp_path / "chaos.json", rounds=1)
    rows = json.loads((tmp_path / "chaos.json").read_text())["faults"]
    assert [(row["fault"], row["injected"], "survived" in row) for row in rows] == [
        ("full", 0, False),
        ("fuller", 0, False),
    ]


@pytest.mark.parametrize(
    ("checkpoint_at", "goes_on_from", "lost", "again"),
    [(3, 4, 0, 2), (3, 3, 1, 2), (3, 1, 3, 2), (5, 6, 0, 0), (0, 1, 0, 5)],
)
def test_steps_done_again_are_lost_where_a_checkpoint_held_them(
    tmp_path: Path, checkpoint_at: int, goes_on_from: int, lost: int, again: int
) -> None:
    config = named(Config(run=RunConfig(folder=str(tmp_path))), "run")
    work = TrainingWork(config)
    if checkpoint_at:
        entries = {"kind": "pretrain", "student": {}, "optimizer": {"state": {}, "param_groups": []}, "scaler": {}}
        position = {"step": checkpoint_at, "epoch": 0, "config": {}, "metrics": {}, "best": None}
        work.checkpoints.save({**entries, **position})
        # A newer one that was damaged holds nothing.
        Path(checkpoint.CheckpointFolder(work.checkpoints.path).path, "step-00000009.pt").write_bytes(b"")

    def log(*steps: int) -> None:
        work.journal.parent.mkdir(exist_ok=True)
        with work.journal.open("a") as file:
            file.writelines(json.dumps({"step": step, "metrics": {"loss": 1.0}}) + "\n" for step in steps)

    log(1, 2, 3, 4, 5)
    entry = FaultBook().open("killed", work.unit)
    entry.at, entry.before = work.progress(), work.kept()
    log(*range(goes_on_from, 11))
    assert work.cost(entry) == (lost, again)
