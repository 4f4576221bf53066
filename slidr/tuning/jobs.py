"""What a search is made of: jobs (a training each) and how they ended, as values and as files."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from slidr.config import Config, MethodName, TuneConfig, check_numbers
from slidr.config.marks import INT64
from slidr.data import storage
from slidr.data.records import Types, parse_json, require_record
from slidr.data.storage import RECORD_BYTES, DataError
from slidr.training.runs import RunFolder, folder_of
from slidr.urls import redact_url

Values = Mapping[str, Any]  # numbers, by keys of `optim`
Kind = Literal["trial", "final"]
Status = Literal["finished", "pruned", "failed"]


@dataclass(frozen=True, order=True)
class Group:
    """One row of the table at one label fraction: its trials are compared with each other."""

    fraction: float
    method: MethodName

    @property
    def name(self) -> str:
        """Of its folder; readable."""
        return f"{fraction_name(self.fraction)}/{self.method}"


@dataclass(frozen=True)
class Job:
    """One training: a trial of the search, or a winner's retraining with another seed."""

    group: Group
    kind: Kind
    index: int
    values: Values = field(hash=False)
    round: int = 0
    bounds: Mapping[int, float] = field(default_factory=dict, hash=False)  # least score to go on with, by epoch
    winner: int | None = None  # a final's trial

    @property
    def name(self) -> str:
        """Of its folder, within its group's. Another winner's finals are other runs."""
        of = "" if self.winner is None else f"of-{self.winner:03d}-"
        return f"{self.kind}-{of}{self.index:03d}"

    def to_json(self) -> str:
        """The inverse of `from_json`; floats survive exactly."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        raw = json.loads(text)
        bounds = {int(epoch): bound for epoch, bound in raw["bounds"].items()}
        return Job(**{**raw, "group": Group(**raw["group"]), "bounds": bounds})


@dataclass(frozen=True)
class End:
    """How a job ended.

    `score` is mIoU: a trial's after its last epoch on `data.val_split`, a final's on `tune.final_split`.
    """

    status: Status
    score: float | None = None
    reason: str | None = None
    curve: tuple[tuple[float, float], ...] = ()  # (epoch, mIoU on data.val_split) of each validation
    steps: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        assert (self.status == "failed") == (self.score is None), "a score is what a failed job lacks"


def end_to_json(end: End) -> str:
    """The inverse of `end_from_json`; floats survive exactly."""
    return json.dumps(asdict(end), indent=2)


def end_from_json(text: str | bytes, name: str = "end") -> End:
    """The end that a record describes; `name` names the record. Raises `DataError` for what is not one."""
    raw = require_record(parse_json(text, name, _AGAIN), name, _REQUIRED, _OPTIONAL, _AGAIN)
    lacking = [key for key in _OPTIONAL if key not in raw]  # as in records of other versions, which have other keys
    for key in raw.keys() - {*_REQUIRED, *_OPTIONAL}:
        near = difflib.get_close_matches(key, lacking, n=1)
        if near:
            raise DataError(f"{name}: unknown key {key[:40]!r} and no {near[0]}; {_AGAIN}")
    status, score, curve = raw["status"], raw.get("score"), raw.get("curve", [])
    if status not in get_args(Status):
        raise DataError(f"{name}: status: expected one of {', '.join(get_args(Status))}, got {status!r:.80}; {_AGAIN}")
    if (status == "failed") != (score is None) or (score is not None and not 0 <= score <= 1):
        wanted = "null" if status == "failed" else "a mIoU from 0 to 1"
        raise DataError(f"{name}: score: expected {wanted} as the job is {status}, got {score!r}; {_AGAIN}")
    if not all(_is_validation(pair) for pair in curve):
        raise DataError(f"{name}: curve: expected pairs of an epoch and a mIoU; {_AGAIN}")
    if raw.get("steps", 0) < 0 or raw.get("seconds", 0.0) < 0:
        raise DataError(f"{name}: steps and seconds: expected no negative numbers; {_AGAIN}")
    known = {key: value for key, value in raw.items() if key in (*_REQUIRED, *_OPTIONAL)}
    return End(**{**known, "curve": tuple((epoch, score) for epoch, score in curve)})


_REQUIRED: dict[str, Types] = {"status": str}
_OPTIONAL: dict[str, Types] = {
    "score": (float, type(None)),
    "reason": (str, type(None)),
    "curve": list,
    "steps": int,
    "seconds": float,
}
_AGAIN = (
    "copy the file again, or remove it: the same command then finds the end again, from what was trained, or trains"
)


def _is_validation(pair: Any) -> bool:
    """Whether this is an epoch and a mIoU, which is NaN where a failed training had none."""
    if not (isinstance(pair, list) and len(pair) == 2):
        return False
    epoch, score = pair
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in pair)
    return numbers and 0 <= epoch < float("inf") and (score != score or 0 <= score <= 1)


def read_end(folder: RunFolder) -> End | None:
    """The recorded end of a job, or None for one that has not ended. Raises `DataError` for a damaged record."""
    path = folder.file("end.json")
    return end_from_json(storage.read_bytes(path, RECORD_BYTES), path) if storage.exists(path) else None


def write_end(folder: RunFolder, end: End) -> None:
    """Records an end, whole or not at all; a job with a record is never run again."""
    public = replace(end, reason=None if end.reason is None else redact_url(end.reason))
    storage.write_bytes_atomic(folder.file("end.json"), end_to_json(public).encode())


def ended(score: float, **rest: Any) -> End:
    """A finished job's end; one whose score is no number failed."""
    if math.isfinite(score):
        return End("finished", score, **rest)
    return End("failed", None, f"the score is {score}", **rest)


def search_folder(config: Config) -> RunFolder:
    """Where a search and all its jobs live."""
    return folder_of(config)


def job_config(config: Config, job: Job) -> Config:
    """The config of the run that a job is: an ordinary fine-tuning.

    One worker trains in the job's own process (`cluster.num_workers: 0`). A trial has the search's seed, so that
    trials differ in their values only; a final has another, with which nothing was chosen. A final's
    training watches one frame an epoch: nothing is decided there.
    """
    tune = config.tune
    workers = config.cluster.num_workers if config.cluster.max_workers > 1 else 0
    data = replace(config.data, train_fraction=job.group.fraction)
    seed = config.run.seed
    if job.kind == "final":
        data = replace(data, train_split=tune.final_train_split, max_val_frames=1)
        seed = (seed + 1 + job.index) % (INT64 + 1)  # stays a seed
    optim = replace(config.optim, **job.values)
    check_numbers(optim, f"{job.group.name}/{job.name}", "optim")
    return replace(
        config,
        data=data,
        student=config.student if job.group.method == "pretrained" else replace(config.student, weights=None),
        optim=optim,
        run=replace(
            config.run,
            folder=storage.join(search_folder(config).path, job.group.name),
            name=job.name,
            seed=seed,
            resume=True,
            keep_checkpoints=1,
        ),
        cluster=replace(config.cluster, num_workers=workers),
        tune=TuneConfig(),  # what a run is does not depend on the search around it
    )


def fraction_name(fraction: float) -> str:
    """ "1pct" and the like: of folders and models."""
    return f"{100 * fraction:g}pct"
