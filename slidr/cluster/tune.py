"""The learning-rate search: for each label fraction and method, which values are best, and what they are worth.

Trials train on `data.train_split` and are compared on `data.val_split`; each winner is trained again on
`tune.final_train_split` with several seeds and scored once on `tune.final_split`. See docs/tuning.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from slidr.cluster.executor import run_agenda
from slidr.cluster.search_records import claim_search, require_same_values, results_folder
from slidr.cluster.train import with_absolute_paths
from slidr.config import Config, ConfigError, fingerprint
from slidr.data import storage
from slidr.data.frames import open_table
from slidr.data.labels import CLASSES
from slidr.data.loading import ScanSource, train_plan
from slidr.data.records import read_record
from slidr.data.storage import DataError
from slidr.models.weights import weights_digest
from slidr.report.pictures import save_picture
from slidr.report.tuning import confusion_chart, course_chart, fractions_chart, rates_chart
from slidr.tracking import read_journal, tracking_uri
from slidr.tracking_models import register_student
from slidr.tracking_search import SearchTracker, existing
from slidr.training.locks import held
from slidr.training.optim import total_steps
from slidr.training.runs import RunFolder, folder_of
from slidr.training.segment import build_segmenter
from slidr.tuning.agenda import ListAgenda, SearchAgenda
from slidr.tuning.jobs import End, Group, Job, Kind, fraction_name, job_config, read_end, search_folder
from slidr.tuning.table import Ends, finals, groups_of, markdown, reasons, rows, table
from slidr.urls import RedactedError

_FINAL_FILES = ("evaluation.json", "confusion.png", "course.png")
Tell = Callable[[str], None]


class SearchFailed(RedactedError, RuntimeError):
    """A search without a result; the message says why and how to go on."""


def search(config: Config, tell: Tell = lambda line: None) -> dict[str, Any]:
    """Runs (or takes up again) the search that a config describes; returns the table and the files it wrote.

    `tell` gets a line for every job that ends. Raises `ConfigError`, `WeightsError`, `DataError` or `ClusterError` for
    what cannot be searched, before anything is trained; `RunError` where the folder holds a search with other values or
    another process is at it; `SearchFailed` where no trial finished, or jobs were lost with their machines.
    """
    config = with_absolute_paths(config)
    tags = _check(config)
    folder = search_folder(config)
    with held(folder.path + ".lock", f"the search {config.run.name}"):
        claim_search(config, tags)
        tracker = SearchTracker(config, tags)
        status = "FAILED"
        try:
            result = _search(config, tracker, tell)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            tracker.hurry()
            if status != "FINISHED":
                tracker.close(status)
        return result


def _search(config: Config, tracker: SearchTracker, tell: Tell) -> dict[str, Any]:
    groups = groups_of(config)
    agenda = SearchAgenda(groups, config.tune, config.run.seed, _recorded(config), lambda job: _epochs(config, job))
    told = _teller(config, {group: agenda.total(group) for group in groups}, tell)

    def ended(job: Job, end: End) -> None:
        told(job, end)
        tracker.end(job, end, _pictures(config, job))

    run_agenda(agenda, config, tracker.start, ended)
    _refuse_lost(agenda.lost)
    if all(end.status == "failed" for end in agenda.ends.values()):
        raise SearchFailed(
            f"{search_folder(config).path}: all {len(agenda.ends)} trials failed: {reasons(agenda.ends.values())}; "
            f"mend the cause and start anew with --fresh"
        )
    # Only now is there a job that reads the final split.
    last = ListAgenda(finals(config, agenda.ends), _recorded(config))
    run_agenda(last, config, tracker.start, ended)
    _refuse_lost(last.lost)
    ends = {**agenda.ends, **last.ends}
    result = _write_results(config, ends)
    _record(config, tracker, ends, result)
    if all(end.status == "failed" for end in last.ends.values()):
        raise SearchFailed(
            f"{search_folder(config).path}: all {len(last.ends)} finals failed: {reasons(last.ends.values())}; "
            f"the trials are in {', '.join(result['files'])}; mend the cause and start anew with --fresh"
        )
    return result


def _check(config: Config) -> dict[str, str]:
    """Refuses what no trial could do; returns what identifies the data and the weights, for MLflow's tags."""
    tune, data = config.tune, config.data
    if storage.is_remote(config.run.folder):
        raise ConfigError(
            f"run.folder: {config.run.folder} is an object store; a search needs a folder on this machine, or mounted "
            f"on every node: its jobs lock and rename"
        )
    if tune.final_split in (data.train_split, data.val_split, tune.final_train_split):
        raise ConfigError(
            f"tune.final_split: got {tune.final_split}, which trials or finals train or choose on; name a split "
            f"that is read for the final scores only"
        )
    if "pretrained" in tune.methods and config.student.weights is None:
        raise ConfigError(
            "student.weights: the method pretrained needs a checkpoint to start from; pass --student.weights PATH, or "
            "search tune.methods: [random] only"
        )
    table = open_table(data.frames, data.dataset)
    splits = [data.train_split, data.val_split, tune.final_train_split, tune.final_split]
    chosen = {split: table.select(split).tokens for split in dict.fromkeys(splits)}
    for split in chosen:
        missing = table.select(split).unlabelled
        if missing:
            raise ConfigError(
                f"tune: {missing} of {len(chosen[split])} frames of {split} in {data.frames} have no point labels; add "
                f"them to the data root and run slidr frames again"
            )
    for one, other in (
        (data.train_split, data.val_split),
        (data.train_split, tune.final_split),
        (data.val_split, tune.final_split),
        (tune.final_train_split, tune.final_split),
    ):
        shared = len(set(chosen[one]) & set(chosen[other]))
        if shared:
            raise ConfigError(
                f"tune: {one} and {other} share {shared} frames of {data.frames}; what is trained on, chosen on and "
                f"scored on must be apart"
            )
    tags = {
        "dataset_fingerprint": table.fingerprint,
        "split_manifest_sha256": hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest(),
    }
    for group in groups_of(config):
        space = tune.pretrained if group.method == "pretrained" else tune.random
        for size in space.batch_size or (config.optim.batch_size,):
            for kind in get_args(Kind):
                train_plan(ScanSource(job_config(config, Job(group, kind, 0, {"batch_size": size}))))
    for group in groups_of(replace(config, tune=replace(tune, fractions=tune.fractions[:1]))):
        build_segmenter(job_config(config, Job(group, "trial", 0, {})))
    if config.student.weights is not None and "pretrained" in tune.methods:
        tags["parent_sha256"] = weights_digest(config.student.weights)
    return tags


