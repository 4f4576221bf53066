"""A run's folder: who owns it, what it was started with, and how it ended.

runs/NAME/config.yaml     what it was started with
runs/NAME/data.json       fingerprints of the data and of the student's weights it was started on
runs/NAME/checkpoints/    see `slidr.training.checkpoint`
runs/NAME/lock            held by the process that runs it (lock.writer: by the worker that writes); see `locks`
runs/NAME/metrics.jsonl   one line a logged step, and the workers' messages
runs/NAME/mlflow_run_id   the MLflow run that has its parameters and metrics (metrics.jsonl.sent: how many of them)
runs/NAME/student.pt      the final student in SLidR's published layout
runs/NAME/method.png      one held-out keyframe through both networks (pretraining)
runs/NAME/result.json     the final scores; its presence says that the run is finished
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from slidr.config import (
    ClusterConfig,
    Config,
    ConfigError,
    DemoConfig,
    EvaluationConfig,
    RunConfig,
    TrackingConfig,
    TuneConfig,
    WorldConfig,
    decode,
    dump,
    fingerprint,
    parse,
    public_dict,
    to_dict,
)
from slidr.data import storage
from slidr.data.loading import subset_frames
from slidr.data.records import read_record
from slidr.data.storage import RECORD_BYTES, DataError
from slidr.models.download import is_url, student_file
from slidr.models.weights import weights_digest
from slidr.training.checkpoint import CheckpointFolder
from slidr.urls import RedactedError, redact_url, redacting_logger

_log = redacting_logger(__name__)
_DIGEST = "sha256"  # of the other values of a result


class RunError(RedactedError, ValueError):
    """A run folder that cannot be used as asked."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: str
    keep_checkpoints: int = 3

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.file("checkpoints"), self.keep_checkpoints)

    def file(self, name: str) -> str:
        return storage.join(self.path, name)

    def result(self) -> dict[str, Any] | None:
        """The final scores, or None for a run that is not finished. Raises `DataError` for a damaged record of them."""
        path = self.file("result.json")
        if not storage.exists(path):
            return None
        again = "copy it again, or remove it: the same command with --run.resume makes it again from the checkpoints"
        record = read_record(path, {"steps": int, "epochs": int}, {_DIGEST: str}, next_step=again)
        digest = record.pop(_DIGEST, None)  # earlier versions wrote none, under no name
        renamed = any(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) for value in record.values())
        if renamed or digest not in (None, _digest_of(record)):
            raise DataError(f"{redact_url(path)}: is damaged (its values are not those of its {_DIGEST}); {again}")
        return _each_text(record, self._with_secrets)

    def _with_secrets(self, text: str) -> str:
        """The path of a file of this folder as this process reaches it; the record has it without secrets."""
        public = redact_url(self.path)
        inside = public != self.path and text.startswith(f"{public}/")
        return self.file(text.removeprefix(f"{public}/")) if inside else text

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the final scores, which makes the run a finished one."""
        public = _each_text(result, redact_url)
        signed = {**public, _DIGEST: _digest_of(public)}
        storage.write_bytes_atomic(self.file("result.json"), json.dumps(signed, indent=2).encode())

    def note(self, name: str, text: str | None = None) -> str | None:
        """Keeps a line of text under a name, or (given none) reads it back; None where there is none.

        Raises `DataError` for what is not text.
        """
        path = self.file(name)
        if text is not None:
            storage.write_bytes_atomic(path, redact_url(text).encode())
            return text
        return _text(path) if storage.exists(path) else None

    def require_visible(self) -> None:
        """Raises `RunError` in a process that does not see the folder, which `claim` made elsewhere."""
        if not storage.exists(self.file("config.yaml")):
            raise RunError(
                f"{self.path}: not there on {socket.gethostname()}; run.folder must be storage that every node sees: "
                f"a folder mounted on all of them, or s3://"
            )


def recorded_config(path: str) -> Config:
    """The config that a run or search was started with. Raises `DataError` or `ConfigError`, which name the file."""
    return parse(_text(path), redact_url(path))


def folder_of(config: Config) -> RunFolder:
    """The folder that a config's run lives in."""
    return RunFolder(storage.join(config.run.folder, config.run.name), config.run.keep_checkpoints)


def identity(config: Config) -> str:
    """Fingerprint of everything that shapes a run's result: where files lie and how it logs do not."""
    return fingerprint(_shaping(config))


def _shaping(config: Config) -> Config:
    """The config with every value that shapes no result set to its default or to nothing."""
    cluster = replace(ClusterConfig(), num_workers=config.cluster.num_workers, use_gpu=config.cluster.use_gpu)
    defaults = RunConfig()
    run = replace(defaults, seed=config.run.seed, score_frames=config.run.score_frames, name=config.run.name)
    config = decode(public_dict(config))
    return replace(
        config,
        data=replace(config.data, root="", frames="", allow_missing=None),  # the frame table says what it lacks
        superpixels=config.superpixels.parameters,
        run=run,
        cluster=cluster,
        tracking=TrackingConfig(),
        tune=TuneConfig(),
        world=WorldConfig(),
        demo=DemoConfig(),
        evaluation=EvaluationConfig(reestimate_norms=config.evaluation.reestimate_norms),
    )


