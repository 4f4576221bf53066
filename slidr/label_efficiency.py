"""What pretraining is worth with few labels: a linear probe and one-scene fine-tuning, on scenes held out of both.

The demo's last stage and `benchmarks/label_efficiency.py` judge students by the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slidr.cluster.evaluate import evaluate
from slidr.cluster.finetune import finetune
from slidr.config import Config, EvaluationConfig, LossConfig, SplitName
from slidr.data.labels import CLASSES
from slidr.data.loading import subset_frames
from slidr.tuning.table import interval


@dataclass(frozen=True)
class Rates:
    """Peak learning rates: of the last layer, which is always new, and of those before it, which a probe freezes."""

    backbone: float
    head: float

    def __str__(self) -> str:
        return f"{self.head:g}" if self.backbone == self.head else f"{self.backbone:g}, last layer {self.head:g}"


def alike(*rates: float) -> tuple[Rates, ...]:
    """Each rate for all layers."""
    return tuple(Rates(rate, rate) for rate in rates)


@dataclass(frozen=True)
class Protocol:
    """A way to judge a student: which layers and labels train, for how many steps, at which rates."""

    name: str
    steps: int
    rates: tuple[Rates, ...]  # the best ones on `verify` are taken
    probe: bool  # true: the last layer alone, with every label; false: all layers, with one scene's labels


def judged(base: Config, arm: str, student: str | None, protocol: Protocol, progress: bool = False) -> dict[str, Any]:
    """The scores on `val` of a student (None: random weights) after the protocol, at the rates best on `verify`.

    Nothing but the last scoring looks at `val`. "verify" holds the mIoU of all rates, best first; a single offer is not
    scored. The runs' folders, in `base.run.folder`, are named by `arm`, protocol and rates; finished ones are not
    repeated.
    """
    trained: dict[Rates, tuple[Config, str]] = {}
    for rates in protocol.rates:
        config = downstream_config(base, arm, student, protocol, rates)
        trained[rates] = config, finetune(config, progress)["student"]
    verify = {rates: _scores(*run, "verify")["miou"] for rates, run in trained.items() if len(trained) > 1}
    ranked = sorted(verify, key=lambda rates: verify[rates], reverse=True)
    best = ranked[0] if ranked else protocol.rates[0]
    scores = _scores(*trained[best], "val")
    return {
        "rates": best,
        "miou": 100 * scores["miou"],
        "interval_95_over_frames": _percent(scores["miou_interval_95"]),
        "absent": scores["absent"],
        "verify": [(rates, 100 * verify[rates]) for rates in ranked],
    }


def downstream_config(base: Config, arm: str, student: str | None, protocol: Protocol, rates: Rates) -> Config:
    """The config of one fine-tuning or probe, in the calling process; `base` pretrains on the same frames."""
    scenes = len(subset_frames(base, "train").scenes)
    labelled = scenes if protocol.probe else 1
    frames = len(subset_frames(base, "train")) * labelled // scenes
    kind = "probe" if protocol.probe else "scene"
    name = f"{kind}-{arm.replace(' ', '-')}-{protocol.steps}-{rates.backbone:g}-{rates.head:g}"
    return replace(
        base,
        data=replace(base.data, train_fraction=labelled / scenes, max_val_frames=1),
        student=replace(
            base.student, weights=student, out_channels=len(CLASSES[base.data.dataset]), freeze=protocol.probe
        ),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=replace(
            base.optim,
            lr=rates.backbone,
            head_lr=rates.head,
            epochs=math.ceil(protocol.steps / max(1, frames // base.optim.batch_size)),
            max_steps=protocol.steps,
        ),
        run=replace(base.run, name=name, keep_checkpoints=1, resume=True),
        cluster=replace(base.cluster, num_workers=0),
    )


def gain(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Mean over the seeds of paired differences, and the half width of its 95 % interval (None for a single seed)."""
    gains = [value - own for value, own in zip(values, baseline, strict=True)]
    mean, half = interval(gains)
    return {"gain": gains, "mean_gain": mean, "half_width_95": half}


def _percent(interval: Sequence[float] | None) -> list[float] | None:
    """None stays None: too few frames make no interval."""
    return None if interval is None else [100 * bound for bound in interval]


def _scores(config: Config, student: str, split: SplitName) -> dict[str, Any]:
    wanted = EvaluationConfig(checkpoint=student, split=split)
    return evaluate(replace(config, evaluation=wanted))["evaluation"]