def _recorded(config: Config) -> Callable[[Job], End | None]:
    def recorded(job: Job) -> End | None:
        own = job_config(config, job)
        folder = folder_of(own)
        end = read_end(folder)
        if end is not None:
            require_same_values(own, folder)
            # A kill may have come between the record and this.
            shutil.rmtree(folder.checkpoints.path, ignore_errors=True)
        return end

    return recorded


def _epochs(config: Config, job: Job) -> int:
    """How many epochs a job's training has."""
    own = job_config(config, job)
    per_epoch = train_plan(ScanSource(own)).steps_per_epoch
    return -(-total_steps(own.optim, per_epoch) // per_epoch)


def _teller(config: Config, totals: dict[Group, int], tell: Tell) -> Callable[[Job, End], None]:
    def told(job: Job, end: End) -> None:
        values = ", ".join(f"{name} {value:g}" for name, value in job.values.items())
        number = f"{job.index + 1}/{totals[job.group] if job.kind == 'trial' else config.tune.seeds}"
        outcome = f"mIoU {100 * end.score:.1f} %" if end.score is not None else str(end.reason)
        where = f"{100 * job.group.fraction:g} % {job.group.method}"
        tell(f"{where}  {job.kind} {number}  {values}: {end.status}, {outcome}")

    return told


def _refuse_lost(lost: dict[Job, str]) -> None:
    if lost:
        lines = "\n".join(f"  {job.group.name}/{job.name}: {reason}" for job, reason in lost.items())
        raise SearchFailed(
            f"{len(lost)} trainings were lost, all others are on record; the same command continues:\n{lines}"
        )


def _pictures(config: Config, job: Job) -> list[str]:
    """Draws a final's confusion matrix and course into its folder; returns its files.

    A picture costs no result: where what it shows is damaged, a warning says so.
    """
    folder = folder_of(job_config(config, job))
    if job.kind != "final" or not storage.exists(folder.file("evaluation.json")):
        return []
    title = f"{fraction_name(job.group.fraction)}, {job.group.method}, {job.name}"
    drawn = {
        "confusion.png": lambda: confusion_chart(_confusion(folder, config), CLASSES[config.data.dataset], title),
        "course.png": lambda: course_chart(read_journal(folder.file("metrics.jsonl")), title),
    }
    for name, draw in drawn.items():
        if not storage.exists(folder.file(name)):
            save_picture(folder.file(name), draw)
    return existing(folder, _FINAL_FILES)


def _confusion(folder: RunFolder, config: Config) -> list[list[int]]:
    """A final's confusion matrix, counts by class. Raises `DataError` for a damaged record."""
    path = folder.file("evaluation.json")
    matrix = read_record(path, {"confusion": list}, next_step="the table does not need it")["confusion"]
    size = len(CLASSES[config.data.dataset])
    whole = len(matrix) == size and all(
        isinstance(row, list) and len(row) == size and all(type(count) is int and count >= 0 for count in row)
        for row in matrix
    )
    if not whole:
        raise DataError(f"{path}: confusion: expected {size} x {size} counts; the table does not need it")
    return matrix


def _write_results(config: Config, ends: Ends) -> dict[str, Any]:
    """Writes every file of the results; returns the table and their paths."""
    tune = config.tune
    folder = results_folder(config)
    found, entries = rows(config, ends), table(config, ends)
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(found, schema=_SCHEMA), sink)
    outcome = {
        "search": config.run.name,
        "chosen_on": config.data.val_split,
        "scored_on": tune.final_split,
        "seeds": tune.seeds,
        "config": fingerprint(replace(config, tune=replace(tune, fresh=False))),
        "table": entries,
    }
    page = markdown(entries, config)
    tables = {
        "trials.parquet": sink.getvalue(),
        "table.json": json.dumps(outcome, indent=2).encode(),
        "table.md": page.encode(),
    }
    for name, data in tables.items():
        storage.write_bytes_atomic(folder.file(name), data)
    charts = {
        "rates.png": lambda: rates_chart(found, config.data.val_split),
        "fractions.png": lambda: fractions_chart(entries, tune.final_split),
    }
    drawn = [save_picture(folder.file(name), draw) for name, draw in charts.items()]
    files = [*(folder.file(name) for name in tables), *(path for path in drawn if path is not None)]
    return {**outcome, "files": files, "page": page}


