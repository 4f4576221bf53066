"""Inputs of a run: its config, records, notes, locks and journal, and the store of MLflow."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from slidr import tracking_journal
from slidr.cluster.progress import _Tail
from slidr.config import (
    ClusterConfig,
    Config,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    TuneConfig,
    dump,
    load,
    to_dict,
)
from slidr.tracking import open_run, start_run
from slidr.tracking_errors import TrackingError
from slidr.tracking_journal import Journal, RunHandle, read_journal
from slidr.training.checkpoint import CheckpointFolder
from slidr.training.locks import launching
from slidr.training.runs import RunFolder, claim, require_same_data

from . import trees
from .harness import Input
from .inputs_tables import make_table
from .shared import DATA, json_says, keeping, points, put

BASE = Config(
    data=replace(DATA, max_val_frames=2),
    student=StudentConfig(name="minkunet14", width=0.25, out_channels=17),
    loss=LossConfig(names=("cross_entropy_lovasz",)),
    optim=OptimConfig(name="adamw", lr=1e-2, epochs=2, batch_size=2),
    run=RunConfig(folder=".", name="run", log_every=1, resume=True),
    cluster=ClusterConfig(num_workers=0),
    tune=TuneConfig(fractions=(1.0,), methods=("random",), trials=2, round_size=1, seeds=1, results="results"),
    evaluation=EvaluationConfig(bootstrap=20),
)


def own(variant: int) -> Config:
    return replace(BASE, optim=replace(BASE.optim, lr=1e-2 * (1 + variant)))


# ---------------------------------------------------------------------------------------------- a config


def make_config(variant: int) -> None:
    put("config.yaml", ("# a comment\n" + dump(own(variant))).encode())


def config_says(value: Any) -> bool:
    """Whether every value of a config is that of the YAML file, as PyYAML alone reads it."""
    return _within(yaml.safe_load(Path("config.yaml").read_text()), value)


def _within(given: Any, value: Any) -> bool:
    if isinstance(given, dict):
        return all(key in value and _within(inner, value[key]) for key, inner in given.items())
    if isinstance(given, list):
        return len(given) == len(value) and all(map(_within, given, value))
    if isinstance(value, float):
        return float(given) == value and abs(value) < 1e15
    return given == value and (not isinstance(given, int) or abs(given) < 2**63)


# ---------------------------------------------------------------------------------------------- a run's folder


def make_run(variant: int) -> None:
    """A run with a checkpoint, its data, and the notes that it keeps."""
    make_table(variant)
    for number in range(4):
        put(f"root/samples/LIDAR_TOP/{number}.bin", points(variant, 5).tobytes())
    claim(own(variant))
    CheckpointFolder("run/checkpoints").save({"step": 1})
    require_same_data(own(variant), RunFolder("run"))


def result(variant: int) -> dict[str, Any]:
    return {
        "steps": 10 + variant,
        "epochs": 5,
        "student": "run/student.pt",
        "weights": "random",
        "labelled": 3,
        "labelled_as_published": False,
        "val_miou": 0.5 + 0.1 * variant,
        "val_accuracy": 0.75,
        "val_loss": 1.25,
        "mlflow_run_id": "0123456789abcdef",
    }


def claimed() -> Any:
    claim(own(0))
    return "claimed"


def same_data() -> Any:
    require_same_data(own(0), RunFolder("run"))
    return "the same"


def locked() -> Any:
    with launching(RunFolder("run")):
        return "locked"


def make_lock(variant: int) -> None:
    put("run/lock", f"process {12345 + variant} on another-host".encode())


# ---------------------------------------------------------------------------------------------- the journal

JOURNAL, CURSOR = "run/metrics.jsonl", "run/metrics.jsonl.sent"
SENT_LINES = 4


def make_journal(variant: int) -> None:
    lines = []
    for step in range(1, 9):
        entry: dict[str, Any] = {
            "step": step,
            "time_ms": 1000 * step,
            "metrics": {"loss": 1 / (step + variant), "lr": 0.1},
        }
        if step == 5:
            entry = {"time_ms": 1000 * step, "note": "half way"}
        lines.append(json.dumps(entry) + "\n")
    put(JOURNAL, "".join(lines).encode())
    put(CURSOR, str(len("".join(lines[:SENT_LINES]))).encode())
    shutil.copyfile(JOURNAL, "intact")


class FakeStore:
    """MLflow's client as the journal sees it: it keeps what it is sent."""

    def __init__(self) -> None:
        self.metrics: list[Any] = []

    def log_batch(self, run_id: str, metrics: Any) -> None:
        for metric in metrics:
            if not (isinstance(metric.key, str) and 0 < len(metric.key) <= 250 and abs(metric.step) < 2**63):
                raise TrackingError("fake", "refuses a metric", "mend it", "INVALID_PARAMETER_VALUE")
            self.metrics.append((metric.key, float(metric.value), int(metric.timestamp), int(metric.step)))


