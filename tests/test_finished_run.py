"""A real training in a process of its own that is killed between its result and the end of its MLflow run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slidr.cluster.pretrain import PretrainStage
from slidr.cluster.train import train
from slidr.config import Config, dump
from slidr.tracking import connect, read_journal, tracking_uri

# The driver dies in the middle of `RunFolder.finish`'s line, and has sent nothing by then.
_DIES = """
import os, sys
from slidr import tracking_journal
from slidr.cluster.pretrain import pretrain
from slidr.config import load
from slidr.training.runs import RunFolder

real = RunFolder.finish
def finish(folder, result):
    real(folder, result)
    os._exit(9)
RunFolder.finish = finish
tracking_journal.Journal.send_slice = lambda journal: True
pretrain(load(sys.argv[1]), progress=False)
"""


@pytest.fixture(scope="module")
def config(trainable: Config) -> Config:
    return trainable


def killed(config: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump(config))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", _DIES, str(tmp_path / "config.yaml")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 9, done.stderr


def test_the_same_command_completes_the_mlflow_run_of_a_driver_that_died_after_its_result(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(config, tmp_path)
    folder = Path(config.run.folder, "run")
    result = json.loads((folder / "result.json").read_text())
    run_id = (folder / "mlflow_run_id").read_text()
    client = connect(tracking_uri(config))
    before = client.get_run(run_id)
    assert (before.info.status, before.data.metrics) == ("RUNNING", {})

    again = replace(config, run=replace(config.run, resume=True))
    monkeypatch.setattr(PretrainStage, "task", None)  # nothing is trained
    scores = train(again, PretrainStage(), progress=False)
    assert scores["retrieval"] == result["retrieval"]
    after = client.get_run(run_id)
    assert after.info.status == "FINISHED"
    assert after.data.tags["checkpoints"] == str(folder / "checkpoints")
    kept: dict[str, dict[int, Any]] = {}
    for step, metrics in read_journal(folder / "metrics.jsonl").items():
        for name, value in metrics.items():
            kept.setdefault(name, {})[step] = value
    assert "retrieval" in kept
    for name, values in kept.items():
        assert {metric.step: metric.value for metric in client.get_metric_history(run_id, name)} == values
    train(again, PretrainStage(), progress=False)
    assert client.get_run(run_id).info.end_time == after.info.end_time, "ended once"
