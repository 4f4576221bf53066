"""Pictures of a search: mIoU against learning rate, mIoU against fraction, a confusion matrix, a training's curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

_COLOURS = {"pretrained": "#4477aa", "random": "#cc6677"}
_SHARE_OF_EMPTY_AXIS = 0.03


def rates_chart(rows: Sequence[Mapping[str, Any]], split: str) -> bytes:
    """A PNG: every trial's mIoU on `split` against its learning rate, one panel a fraction.

    Pruned trials are hollow, at the score they were pruned with; failed ones, which have none, are crosses at the foot.
    The best finished one of each method is ringed.
    """
    trials = [row for row in rows if row["kind"] == "trial"]
    fractions = sorted({row["fraction"] for row in trials})
    figure = Figure(dpi=130, figsize=(1 + 3.2 * len(fractions), 3.6), layout="constrained")
    panels = figure.subplots(1, len(fractions), sharey=True, squeeze=False)[0]
    for axes, fraction in zip(panels, fractions, strict=True):
        for method, colour in _COLOURS.items():
            _trials(axes, [r for r in trials if (r["fraction"], r["method"]) == (fraction, method)], method, colour)
        _log_axis(axes)
        axes.set_xlabel("learning rate")
        axes.set_title(f"{100 * fraction:g} % of the labels", fontsize=9)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"mIoU on {split}, %")
    panels[-1].legend(fontsize=7)
    return _png(figure)


def fractions_chart(entries: Sequence[Mapping[str, Any]], split: str) -> bytes:
    """A PNG: each method's mean mIoU on `split` against the label fraction, with its interval and every seed."""
    figure = Figure(dpi=130, figsize=(5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for method, colour in _COLOURS.items():
        own = sorted(
            (entry for entry in entries if entry["method"] == method and entry["mean"] is not None),
            key=lambda entry: entry["fraction"],
        )
        if not own:
            continue
        places = [100 * entry["fraction"] for entry in own]
        halves = [100 * (entry["half_width_95"] or 0.0) for entry in own]  # 0: hidden behind its marker
        axes.errorbar(
            places, [100 * e["mean"] for e in own], yerr=halves, color=colour, marker="o", capsize=3, label=method
        )
        for place, entry in zip(places, own, strict=True):
            scores = entry["scores"]
            axes.plot([place] * len(scores), [100 * s for s in scores], ".", color=colour, alpha=0.4)
    _log_axis(axes)
    axes.set_xlabel("labels used, %")
    axes.set_ylabel(f"mIoU on {split}, %")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
    return _png(figure)


def _log_axis(axes: Any) -> None:
    """Labels 1, 2 and 5 of each decade as plain numbers: matplotlib's own overlap within a decade or two."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="x", labelsize=7)


def confusion_chart(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> bytes:
    """A PNG of a confusion matrix (truth by prediction), each row as shares of its class; class 0 is left out."""
    matrix = np.asarray(counts, np.float64)[1:, 1:]
    names = list(classes)[1:]
    total = matrix.sum(1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros_like(matrix), where=total > 0)
    figure = Figure(dpi=130, figsize=(6.5, 6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    axes.set_title(title, fontsize=10, loc="left")
    figure.colorbar(image, label="% of the labelled class's points", shrink=0.8)
    return _png(figure)


def course_chart(journal: Mapping[int, Mapping[str, float]], title: str) -> bytes:
    """A PNG of a training: its loss and learning rate by step."""
    figure = Figure(dpi=130, figsize=(5.5, 3), layout="constrained")
    axes = figure.add_subplot()
    other = axes.twinx()
    for panel, name, colour in ((axes, "loss", "#4477aa"), (other, "lr", "#999933")):
        points = [(step, metrics[name]) for step, metrics in sorted(journal.items()) if name in metrics]
        panel.plot([step for step, _ in points], [value for _, value in points], color=colour)
        panel.set_ylabel({"loss": "loss", "lr": "learning rate"}[name], color=colour)
    axes.set_xlabel("step")
    axes.set_title(title, fontsize=10, loc="left")
    return _png(figure)


def _trials(axes: Any, rows: Sequence[Mapping[str, Any]], method: str, colour: str) -> None:
    def points(status: str) -> tuple[list[float], list[float]]:
        own = [row for row in rows if row["status"] == status]
        return [row["lr"] for row in own], [100 * (row["score"] or 0.0) for row in own]

    finished = [row for row in rows if row["status"] == "finished"]
    axes.plot(*points("finished"), "o", color=colour, label=method)
    if points("pruned")[0]:
        axes.plot(*points("pruned"), "o", color=colour, fillstyle="none", alpha=0.7, label=f"{method}, pruned")
    if points("failed")[0]:
        lrs = points("failed")[0]
        feet = axes.get_xaxis_transform()  # x in data, y in shares of the panel
        axes.plot(lrs, [_SHARE_OF_EMPTY_AXIS] * len(lrs), "x", color=colour, transform=feet, label=f"{method}, failed")
    if finished:
        best = max(finished, key=lambda row: (row["score"], -row["index"]))
        axes.plot([best["lr"]], [100 * best["score"]], "o", color=colour, fillstyle="none", markersize=12)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    FigureCanvasAgg(figure).print_png(data)
    return data.getvalue()