def sent() -> Any:
    """What the store is sent of the journal, and whether the journal takes that for all."""
    store, before = FakeStore(), tracking_journal.connect
    tracking_journal.connect = lambda uri: store  # type: ignore[assignment]
    try:
        done = Journal(JOURNAL, RunHandle("fake", "0")).send()
    finally:
        tracking_journal.connect = before
    return done, store.metrics


def sent_says(value: Any) -> bool:
    """Whether everything that the store lacked was sent: every record of an undamaged line after the cursor."""
    done, metrics = value
    known = Path("intact").read_bytes().splitlines()[SENT_LINES:]
    damaged = set(Path(JOURNAL).read_bytes().splitlines())
    lacking = [json.loads(line) for line in known if line in damaged]
    wanted = [
        (name, number, entry["time_ms"], entry["step"])
        for entry in lacking
        for name, number in entry.get("metrics", {}).items()
    ]
    return done and set(wanted) <= set(metrics) and all(np.isfinite(metric[1]) for metric in metrics)


def sent_again(value: Any) -> bool:
    """Whether all was sent that was lacking, and is sent again next time, as its mark cannot be written."""
    done, metrics = value
    return not done and Path(CURSOR).is_dir() and sent_says((True, metrics))


def lines_say(value: Any) -> bool:
    """Whether a journal's metrics are those of its lines that are whole records, and no undamaged line's are lost."""
    known, damaged = Path("intact").read_bytes().splitlines(), Path(JOURNAL).read_bytes().splitlines()
    kept = [json.loads(line) for line in damaged if line in known]
    for entry in kept:
        for name in entry.get("metrics", {}):
            if name not in value.get(entry["step"], {}):
                return False
    records = [entry for line in damaged if (entry := _record(line)) is not None]
    said = {(entry["step"], name, number) for entry in records for name, number in entry["metrics"].items()}
    return all((step, name, number) in said for step, metrics in value.items() for name, number in metrics.items())


def _record(line: bytes) -> Any:
    try:
        entry = json.loads(line)
        good = isinstance(entry["step"], int) and isinstance(entry["time_ms"], int)
        numbers = all(isinstance(number, int | float) for number in entry["metrics"].values())
        return entry if good and numbers else None
    except Exception:
        return None


def followed() -> Any:
    """What the terminal shows of a journal, from its beginning."""
    tail = _Tail(JOURNAL)
    tail.position = 0
    tail.read()
    return tail.step, tail.values, tail.take_messages(), tail.text()


def followed_says(value: Any) -> bool:
    step, values, _, text = value
    return isinstance(step, int) and all(np.isfinite(number) for number in values.values()) and isinstance(text, str)


# ---------------------------------------------------------------------------------------------- MLflow's note


@cache
def store() -> tuple[Path, str]:
    """A store of MLflow in a file, and a run in it."""
    folder = Path(tempfile.mkdtemp(dir=Path.cwd().parent))
    config = replace(BASE, tracking=replace(BASE.tracking, uri=f"sqlite:///{folder}/mlflow.db"))
    return folder / "mlflow.db", start_run(config, "finetune").run_id


def make_note(variant: int) -> None:
    database, run_id = store()
    shutil.copyfile(database, "mlflow.db")
    put("run/mlflow_run_id", (run_id if variant == 0 else run_id[::-1]).encode())
    put("intact", run_id.encode())


def run_of_note() -> Any:
    config = replace(BASE, tracking=replace(BASE.tracking, uri=f"sqlite:///{Path.cwd()}/mlflow.db"))
    return open_run(config, "finetune", RunFolder("run")).run_id


def is_another_run(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 32 and value != Path("intact").read_text()


INPUTS = (
    Input("config.yaml", make_config, "config.yaml", lambda: to_dict(load("config.yaml")), trees.YAML, config_says),
    Input(
        "config.yaml of a run",
        make_run,
        "run/config.yaml",
        claimed,
        trees.YAML,
        also=("./run was started with other values", "./run/config.yaml"),
    ),
    Input("data.json", make_run, "run/data.json", same_data, trees.JSON, also=("since run was started",)),
    Input(
        "result.json",
        keeping("run/result.json", lambda variant: RunFolder("run").finish(result(variant))),
        "run/result.json",
        lambda: RunFolder("run").result(),
        trees.JSON,
        json_says("run/result.json"),
    ),
    Input("lock", make_lock, "run/lock", locked),
    Input("metrics.jsonl", make_journal, JOURNAL, lambda: read_journal(JOURNAL), trees.JSON_LINES, lines_say),
    Input("metrics.jsonl, sent", make_journal, JOURNAL, sent, trees.JSON_LINES, sent_says),
    Input("metrics.jsonl, followed", make_journal, JOURNAL, followed, trees.JSON_LINES, followed_says),
    Input("metrics.jsonl.sent", make_journal, CURSOR, sent, says=sent_says, instead=sent_again),
    Input(
        "mlflow.db",
        make_note,
        "mlflow.db",
        run_of_note,
        instead=is_another_run,
        without=("grow", "another of its kind"),
        slow=True,
    ),
    Input("mlflow_run_id", make_note, "run/mlflow_run_id", run_of_note, instead=is_another_run),
)
