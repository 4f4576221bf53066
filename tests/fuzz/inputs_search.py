"""Inputs of a search, of a plan and of the demo: records that one process writes and a later one reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from slidr import demo
from slidr.cluster.search_records import claim_search
from slidr.cluster.tune import _pictures
from slidr.config import WorldConfig, fingerprint
from slidr.data.synthetic import write_dataroot
from slidr.planning.costs import Costs, UnitCost, read_costs, write_costs
from slidr.training.runs import RunFolder
from slidr.tuning.jobs import End, Group, Job, job_config, read_end, write_end

from . import trees
from .harness import Input
from .inputs_run import BASE, own
from .inputs_tables import make_table
from .shared import json_says, keeping, numbers_are_sane, put, shape, write_unrendered

# ---------------------------------------------------------------------------------------------- a search


def make_end(variant: int) -> None:
    curve = ((1.0, 0.25), (2.0, 0.5 + 0.1 * variant))
    write_end(RunFolder("run"), End("finished", 0.5 + 0.1 * variant, None, curve, 4, 12.5))


def end_says(value: Any) -> bool:
    """Whether a record has the undamaged one's types; keys may be absent, as in records of earlier versions."""
    raw, known = json.loads(Path("run/end.json").read_bytes()), json.loads(Path("intact").read_bytes())
    return numbers_are_sane(raw) and all(shape(raw[key]) == shape(known[key]) for key in raw)


TAGS = {"dataset_fingerprint": "ab" * 32, "split_manifest_sha256": "cd" * 32}


def make_search(variant: int) -> None:
    claim_search(own(variant), TAGS)
    put("run/100pct/random/trial-000/end.json", b"{}")


def searched() -> Any:
    claim_search(own(0), TAGS)
    return json.loads(Path("run/search.json").read_bytes())


FINAL = Job(Group(1.0, "random"), "final", 0, {"lr": 0.01}, winner=0)


def make_evaluation(variant: int) -> None:
    config = job_config(BASE, FINAL)
    folder = f"{config.run.folder}/{config.run.name}"
    confusion = np.random.default_rng(variant).integers(0, 9, (17, 17)).tolist()
    scores = {"miou": 0.5, "miou_interval_95": [0.4, 0.6], "frames": 2, "confusion": confusion}
    put(f"{folder}/evaluation.json", json.dumps(scores, indent=2).encode())
    put(f"{folder}/course.png", b"drawn already")


def pictures() -> Any:
    config = job_config(BASE, FINAL)
    files = _pictures(BASE, FINAL)
    picture = Path(config.run.folder, config.run.name, "confusion.png")
    return files, picture.read_bytes() if picture.exists() else None


def no_picture(value: Any) -> bool:
    """Whether the search goes on without a picture of counts that cannot be read."""
    files, picture = value
    return picture is None and not any(name.endswith("confusion.png") for name in files)


def pictures_say(value: Any) -> bool:
    config = job_config(BASE, FINAL)
    scores = json.loads(Path(config.run.folder, config.run.name, "evaluation.json").read_bytes())
    counts = np.array(scores["confusion"])
    return counts.shape == (17, 17) and bool((counts >= 0).all()) and counts.max() < 2**53


# ---------------------------------------------------------------------------------------------- costs and the demo


def make_costs(variant: int) -> None:
    entries = [
        UnitCost("slic", 0.5 + variant, {"pixels": 90000, "segments": 150}, "a machine", "2026-11-27", "slidr plan"),
        UnitCost("sample", 0.25, {"job": "pretrain", "pixels": 90000}, "a machine", "2026-11-27", "slidr plan"),
        UnitCost("superpixel_job", 0.002, {}, "a machine", "2026-11-27", "slidr plan"),
    ]
    write_costs("costs.json", Costs(entries))


def costs_say(value: Any) -> bool:
    """Whether a file is a list of entries with the undamaged ones' keys and types; it may be empty."""
    entries, known = json.loads(Path("costs.json").read_bytes()), json.loads(Path("intact").read_bytes())
    shapes = {shape(entry) for entry in known}
    return all(shape(entry) in shapes for entry in entries) and numbers_are_sane(entries)


def used_costs() -> Any:
    """The costs of a file, and what a plan finds among them."""
    costs = read_costs("costs.json")
    found = costs.nearest("slic", pixels=100000, segments=150), costs.nearest("sample", pixels=9, job="pretrain")
    return list(costs), found, costs.find("superpixel_job")


WORLD: dict[str, Any] = {"splits": {"mini_train": 1}, "keyframes": 1, "scale": 0.02, "version": "v1.0-mini"}
MARK = "root/synthetic/scene-0061_0000.json"


@cache
def made_world(variant: int) -> Path:
    root = Path(tempfile.mkdtemp(dir=Path.cwd().parent)) / "root"
    return write_dataroot(root, **WORLD, seed=0) if variant == 0 else write_unrendered(root, **WORLD, seed=variant)


def make_world(variant: int) -> None:
    shutil.copytree(made_world(variant), "root")


def completed() -> Any:
    """The world completed: all its files are there, so only its tables are written again."""
    write_dataroot("root", **WORLD, seed=0)
    return {path.name: path.read_bytes() for path in sorted(Path("root/v1.0-mini").glob("*.json"))}


def mark_says(value: Any) -> bool:
    """Whether a mark counts the points of objects: which ones, nothing else knows."""
    counts = json.loads(Path(MARK).read_bytes())["points_per_object"]
    known = json.loads(Path("intact").read_bytes())["points_per_object"]
    most = max(map(int, known))
    return all(type(points) is int and points > 0 and 0 <= int(key) <= most + 99 for key, points in counts.items())


DEMO = replace(BASE, world=WorldConfig(scale=0.1))


def make_stamp(variant: int) -> None:
    make_table(0)
    put("frames.parquet.world", fingerprint(replace(DEMO.world, seed=variant)).encode())


INPUTS = (
    Input(
        "end.json",
        keeping("run/end.json", make_end),
        "run/end.json",
        lambda: read_end(RunFolder("run")),
        trees.JSON,
        end_says,
    ),
    Input(
        "search.json",
        keeping("run/search.json", make_search),
        "run/search.json",
        searched,
        trees.JSON,
        json_says("run/search.json"),
        also=("./run holds a search with other values", "./run/search.json"),
    ),
    Input(
        "evaluation.json",
        make_evaluation,
        "run/100pct/random/final-of-000-000/evaluation.json",
        pictures,
        trees.JSON,
        pictures_say,
        no_picture,
    ),
    Input("costs.json", keeping("costs.json", make_costs), "costs.json", used_costs, trees.JSON, costs_say),
    Input("world.json", make_world, "root/parameters.json", completed, trees.JSON),
    Input("mark of a keyframe", keeping(MARK, make_world), MARK, completed, trees.JSON, mark_says, slow=True),
    Input(
        "stamp of the demo's table",
        make_stamp,
        "frames.parquet.world",
        lambda: demo._table_is_current(DEMO),
        instead=lambda value: value is False,
    ),
)