def claim(config: Config) -> RunFolder:
    """The run's folder, made or taken up again.

    A folder that holds another run, or this one without `run.resume`, is refused: nothing is ever overwritten. Only the
    number of workers may be another one, since there may be no room any more for those that it was started with.
    """
    folder = folder_of(config)
    storage.sweep_temporary(folder.path)
    known = folder.file("config.yaml")
    unproven = not folder.checkpoints.steps() and folder.result() is None
    if not storage.exists(known) or unproven:  # a run that never got to a checkpoint has nothing to lose
        _forget_other_values(config, folder)
        storage.write_bytes_atomic(known, dump(config).encode())
        return folder
    if not config.run.resume:
        raise RunError(
            f"run.name: {folder.path} already holds a run; continue it with --run.resume, or choose another "
            f"--run.name (or remove the folder)"
        )
    earlier = recorded_config(known)
    before, now = earlier.cluster.num_workers, config.cluster.num_workers
    as_before = replace(config, cluster=replace(config.cluster, num_workers=before))
    if identity(earlier) != identity(as_before):
        raise RunError(
            f"run.resume: {folder.path} was started with other values: {differences(earlier, as_before)}; "
            f"resume with the old ones, which are in {known}, or choose another --run.name"
        )
    if before != now:
        _log.warning(
            "%s was started with cluster.num_workers %s and is resumed with %s: %s",
            folder.path,
            before,
            now,
            of_the_workers(config),
        )
    return folder


def of_the_workers(config: Config) -> str:
    """What of a training depends on how many workers share a batch, beyond rounding."""
    if config.loss.names == ("cross_entropy_lovasz",):
        return "batches stay, but the loss is the mean of each worker's own, so it moves a little"
    if "point_pixel_info_nce" in config.loss.names:
        return "batches stay, but each worker draws its own pairs, so the loss is another one"
    if not config.loss.gather_negatives:
        return (
            "batches stay, but a superpixel's negatives are those of its worker's frames, so the loss is another one "
            "(loss.gather_negatives: true makes it that of the whole batch)"
        )
    return "batches and loss stay, but sums are rounded in another order"


def _forget_other_values(config: Config, folder: RunFolder) -> None:
    """Drops the MLflow run and the journal that a run with other values left: this one's are not to be added there."""
    known = folder.file("config.yaml")
    if not storage.exists(known):
        return
    try:
        same = identity(recorded_config(known)) == identity(config)
    except (ConfigError, DataError):  # keys of another version, or damage
        same = False
    if not same:
        for name in ("mlflow_run_id", "metrics.jsonl", "metrics.jsonl.sent"):
            storage.delete(folder.file(name))


def require_same_data(config: Config, folder: RunFolder) -> None:
    """Keeps the fingerprints of a run's data in its folder; raises `RunError` where they are not those it began with.

    The same frame table may lie elsewhere, and so may the data root: what counts is what they hold. Of the data root
    that is the first training frame's sweep, which every kind of training reads. The weights that a student starts
    from are data too: another file under the same name would make another run.
    """
    frames = subset_frames(config, "train")
    sweep = storage.read_bytes(storage.safe_join(config.data.root, frames[0].lidar_path))
    now = {"frames": frames.fingerprint, "root": hashlib.sha256(sweep).hexdigest()}
    if config.student.weights is not None:
        now["weights"] = weights_digest(config.student.weights)
    known = folder.file("data.json")
    if not storage.exists(known) or not (folder.checkpoints.steps() or folder.result()):
        folder.note("data.json", json.dumps(now, indent=2))
        return
    changed = {
        "frames": f"data.frames: {config.data.frames}: the frame table was written again from other data",
        "root": f"data.root: {config.data.root}: it holds other files",
        "weights": f"student.weights: {redact_url(config.student.weights or '')}: it is another file",
    }
    step = "copy it again; removed, the run goes on without comparing its data"
    record = read_record(known, {"frames": str}, dict.fromkeys(changed, str), next_step=step)
    for key, value in record.items():
        if key not in changed:
            raise DataError(f"{redact_url(known)}: unknown key {key!r}, expected {', '.join(changed)}; {step}")
        if now.get(key) != value:
            raise RunError(
                f"{changed[key]} since {folder.path} was started; put the old one back, or choose another --run.name"
            )


def require_same_weights(config: Config, folder: RunFolder) -> None:
    """Raises `RunError` in a process whose download of `student.weights` is not the file that the run began with."""
    weights, known = config.student.weights, folder.file("data.json")
    if weights is None or not is_url(weights) or not storage.exists(known):
        return
    wanted = read_record(known, {"weights": str})
    if weights_digest(weights) != wanted["weights"]:
        raise RunError(
            f"student.weights: {redact_url(weights)}: the copy on {socket.gethostname()}, {student_file(weights)}, is "
            f"not the file that {folder.path} was started with; delete that copy, or pass a path that every node sees"
        )


def differences(before: Config, after: Config) -> str:
    """The keys that shape a result and differ, with both values: those that make `identity` another one."""
    return ", ".join(_differing(to_dict(_shaping(before)), to_dict(_shaping(after)), ""))


def _text(path: str) -> str:
    try:
        return storage.read_bytes(path, RECORD_BYTES).decode()
    except UnicodeDecodeError:
        raise DataError(f"{redact_url(path)}: is damaged (not text); copy it again or remove it") from None


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """A record with every text in it changed."""
    if isinstance(value, dict):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_each_text(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _digest_of(record: dict[str, Any]) -> str:
    """SHA-256 of a record's values, as JSON reads them back."""
    values = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str) -> list[str]:
    lines: list[str] = []
    for key in new:
        if isinstance(new[key], dict):
            lines += _differing(old[key], new[key], f"{prefix}{key}.")
        elif old[key] != new[key]:
            lines.append(f"{prefix}{key} was {old[key]!r}, now {new[key]!r}")
    return lines
