"""The demo: the main job from nothing to a distilled student, on the built-in synthetic world.

Every stage leaves its result on disk and is skipped when that is there already.
"""

from __future__ import annotations

import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from slidr.cluster.superpixels import SuperpixelReport
from slidr.config import Config, TrackingConfig, fingerprint
from slidr.data import storage
from slidr.data.frames import open_table
from slidr.data.storage import DataError
from slidr.label_efficiency import Protocol, alike, judged
from slidr.stages import console, make_frames, make_superpixels, make_world, run_pretraining
from slidr.tracking import tracking_uri
from slidr.training.runs import folder_of

_STAGES = 5
_ARMS = ("pretrained", "random init")


def run_demo(config: Config) -> dict[str, Any]:
    """Makes the world, the frame table, the superpixels and the student; returns what it measured.

    The same is written to `results.json` in the run's folder. Run again, it does only what is missing.
    """
    results = storage.join(folder_of(config).path, "results.json")
    world, report, seconds = make_data(config)

    started = _announce(4, "distillation of image features into a lidar network, on Ray Train")
    if folder_of(config).result() is not None:
        console.print("pretraining: finished already, skipped")
    result = run_pretraining(replace(config, run=replace(config.run, resume=True)))
    seconds["pretrain"] = time.time() - started

    started = _announce(5, "what it is worth with few labels, on scenes that nothing has seen")
    worth = few_labels(config, result["student"])
    seconds["few_labels"] = time.time() - started

    outcome = {
        "retrieval": result["retrieval"],
        "retrieval_untrained": result["retrieval_untrained"],
        "val_loss": result["val_loss"],
        "steps": result["steps"],
        "few_labels": worth,
        "frames": len(open_table(config.data.frames, config.data.dataset)),
        "superpixel_maps": report.computed + report.skipped,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seed": config.run.seed,
        "world": str(world),
    }
    storage.write_bytes_atomic(results, json.dumps(outcome, indent=2).encode())
    console.rule(f"done in {sum(seconds.values()):.0f} s", align="left")
    console.print(
        f"scores      {results}\n"
        f"student     {result['student']}  (SLidR's published layout)\n"
        f"picture     {result.get('picture', 'could not be drawn')}\n"
        f"curves      {sys.argv[0]} ui {sys.argv[2] if len(sys.argv) > 2 else 'configs/demo.yaml'}\n"
        f"next        docs/first-run.md: the same on a real nuScenes keyframe, then on all of nuScenes"
    )
    return outcome


def make_data(config: Config) -> tuple[Path, SuperpixelReport, dict[str, float]]:
    """The demo's first three stages: its world, the frame table, the superpixels; and the seconds that each took."""
    seconds: dict[str, float] = {}

    started = _announce(1, "a synthetic street world, as a nuScenes dataroot")
    world = make_world(config.data.root, config.world, workers=os.cpu_count() or 1)
    seconds["world"] = time.time() - started

    started = _announce(2, "the frame table")
    if _table_is_current(config):
        console.print(f"frames: {config.data.frames} is there already, skipped")
    else:
        make_frames(config)
        storage.write_bytes_atomic(_table_stamp(config), fingerprint(config.world).encode())
    seconds["frames"] = time.time() - started

    started = _announce(3, "superpixels of every image, on Ray Data")
    report = make_superpixels(config)
    seconds["superpixels"] = time.time() - started
    return world, report, seconds


def few_labels(config: Config, student: str) -> list[dict[str, Any]]:
    """A linear probe and one-scene fine-tuning of the student and of random weights, with every seed of the config.

    One entry a protocol: mIoU in per cent on the `val` scenes of each arm and seed. Shows them as a table.
    """
    demo = config.demo
    protocols = (
        Protocol(f"linear probe, {demo.probe_steps} steps", demo.probe_steps, alike(demo.probe_lr), True),
        Protocol(
            f"fine-tuning on 1 scene, {demo.scene_steps} steps", demo.scene_steps, alike(demo.scene_lr), probe=False
        ),
    )
    jobs = [(protocol, arm, seed) for protocol in protocols for seed in demo.seeds for arm in _ARMS]
    scores: dict[tuple[Protocol, str, int], float] = {}
    at_once = min(os.cpu_count() or 1, len(jobs))
    with (
        Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True) as bar,
        # Small networks gain little from a second thread and much from a second process.
        ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool,
    ):
        task = bar.add_task("probes and fine-tunings", total=len(jobs))
        running = {pool.submit(_score, config, student if job[1] == _ARMS[0] else None, *job): job for job in jobs}
        for done in as_completed(running):
            job = running[done]
            scores[job] = done.result()
            bar.advance(task)
            if not console.is_terminal:
                console.print(f"{job[0].name}, {job[1]}, seed {job[2]}: {scores[job]:.1f} mIoU")
    rows: dict[str, dict[str, Any]] = {
        each.name: {
            "protocol": each.name,
            "steps": each.steps,
            **{arm: [scores[each, arm, seed] for seed in demo.seeds] for arm in _ARMS},
        }
        for each in protocols
    }
    table = Table("mIoU on held-out scenes", title_justify="left")
    for arm in _ARMS:
        table.add_column(arm, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(_mean_and_spread(row[arm]) for arm in _ARMS))
    console.print(table)
    return list(rows.values())


def _score(config: Config, student: str | None, protocol: Protocol, arm: str, seed: int) -> float:
    """mIoU in per cent of one probe or fine-tuning; runs in a process of its own."""
    torch.set_num_threads(1)
    folder = folder_of(config).file(f"few_labels/seed-{seed}")
    base = replace(config, run=replace(config.run, folder=folder, seed=seed), tracking=_tracking(config))
    return judged(base, arm, student, protocol)["miou"]


def _mean_and_spread(values: list[float]) -> str:
    """Mean ± half the range over the seeds; of a single seed, which has no range, the value alone."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{mean(values):.1f} ± {(max(values) - min(values)) / 2:.1f}"


def _tracking(config: Config) -> TrackingConfig:
    """The demo's own store, wherever its runs' folders lie."""
    return replace(config.tracking, uri=tracking_uri(config))


def _announce(number: int, what: str) -> float:
    console.rule(f"[bold]{number}/{_STAGES}[/bold] {what}", align="left")
    return time.time()


def _table_stamp(config: Config) -> Path:
    return Path(config.data.frames + ".world")


def _table_is_current(config: Config) -> bool:
    """Whether the frame table is of the world that the config describes; not so with a stamp that cannot be read."""
    try:
        made_from = storage.read_bytes(_table_stamp(config), storage.RECORD_BYTES)
    except DataError:
        return False
    return Path(config.data.frames).exists() and made_from == fingerprint(config.world).encode()
