"""Segmentation scores from counts, as JSON, as a markdown page and as a bar chart."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from slidr.metrics import LEAST_FRAMES, ConfusionMatrix, bootstrap_interval
from slidr.shapes import Int64

Scores = dict[str, Any]


def scores_of(
    frames: Int64[np.ndarray, "F K K"],
    bands: dict[str, Int64[np.ndarray, "K K"]],
    classes: Sequence[str],
    seed: int = 0,
    draws: int = 1000,
) -> Scores:
    """All scores of counts (truth, prediction) per frame and per band of distance, as plain values for JSON.

    Classes in neither truth nor prediction have no IoU (null), are left out of the mean, and listed. The interval
    of mIoU is a 95 % percentile bootstrap over frames; frames of one scene resemble each other, so over scenes it
    would be wider. Fewer than `LEAST_FRAMES` frames with labelled points make none (null), and "why_no_interval" says
    so.
    """
    counted = int((frames.sum((1, 2)) > 0).sum())
    few = counted < LEAST_FRAMES
    why = f"{counted} frames with labelled points; an interval takes at least {LEAST_FRAMES}" if few else None
    return {
        **_summary(frames.sum(0), classes),
        "miou_interval_95": None if few else [_plain(v) for v in bootstrap_interval(frames, seed, draws=draws)],
        "why_no_interval": why,
        "frames": len(frames),
        "confusion": frames.sum(0).tolist(),  # points by (truth, prediction), class 0 the ignored one
        "by_distance": {name: _summary(counts, classes) for name, counts in bands.items()},
    }


def markdown(scores: Scores, title: str) -> str:
    """The scores as a page: the summary, then every class, overall and by distance."""
    bands: dict[str, Scores] = scores["by_distance"]
    lines = [
        f"# {title}",
        "",
        "| score | all | " + " | ".join(bands) + " |",
        "|---|---:|" + "---:|" * len(bands),
        *(
            f"| {label} | {_percent(scores[key])} | " + " | ".join(_percent(b[key]) for b in bands.values()) + " |"
            for key, label in (
                ("miou", "mIoU"),
                ("fwiou", "frequency-weighted IoU"),
                ("accuracy", "accuracy"),
            )
        ),
        f"| labelled points | {scores['points']:,} | " + " | ".join(f"{b['points']:,}" for b in bands.values()) + " |",
        "",
        _interval(scores),
        f"In neither truth nor prediction, and left out of the mean: {', '.join(scores['absent']) or 'no class'}.",
        "",
        "| IoU | all | " + " | ".join(bands) + " |",
        "|---|---:|" + "---:|" * len(bands),
        *(
            f"| {name} | {_percent(value)} | " + " | ".join(_percent(b["iou"][name]) for b in bands.values()) + " |"
            for name, value in scores["iou"].items()
        ),
        "",
    ]
    return "\n".join(lines)


def bar_chart(scores: Scores, title: str) -> bytes:
    """A PNG: the IoU of every class, best first, and the mean with its interval."""
    present = {name: value for name, value in scores["iou"].items() if value is not None}
    names = sorted(present, key=lambda name: present[name])
    figure = Figure(dpi=130, figsize=(7, 1.2 + 0.28 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(names, [100 * present[name] for name in names], color="#4477aa")
    for row, name in enumerate(names):
        axes.text(100 * present[name] + 1, row, f"{100 * present[name]:.1f}", va="center", fontsize=8)
    if scores["miou"] is not None:
        label = f"mIoU {100 * scores['miou']:.1f}"
        if scores["miou_interval_95"] is not None:
            low, high = scores["miou_interval_95"]
            label += f", 95 % within {100 * low:.1f} to {100 * high:.1f}"
            axes.axvspan(100 * low, 100 * high, color="#cc6677", alpha=0.25, linewidth=0)
        axes.axvline(100 * scores["miou"], color="#cc6677", label=label)
        axes.legend(loc="lower right", fontsize=8)
    axes.set_xlim(0, 108)
    axes.set_xlabel("IoU, %")
    axes.set_title(title, fontsize=10, loc="left")
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()


def _interval(scores: Scores) -> str:
    if scores["miou_interval_95"] is None:
        return f"mIoU has no interval here: {scores['why_no_interval']}."
    low, high = scores["miou_interval_95"]
    return f"mIoU lies within {_percent(low)} and {_percent(high)} (95 % bootstrap over {scores['frames']:,} frames)."


def _summary(counts: Int64[np.ndarray, "K K"], classes: Sequence[str]) -> Scores:
    """The scores of one confusion matrix; class 0 is the ignored one."""
    confusion = ConfusionMatrix(len(classes))
    confusion.counts += torch.from_numpy(counts)
    iou = confusion.iou().tolist()
    return {
        "miou": _plain(confusion.miou()),
        "fwiou": _plain(confusion.frequency_weighted_iou()),
        "accuracy": _plain(confusion.accuracy()),
        "points": int(counts.sum()),
        "iou": {name: _plain(value) for name, value in zip(classes[1:], iou[1:], strict=True)},
        "absent": [classes[index] for index in confusion.absent()],
    }


def _plain(value: float) -> float | None:
    """JSON has no nan."""
    return None if math.isnan(value) else float(value)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
