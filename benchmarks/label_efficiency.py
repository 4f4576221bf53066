"""What pretraining is worth with few labels: linear probe and one-scene fine-tuning on held-out synthetic scenes.

    python benchmarks/label_efficiency.py [--seeds 0 1 2] [--pretraining 400] [--short 150] [--long 300]

Three arms: a student taught by the ImageNet teacher, random initialisation, and, for the probe alone, a student taught
by the same network with random weights (what the contrast alone is worth). Every seed has a world, a labelled scene, a
pretraining and fine-tunings of its own. The learning rate of every arm and task is chosen on the `verify` scenes (the
longer fine-tuning takes the shorter one's); the table is of the `val` scenes, which nothing else looks at. Everything
trains in this process. Finished runs are kept under --work, so the command can be interrupted.

Prints the table and writes results/label_efficiency.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from slidr import stages
from slidr.cluster.pretrain import pretrain
from slidr.config import Config, WorldConfig, load
from slidr.label_efficiency import Protocol, gain, judged

ARMS = {"ImageNet teacher": "imagenet", "no pretraining": "", "random teacher": None}
WORLD = WorldConfig(parametrize=8, verify=2, val=4, keyframes=8, scale=0.25)
BASELINE, CONTROL = "no pretraining", "random teacher"


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    protocols = (
        Protocol(f"linear probe, all labels, {arguments.probe} steps", arguments.probe, (0.02, 0.06), True),
        Protocol(f"1 scene, {arguments.short} steps", arguments.short, (0.006, 0.02), False),
        Protocol(f"1 scene, {arguments.long} steps", arguments.long, (), False),
    )
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        base = prepare(arguments, seed)
        for arm, teacher in ARMS.items():
            student = None if arm == BASELINE else pretrained(base, arm, teacher, arguments.pretraining)
            for protocol in protocols:
                if arm == CONTROL and not protocol.probe:
                    continue
                rates = protocol.rates or (runs[-1]["lr"],)
                row = judged(base, arm, student, replace(protocol, rates=rates))
                runs.append({"seed": seed, "arm": arm, "protocol": protocol.name, **row})
                print(f"seed {seed}  {protocol.name}  {arm}: {row['miou']:.1f} mIoU at lr {row['lr']}", flush=True)
    summary = [summarised(runs, protocol) for protocol in protocols]
    print(table(summary))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "benchmark": "label_efficiency",
        "on": f"{platform.machine()} CPU",
        "torch": torch.__version__,
        **{name: value for name, value in vars(arguments).items() if name not in ("out", "work", "config")},
        "protocols": [asdict(protocol) for protocol in protocols],
        "summary": summary,
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {arguments.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", help="student, teacher and optimizer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining", type=int, default=400, help="steps")
    parser.add_argument("--probe", type=int, default=200, help="steps")
    parser.add_argument("--short", type=int, default=150, help="steps of one-scene fine-tuning")
    parser.add_argument("--long", type=int, default=300, help="steps of longer one-scene fine-tuning")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("data/label_efficiency"), help="worlds and runs")
    parser.add_argument("--out", type=Path, default=Path("results/label_efficiency.json"))
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, seed: int) -> Config:
    """A seed's world, frame table and superpixels; returns the config that its runs start from."""
    config = load(arguments.config)
    folder = arguments.work / f"seed-{seed}"
    config = replace(
        config,
        data=replace(config.data, root=str(folder / "nuscenes"), frames=str(folder / "frames.parquet")),
        superpixels=replace(config.superpixels, folder=str(folder / "superpixels")),
        world=replace(WORLD, seed=seed),
        run=replace(config.run, folder=str(folder / "runs"), seed=seed, resume=True),
        cluster=replace(config.cluster, num_workers=0),
    )
    stages.make_world(config.data.root, config.world, workers=arguments.threads)
    if not Path(config.data.frames).exists():
        stages.make_frames(config)
    stages.make_superpixels(config)
    return config


def pretrained(base: Config, arm: str, teacher: str | None, steps: int) -> str:
    """Distils a student; returns its file."""
    config = replace(
        base,
        teacher=replace(base.teacher, weights=teacher),
        optim=replace(base.optim, epochs=epochs(base, steps), max_steps=steps),
        run=replace(base.run, name=f"pretrain-{arm.replace(' ', '-')}-{steps}"),
    )
    return pretrain(config)["student"]


def epochs(base: Config, steps: int) -> int:
    """As many epochs as hold the steps."""
    return math.ceil(steps / (base.world.parametrize * base.world.keyframes // base.optim.batch_size))


def summarised(runs: list[dict[str, Any]], protocol: Protocol) -> dict[str, Any]:
    """Every arm's scores over the seeds, and its gain over random initialisation, seed by seed."""
    by_arm = {
        arm: [run["miou"] for run in runs if (run["arm"], run["protocol"]) == (arm, protocol.name)] for arm in ARMS
    }
    rows = {
        arm: {"miou": values, "mean": statistics.mean(values), **gain(values, by_arm[BASELINE])}
        for arm, values in by_arm.items()
        if values
    }
    control = {"over_random_teacher": gain(by_arm["ImageNet teacher"], by_arm[CONTROL])} if by_arm[CONTROL] else {}
    return {"protocol": protocol.name, "arms": rows, **control}


def table(summary: list[dict[str, Any]]) -> str:
    lines = [
        "| mIoU on held-out scenes | arm | each seed | mean | gain over no pretraining |",
        "|---|---|---|---:|---:|",
    ]
    for entry in summary:
        for arm, row in entry["arms"].items():
            each = " / ".join(f"{value:.1f}" for value in row["miou"])
            width = row["half_width_95"]
            more = f"{row['mean_gain']:+.1f}" + ("" if width is None else f" ± {width:.1f}")
            more = "" if arm == BASELINE else more
            lines.append(f"| {entry['protocol']} | {arm} | {each} | {row['mean']:.1f} | {more} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
