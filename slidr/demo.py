"""The demo: the main job from nothing to a distilled student, on the built-in synthetic world.

Every stage leaves its result on disk and is skipped when that is there already.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from slidr.config import Config, fingerprint
from slidr.data import storage
from slidr.data.frames import FrameTable
from slidr.stages import console, make_frames, make_superpixels, make_world, run_pretraining
from slidr.training.runs import folder_of

_STAGES = 4


def run_demo(config: Config) -> dict[str, Any]:
    """Makes the world, the frame table, the superpixels and the student; returns what it measured.

    The same is written to `results.json` in the run's folder. Run again, it does only what is missing.
    """
    results = storage.join(folder_of(config).path, "results.json")
    seconds: dict[str, float] = {}

    started = _announce(1, "a synthetic street world, as a nuScenes dataroot")
    world = make_world(config.data.root, config.world, workers=os.cpu_count() or 1)
    seconds["world"] = time.time() - started

    started = _announce(2, "the frame table")
    if _table_is_current(config):
        console.print(f"frames: {config.data.frames} is there already, skipped")
    else:
        make_frames(config)
        _table_stamp(config).write_text(fingerprint(config.world))
    seconds["frames"] = time.time() - started

    started = _announce(3, "superpixels of every image, on Ray Data")
    report = make_superpixels(config)
    seconds["superpixels"] = time.time() - started

    started = _announce(4, "distillation of image features into a lidar network, on Ray Train")
    if folder_of(config).result() is not None:
        console.print("pretraining: finished already, skipped")
    result = run_pretraining(replace(config, run=replace(config.run, resume=True)))
    seconds["pretrain"] = time.time() - started

    outcome = {
        "retrieval": result["retrieval"],
        "retrieval_untrained": result["retrieval_untrained"],
        "val_loss": result["val_loss"],
        "steps": result["steps"],
        "frames": len(FrameTable.open(config.data.frames)),
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
        f"picture     {result['picture']}\n"
        f"curves      {sys.argv[0]} ui {sys.argv[2] if len(sys.argv) > 2 else 'configs/demo.yaml'}\n"
        f"next        docs/first-run.md: the same on a real nuScenes keyframe, then on all of nuScenes"
    )
    return outcome


def _announce(number: int, what: str) -> float:
    console.rule(f"[bold]{number}/{_STAGES}[/bold] {what}", align="left")
    return time.time()


def _table_stamp(config: Config) -> Path:
    return Path(config.data.frames + ".world")


def _table_is_current(config: Config) -> bool:
    stamp = _table_stamp(config)
    made_from = stamp.read_text() if stamp.exists() else None
    return Path(config.data.frames).exists() and made_from == fingerprint(config.world)
