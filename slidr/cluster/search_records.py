"""What a search keeps about itself: the values that it was started with, and where they are compared again."""

from __future__ import annotations

import glob
import json
import os
import time
from dataclasses import asdict
from typing import Any

from slidr.config import Config, ConfigError, absolute_path, dump
from slidr.data import storage
from slidr.data.records import Types, read_record
from slidr.data.storage import DataError
from slidr.training.runs import RunError, RunFolder, differences, identity, recorded_config
from slidr.tuning.jobs import search_folder

# What may change between two launches of a search: what there is of it then still is of it.
_EXTENDABLE = ("fractions", "methods", "trials", "seeds", "results", "fresh")
RESULT_FILES = ("trials.parquet", "table.json", "table.md", "rates.png", "fractions.png")


def claim_search(config: Config, tags: dict[str, str]) -> None:
    """Takes the search's folder, or takes it up again; with `tune.fresh` what was there is set aside."""
    folder = search_folder(config)
    begun = any(glob.glob(f"{glob.escape(folder.path)}/*/*/*/{name}") for name in ("end.json", "checkpoints/*.pt"))
    values: dict[str, Any] = {"config": identity(config), "tune": _fixed(config), **tags}
    there = storage.exists(folder.file("search.json"))
    known = _record_of(folder) if there and not config.tune.fresh else values
    other = any(values[key] != value for key, value in known.items() if key in values)
    # Of a search that got to no checkpoint nothing is worth keeping, but its MLflow runs and journals have its values.
    if config.tune.fresh or (other and not begun):
        _set_aside(folder.path)
        there = False
    if config.tune.fresh:
        _set_results_aside(results_folder(config))
    if not there:
        storage.write_bytes_atomic(folder.file("config.yaml"), dump(config).encode())
        storage.write_bytes_atomic(folder.file("search.json"), json.dumps(values, indent=2).encode())
        return
    if not other:
        grown = json.dumps({**known, **values}, indent=2)
        storage.write_bytes_atomic(folder.file("search.json"), grown.encode())
        return
    earlier = _config_of(folder)
    changed = [differences(earlier, config)] if known["config"] != values["config"] else []
    changed += [
        f"tune.{key} was {known['tune'].get(key, 'unknown')}, now {value}"
        for key, value in _fixed(config).items()
        if known["tune"].get(key) != value
    ]
    changed += [f"{key.removesuffix('_sha256')} differs" for key in tags if known.get(key, tags[key]) != tags[key]]
    raise RunError(
        f"run.name: {folder.path} holds a search with other values: {', '.join(changed)}; continue it with the old "
        f"ones, choose another --run.name, or start again with --fresh (the old one is set aside)"
    )


def _record_of(folder: RunFolder) -> dict[str, Any]:
    """What a search was started with. Raises `DataError` for a damaged record."""
    next_step = (
        "copy the file again, or remove it to go on with the present values (each trial's are still compared), or "
        "start again with --fresh"
    )
    texts: dict[str, Types] = dict.fromkeys(("dataset_fingerprint", "split_manifest_sha256", "parent_sha256"), str)
    return read_record(folder.file("search.json"), {"config": str, "tune": dict}, texts, next_step)


def _config_of(folder: RunFolder) -> Config:
    """The config in a folder. Raises `RunError` where it is damaged."""
    try:
        return recorded_config(folder.file("config.yaml"))
    except (ConfigError, DataError) as error:
        raise RunError(
            f"{error}\nThe record in {folder.path} is damaged: copy that file again, or start again with --fresh (what "
            f"is there is set aside)"
        ) from error


def results_folder(config: Config) -> RunFolder:
    """Where the tables and plots of a search go."""
    return RunFolder(absolute_path(config.tune.results or os.path.join("results", config.run.name)))


def _set_aside(path: str) -> None:
    """Renames the folder of an earlier search, if there is one; nothing is lost."""
    if os.path.exists(path):
        os.rename(path, _beside(path))


def _set_results_aside(folder: RunFolder) -> None:
    """Moves an earlier search's results into a folder beside them; others' files stay where they are."""
    aside = RunFolder(_beside(folder.path))
    for name in RESULT_FILES:
        if storage.exists(folder.file(name)):
            storage.write_bytes_atomic(aside.file(name), storage.read_bytes(folder.file(name), storage.TABLE_BYTES))
            storage.delete(folder.file(name))


def _beside(path: str) -> str:
    return storage.sibling(path, f".before-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 1000:03d}")


def _fixed(config: Config) -> dict[str, Any]:
    """What of `tune` may not change while a search goes on, as JSON reads it back."""
    values = {key: value for key, value in asdict(config.tune).items() if key not in _EXTENDABLE}
    return json.loads(json.dumps(values))


def require_same_values(own: Config, folder: RunFolder) -> None:
    """Raises `RunError` where a job's record is of other values than the search now proposes for it."""
    path = folder.file("config.yaml")
    if not storage.exists(path):  # it failed before it began
        return
    earlier = _config_of(folder)
    if identity(earlier) != identity(own):
        raise RunError(
            f"{folder.path} was trained with other values than this search proposes for it: "
            f"{differences(earlier, own)}; go on with the version of Optuna that proposed them, or start again with "
            f"--fresh (the old one is set aside)"
        )
