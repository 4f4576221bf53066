"""What pretraining is worth with few labels: linear probe and one-scene fine-tuning on held-out synthetic scenes.

    python benchmarks/label_efficiency.py [--seeds 0 1 2] [--pretraining 800] [--short 150] [--long 300]

Three arms: a student taught by the ImageNet teacher, random initialisation, and, for the probe alone, a student
taught by the same network with random weights (what the contrast alone is worth). Every seed has a world, a labelled
scene, a pretraining and fine-tunings of its own. Every arm is offered the same learning rates; which of them it gets
is chosen on the `verify` scenes, for the probe and for the short budget, whose choice the longer budget takes over. The
table is of the `val` scenes, which nothing else looks at. Everything trains in this process. Finished runs are kept
under --work, so the command can be interrupted, or run once for each seed and then for all of them.

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
from slidr.cluster import session
from slidr.cluster.pretrain import pretrain
from slidr.config import Config, WorldConfig, load
from slidr.label_efficiency import Protocol, Rates, alike, gain, judged

ARMS = {"ImageNet teacher": "imagenet", "no pretraining": "", "random teacher": None}
WORLD = WorldConfig(parametrize=8, verify=4, val=4, keyframes=8, scale=0.25)
TAUGHT, BASELINE, CONTROL = ARMS
PROBE_RATES = alike(0.02, 0.06, 0.2)
# One rate for all layers, or a last layer that learns thirty or ten times as fast as those below it.
SCENE_RATES = (*alike(0.006, 0.02, 0.06), Rates(0.002, 0.06), Rates(0.006, 0.06))


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    probe = Protocol(f"linear probe, all labels, {arguments.probe} steps", arguments.probe, PROBE_RATES, True)
    short = Protocol(f"1 scene, {arguments.short} steps", arguments.short, SCENE_RATES, False)
    long = Protocol(f"1 scene, {arguments.long} steps", arguments.long, SCENE_RATES, False)
    protocols = (probe, short, long)
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        base = prepare(arguments, seed)
        for arm, teacher in ARMS.items():
            student = None if arm == BASELINE else pretrained(base, arm, teacher, arguments.pretraining)
            rows = {probe.name: judged(base, arm, student, probe)}
            if arm != CONTROL:
                rows[short.name] = judged(base, arm, student, short)
                chosen = rows[short.name]["rates"]
                rows[long.name] = judged(base, arm, student, replace(long, rates=(chosen,)))
            for name, row in rows.items():
                runs.append({"seed": seed, "arm": arm, "protocol": name, **row})
                print(f"seed {seed}  {name}  {arm}: {row['miou']:.1f} mIoU at rate {row['rates']}", flush=True)
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
    arguments.out.write_text(json.dumps(report, indent=2, default=asdict) + "\n")
    print(f"written to {arguments.out}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", help="student, teacher and optimizer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretraining", type=int, default=800, help="steps")
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
    session.stop()  # idle, it takes 8 % of a core
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
    """Every arm's scores and rates over the seeds, and its gain over random initialisation, seed by seed."""
    by_arm = {arm: [run for run in runs if (run["arm"], run["protocol"]) == (arm, protocol.name)] for arm in ARMS}
    miou = {arm: [run["miou"] for run in chosen] for arm, chosen in by_arm.items() if chosen}
    rows = {
        arm: {
            "miou": values,
            "rates": [run["rates"] for run in by_arm[arm]],
            "mean": statistics.mean(values),
            **gain(values, miou[BASELINE]),
        }
        for arm, values in miou.items()
    }
    control = {"over_random_teacher": gain(miou[TAUGHT], miou[CONTROL])} if CONTROL in miou else {}
    return {"protocol": protocol.name, "arms": rows, **control}


def table(summary: list[dict[str, Any]]) -> str:
    lines = [
        "| mIoU on held-out scenes | arm | rate of each seed | each seed | mean | gain over no pretraining |",
        "|---|---|---|---|---:|---:|",
    ]
    for entry in summary:
        for arm, row in entry["arms"].items():
            rates = " / ".join(str(rates) for rates in row["rates"])
            each = " / ".join(f"{value:.1f}" for value in row["miou"])
            more = "" if arm == BASELINE else shown(row)
            lines.append(f"| {entry['protocol']} | {arm} | {rates} | {each} | {row['mean']:.1f} | {more} |")
    for entry in summary:
        if "over_random_teacher" in entry:
            lines.append(f"\n{entry['protocol']}: {TAUGHT} over {CONTROL} {shown(entry['over_random_teacher'])}")
    return "\n".join(lines)


def shown(paired: dict[str, Any]) -> str:
    """A gain with half its interval, and seed by seed."""
    width = "" if paired["half_width_95"] is None else f" ± {paired['half_width_95']:.1f}"
    return f"{paired['mean_gain']:+.1f}{width} ({' / '.join(f'{gain:+.1f}' for gain in paired['gain'])})"


if __name__ == "__main__":
    main()
