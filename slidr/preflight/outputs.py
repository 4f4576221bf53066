"""Whether a job can write what it will: folders that last and can be written, room on the disk, tracking, the clock."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from slidr import tracking
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.cluster.tune import results_folder
from slidr.config import Config
from slidr.data import storage
from slidr.data.storage import DataError
from slidr.planning.costs import PACKAGED, read_costs
from slidr.preflight.findings import Finding, Stage, Status
from slidr.preflight.inputs import frame_table
from slidr.preflight.plan import has_search, images_to_cut, job_of, state_bytes
from slidr.training.runs import folder_of as run_folder
from slidr.urls import redact_url

SKEW_WARNING_S, SKEW_ERROR_S = 30.0, 600.0  # S3 refuses requests that are 15 minutes off
_RAYS_COPIES = "working_dir_files"  # the folder that `ray job submit --working-dir` unpacks into


def written_folders(config: Config, stage: Stage | None) -> Iterator[tuple[str, str]]:
    """The key and the folder of everything that a job writes; without a stage, of all but the frame table."""
    if stage == "frames":
        yield "data.frames", storage.split(config.data.frames)[0] or "."
        return
    if stage == "superpixels" or (stage is None and job_of(config) == "pretrain"):
        yield "superpixels.folder", superpixel_folder(config.superpixels)
    if stage != "superpixels":
        yield "run.folder", run_folder(config).path
    if stage == "tune" or (stage is None and has_search(config)):
        yield "tune.results", results_folder(config).path
    if stage in (None, "evaluate") and config.evaluation.submission is not None:
        yield "evaluation.submission", config.evaluation.submission
    uri = config.tracking.uri
    if stage != "superpixels" and uri is not None and uri.startswith("sqlite:///"):
        yield "tracking.uri", storage.split(uri.removeprefix("sqlite:///"))[0] or "."


def folders(config: Config, stage: Stage | None) -> Iterator[Finding]:
    """What a job writes stays and can be written; and this machine's clock agrees with those of the storages."""
    ahead: list[tuple[float, str]] = []
    for key, folder in written_folders(config, stage):
        # Someone else may have made the maps, for all to read; whether all are there is another line's to say.
        status: Status = "warning" if stage is None and key == "superpixels.folder" else "error"
        if _vanishes(folder):
            yield Finding(
                key, "error", f"{folder}: is in the copy of the working folder that Ray deletes after the job",
                f"give --{key} an absolute path, on storage that every node sees, or s3://",
            )  # fmt: skip
            continue
        try:
            ahead.append((_write_probe(folder), folder))
        except (OSError, DataError) as error:
            reason = getattr(error, "strerror", None) or error
            step = f"choose another {key}"
            if getattr(error, "errno", None) == errno.ENOSPC:
                step = f"free some space, or {step}"
            yield Finding(key, status, f"{folder}: cannot be written ({reason})", step)
        else:
            yield Finding(key, "ok", f"{folder}: can be written")
    if ahead:
        yield skew(*max(ahead, key=lambda found: abs(found[0])))


def table_file(config: Config) -> Iterator[Finding]:
    """An error where a folder has the frame table's name."""
    path = config.data.frames
    if not storage.is_remote(path) and os.path.isdir(storage.join(path)):
        yield Finding("data.frames", "error", f"{path}: is a folder", f"--data.frames {path}/frames.parquet")


def _vanishes(folder: str) -> bool:
    """Whether a folder is inside the copy of the working folder that a submitted job runs in."""
    if storage.is_remote(folder):
        return False
    return _RAYS_COPIES in Path(storage.join(folder)).absolute().parts


def _write_probe(folder: str) -> float:
    """Writes a file where `folder` is or will be, and removes it; how many seconds this machine's clock is ahead.

    Raises `OSError` where it cannot be written.
    """
    existing = folder if storage.is_remote(folder) else str(_existing(folder))
    probe = storage.join(existing, f".tmp-doctor-{uuid.uuid4().hex[:8]}")
    storage.write_bytes_atomic(probe, b".")
    try:
        return time.time() - storage.modified(probe)
    finally:
        with contextlib.suppress(OSError):  # a job may be allowed to write and not to delete
            storage.delete(probe)


def _existing(folder: str) -> Path:
    """The nearest folder above that exists already, or the folder itself."""
    path = Path(storage.join(folder)).absolute()
    while not os.path.exists(path):  # false, too, where it may not be looked for
        path = path.parent
    return path


def disk(config: Config, stage: Stage | None) -> list[Finding]:
    """Free space where a job writes, against what it will write."""
    findings = []
    job = job_of(config)
    if stage not in ("superpixels", "evaluate"):  # an evaluation writes no weights
        state, student = state_bytes(config, job)
        # While a new checkpoint is written, the old ones are all there still.
        need = (config.run.keep_checkpoints + 2) * state + student
        if stage == "tune" or (stage is None and has_search(config)):  # every final keeps its student
            need += len(config.tune.fractions) * len(config.tune.methods) * config.tune.seeds * student
        findings.append(space("run.folder", run_folder(config).path, need))
    if stage in (None, "superpixels") and job == "pretrain" and frame_table(config).status != "error":
        pixels: list[int] = []
        there = 0
        if stage == "superpixels":
            with contextlib.suppress(OSError, DataError):  # `folders` reports an unusable folder, the job the tokens
                pixels, there = images_to_cut(config)
        size = read_costs(PACKAGED).nearest("label_map", max([*pixels, 1]))
        left = sum(pixels) * (1 - there / max(len(pixels), 1))
        need = int(left * size.value / size.setting["pixels"]) if size is not None else 0
        findings.append(space("superpixels.folder", superpixel_folder(config.superpixels), need))
    return findings


def space(key: str, folder: str, need: int) -> Finding:
    """Free bytes on the file system that `folder` is on, or will be, against `need`."""
    if storage.is_remote(folder):
        return Finding(f"disk: {key}", "ok", f"{folder}: an object store, its room is not asked for")
    existing = _existing(folder)
    have = shutil.disk_usage(existing).free
    text = f"{existing}: {have / 1e9:.1f} GB free, {need / 1e9:.2f} GB needed"
    if have < need:
        return Finding(f"disk: {key}", "error", text, f"free some space, or choose another {key}")
    if have < 2 * need:
        return Finding(f"disk: {key}", "warning", text, f"more room in {key} would be safer")
    return Finding(f"disk: {key}", "ok", text)


def tracking_server(config: Config, stage: Stage | None = None) -> Finding:
    """MLflow's store takes a run, as a run itself would find. A search goes on without one that is only away."""
    uri = tracking.tracking_uri(config)
    try:
        tracking.check_store(uri, config.tracking.experiment)
    except tracking.TrackingError as error:
        status: Status = "warning" if stage == "tune" and not error.lasting else "error"
        return Finding("tracking", status, f"{redact_url(uri)}: {error.what}", error.next)
    return Finding("tracking", "ok", redact_url(uri))


def skew(seconds: float, folder: str) -> Finding:
    """How far this machine's clock is ahead of that of the storage a folder is on."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    text = f"{now}, {abs(seconds):.1f} s off the clock of {folder}"
    if abs(seconds) < SKEW_WARNING_S:
        return Finding("clock", "ok", text)
    status: Status = "error" if abs(seconds) > SKEW_ERROR_S else "warning"
    return Finding("clock", status, text, "let chrony or ntpd set the clocks of all machines")
