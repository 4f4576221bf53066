"""A search that is kept by a real MLflow server, which goes away in the middle of a trial and comes back."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tracking_servers import free_port, mlflow_server
from tune_cases import COMPARED, one_thread, search_config

from slidr import tracking_search
from slidr.cluster.trial import TrialStage
from slidr.cluster.tune import search
from slidr.config import Config, SpaceConfig, TrackingConfig
from slidr.tracking import connect, read_journal
from slidr.tracking_models import load_registered
from slidr.tracking_search import read_search

__all__ = ["one_thread"]


class Door:
    """A port of loopback that leads to another one while it is open; shut, it refuses like a server that is gone."""

    def __init__(self, to: int) -> None:
        self._to, self.port = to, free_port()
        self._listening: socket.socket | None = None
        self._passing: set[socket.socket] = set()

    def open(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listening,), daemon=True).start()

    def shut(self) -> None:
        """Ends what is under way, too."""
        for end in [self._listening, *self._passing]:
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()
        self._listening, self._passing = None, set()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):  # shut
            while True:
                near, _ = listening.accept()
                far = socket.create_connection(("127.0.0.1", self._to))
                self._passing |= {near, far}
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()


def pump(source: socket.socket, sink: socket.socket) -> None:
    """Hands on bytes until one side ends."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """The way to `mlflow server` over sqlite, open."""
    with mlflow_server(tmp_path_factory.mktemp("server")) as port:
        door = Door(port)
        door.open()
        try:
            yield door
        finally:
            door.shut()


@pytest.fixture(scope="module")
def config(tiny_world: Path, door: Door, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three trials of random weights, and a final."""
    config = search_config(tiny_world, tmp_path_factory.mktemp("tune-store"))
    wanted = replace(
        config.tune,
        fractions=(1.0,),
        methods=("random",),
        searcher="grid",
        trials=None,
        random=SpaceConfig(lr=(1e-3, 3e-3, 1e-2)),
    )
    return replace(
        config,
        student=replace(config.student, weights=None),
        tracking=TrackingConfig(uri=f"http://127.0.0.1:{door.port}"),
        tune=wanted,
    )


def test_a_server_that_goes_away_mid_trial_and_comes_back_misses_nothing(
    config: Config, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = 0
    real_enough = TrialStage.enough
    folders = [Path(config.run.folder, f"search/100pct/random/trial-{index:03d}") for index in range(3)]
    unsent: dict[str, int] = {}

    def enough(self: TrialStage, epoch: int, metrics: dict[str, float]) -> bool:
        nonlocal epochs
        epochs += 1
        if epochs == 3:  # the second trial's first
            door.shut()
        return real_enough(self, epoch, metrics)

    def tell(line: str) -> None:
        if "trial 3/3" in line:
            for folder in folders:
                sent = folder / "metrics.jsonl.sent"
                done = int(sent.read_text()) if sent.exists() else 0
                unsent[folder.name] = (folder / "metrics.jsonl").stat().st_size - done
            assert not (folders[2] / "mlflow_run_id").exists(), "begun while the server was away"
            door.open()

    monkeypatch.setattr(TrialStage, "enough", enough)
    monkeypatch.setattr(tracking_search, "_PAUSE_S", 0.0)
    result = search(config, tell)
    assert unsent["trial-000"] == 0
    assert unsent["trial-001"] > 0
    assert unsent["trial-002"] > 0
    assert result["recorded"]

    uri = str(config.tracking.uri)
    read = read_search(uri, result["mlflow_run_id"])
    rows = pq.read_table(result["files"][0]).to_pylist()
    assert len(rows) == 4
    assert [{key: row[key] for key in COMPARED} for row in read] == [
        {key: row[key] for key in COMPARED} for row in rows
    ]
    client = connect(uri)
    for row, folder in zip(read, [*folders, next(folders[0].parent.glob("final-*-000"))], strict=True):
        assert client.get_run(row["run_id"]).info.status == "FINISHED"
        for name in ("loss", "lr", "val_miou"):
            kept = {
                step: metrics[name]
                for step, metrics in read_journal(folder / "metrics.jsonl").items()
                if name in metrics
            }
            history = client.get_metric_history(row["run_id"], name)
            assert {metric.step: metric.value for metric in history} == kept
            assert len(history) == len(kept), "each was sent once"


def test_the_champion_loads_from_the_server_in_one_line(config: Config, door: Door) -> None:
    search(config)  # ended before: nothing is trained
    student = load_registered("models:/search-100pct@champion", config.tracking.uri)
    (path,) = Path(config.run.folder, "search/100pct/random").glob("final-of-*-000/student.pt")
    expected: dict[str, Any] = torch.load(path, weights_only=True)["model_points"]
    assert student.student.state_dict().keys() == expected.keys()
    for name, value in student.student.state_dict().items():
        assert torch.equal(value, expected[name]), name