def _record(config: Config, tracker: SearchTracker, ends: Ends, result: dict[str, Any]) -> None:
    """Brings MLflow up to date, and registers the winners; says in `result` whether that was possible."""
    tracker.hurry()
    complete = all(tracker.end(job, end, _pictures(config, job)) for job, end in ends.items())
    models = tracker.trying(lambda: _register(config, ends, result["table"])) if complete else None
    closed = tracker.close("FINISHED", result["files"])
    result["models"] = models or []
    result["recorded"] = complete and models is not None and closed
    result["mlflow_run_id"] = tracker.run_id


def _register(config: Config, ends: Ends, entries: Sequence[dict[str, Any]]) -> list[str]:
    """One registered model a fraction, one version a method: the final of the first seed that ended well.

    (The best on the final split would be chosen by it.) Aliases: the method; "champion" for the one whose winner was
    best in the search.
    """
    uri, names = tracking_uri(config), []
    for entry in entries:
        group = Group(entry["fraction"], entry["method"])
        own = [job for job, end in ends.items() if job.group == group and job.kind == "final" and end.score is not None]
        if not own:
            continue
        rivals = [e["search_score"] for e in entries if e["fraction"] == group.fraction and e["scores"]]
        champion = ["champion"] if entry["search_score"] == max(rivals) else []
        job = min(own, key=lambda job: job.index)
        folder = folder_of(job_config(config, job))
        name = f"{config.run.name}-{fraction_name(group.fraction)}"
        run_id = folder.note("mlflow_run_id")
        assert run_id is not None, "the job's run is complete"
        tags = {"method": group.method, "fraction": repr(group.fraction), "search_score": repr(entry["search_score"])}
        register_student(uri, name, run_id, folder.path, [group.method, *champion], tags)
        names += [f"models:/{name}@{alias}" for alias in (group.method, *champion)]
    return names


_SCHEMA = pa.schema(
    [
        ("fraction", pa.float64()),
        ("method", pa.string()),
        ("kind", pa.string()),
        ("index", pa.int64()),
        ("round", pa.int64()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("score", pa.float64()),  # mIoU: a trial's on data.val_split, a final's on tune.final_split
        ("lr", pa.float64()),
        ("head_lr", pa.float64()),
        ("weight_decay", pa.float64()),
        ("batch_size", pa.int64()),
        ("epochs", pa.int64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),
        ("curve_epochs", pa.list_(pa.float64())),
        ("curve", pa.list_(pa.float64())),  # mIoU on data.val_split after those epochs
    ]
)
