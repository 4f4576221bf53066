"""A disk that is full when a run wants its MLflow store: one line that says so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import SmallDisk

_OPENS = """
import sys
from slidr import cli, tracking
from slidr.config import Config, RunConfig, TrackingConfig
from slidr.training.runs import RunFolder
folder, config = sys.argv[1:]
uri = f"sqlite:///{folder}/mlflow.db"
wanted = Config(run=RunConfig(folder=folder, name="run"), tracking=TrackingConfig(uri=uri))
opened = lambda _: tracking.open_run(wanted, "pretrain", RunFolder(folder + "/run")) and 0
cli.COMMANDS["pretrain"] = cli.Command("", opened)
sys.exit(cli.main(["pretrain", config]))
"""


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    try:
        disk = SmallDisk(4)
    except OSError as error:
        pytest.skip(str(error))
    yield disk
    disk.close()


def opened(disk: SmallDisk, scratch: Path) -> tuple[int, list[str]]:
    (scratch / "config.yaml").write_text("run: {name: run}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # sqlite follows every link, so the process itself must be where the disk is mounted.
    inside = ["nsenter", "--target", str(disk.holder), "--user", "--mount", "--preserve-credentials"]
    command = [*inside, sys.executable, "-W", "ignore", "-c", _OPENS, str(disk.inside), str(scratch / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr.splitlines()


def test_a_full_disk_is_one_line_before_and_after_the_store_is_made(disk: SmallDisk, tmp_path: Path) -> None:
    disk.fill()
    status, lines = opened(disk, tmp_path)
    assert (status, len(lines)) == (1, 1), lines
    assert lines[0].startswith("slidr pretrain: ")
    assert "full" in lines[0] or "No space left" in lines[0]
    assert "free some space" in lines[0]
    disk.free()
    assert opened(disk, tmp_path)[0] == 0
    disk.fill()
    (disk.path / "run" / "mlflow_run_id").unlink()
    status, lines = opened(disk, tmp_path)
    assert (status, len(lines)) == (1, 1), lines
    assert "full" in lines[0] or "No space left" in lines[0]
