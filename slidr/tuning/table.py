"""What a search found: the winners, one row a job, and the table of methods and fractions."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import t as student_t

from slidr.config import Config
from slidr.tuning.jobs import End, Group, Job, job_config

Ends = Mapping[Job, End]
Row = dict[str, Any]
LEVEL = 0.95


def groups_of(config: Config) -> list[Group]:
    """Every method at every fraction, in the config's order."""
    return [Group(fraction, method) for fraction in config.tune.fractions for method in config.tune.methods]


def winner(group: Group, ends: Ends) -> Job | None:
    """A group's finished trial of highest score, the first of equals; None where none finished."""
    finished = [
        (end.score, -job.index, job) for job, end in ends.items() if _is(job, group) and end.status == "finished"
    ]
    return max(finished, key=lambda entry: entry[:2])[2] if finished else None


def finals(config: Config, ends: Ends) -> list[Job]:
    """Each winner's retrainings. What they are follows from the trials alone."""
    winners = (winner(group, ends) for group in groups_of(config))
    return [
        Job(found.group, "final", index, found.values, winner=found.index)
        for found in winners
        if found is not None
        for index in range(config.tune.seeds)
    ]


def rows(config: Config, ends: Ends) -> list[Row]:
    """One plain row a job, sorted by fraction, method, kind (trials first) and number."""
    found = []
    for job, end in ends.items():
        own = job_config(config, job)
        found.append(
            {
                "fraction": job.group.fraction,
                "method": job.group.method,
                "kind": job.kind,
                "index": job.index,
                "round": job.round,
                "seed": own.run.seed,
                "status": end.status,
                "reason": end.reason,
                "score": end.score,
                "lr": own.optim.lr,
                "head_lr": own.optim.head_lr,
                "weight_decay": own.optim.weight_decay,
                "batch_size": own.optim.batch_size,
                "epochs": own.optim.epochs,
                "steps": end.steps,
                "seconds": end.seconds,
                "curve_epochs": [float(epoch) for epoch, _ in end.curve],
                "curve": [float(score) for _, score in end.curve],
            }
        )
    return sorted(found, key=lambda row: (row["fraction"], row["method"], row["kind"] == "final", row["index"]))


def table(config: Config, ends: Ends) -> list[Row]:
    """The published kind of table: for each method and fraction the mean mIoU of the finals, with its interval.

    The interval is Student's t over the seeds, 95 %: what another seed would change. It is null for a single seed.
    """
    return [_entry(config, group, ends) for group in groups_of(config)]


def _entry(config: Config, group: Group, ends: Ends) -> Row:
    trials = [end for job, end in ends.items() if _is(job, group)]
    best = winner(group, ends)
    counts = Counter(end.status for end in trials)
    last = [end for job, end in sorted(_finals(group, ends), key=lambda item: item[0].index)]
    scores = [end.score for end in last if end.score is not None]
    mean, half = interval(scores)
    return {
        "fraction": group.fraction,
        "method": group.method,
        "trials": {status: counts.get(status, 0) for status in ("finished", "pruned", "failed")},
        "winner": None if best is None else {"index": best.index, **best.values},
        "search_score": None if best is None else ends[best].score,
        "scores": scores,
        "failed_finals": [end.reason for end in last if end.status == "failed"],
        "mean": mean,
        "half_width_95": half,
        "why_empty": None if best is not None else reasons(trials),
    }


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and half width of its 95 % interval (Student's t); None where there are too few values."""
    if not values:
        return None, None
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return mean, None
    quantile = float(student_t.ppf((1 + LEVEL) / 2, count - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(count)


def reasons(ends: Iterable[End]) -> str:
    """Why jobs failed, the commonest reason first."""
    counts = Counter(end.reason for end in ends if end.status == "failed")
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3)) or "no trial ended"


def markdown(entries: Sequence[Row], config: Config) -> str:
    """The table as a page, and below it what was chosen."""
    tune, data = config.tune, config.data
    fractions = list(dict.fromkeys(entry["fraction"] for entry in entries))
    lines = [
        f"# {config.run.name}: mIoU on {tune.final_split}, %",
        "",
        "| method | " + " | ".join(f"{100 * fraction:g} % of labels" for fraction in fractions) + " |",
        "|---|" + "---:|" * len(fractions),
    ]
    for method in dict.fromkeys(entry["method"] for entry in entries):
        cells = [_cell(entry) for entry in entries if entry["method"] == method]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"{_spread(tune.seeds, tune.final_train_split)} Winners were chosen on {data.val_split}"
        f"{_part(data.max_val_frames)} after training on {data.train_split}; {tune.final_split} was read for this "
        f"table only.",
        "",
        f"| labels | method | chosen | mIoU on {data.val_split} | trials: finished, pruned, failed | each seed |",
        "|---|---|---|---:|---|---|",
    ]
    for entry in entries:
        chosen = "none" if entry["winner"] is None else _chosen(entry["winner"])
        counts = ", ".join(str(count) for count in entry["trials"].values())
        each = " / ".join(f"{100 * score:.1f}" for score in entry["scores"])
        lines.append(
            f"| {100 * entry['fraction']:g} % | {entry['method']} | {chosen} | {_percent(entry['search_score'])} "
            f"| {counts} | {each} |"
        )
    for entry in entries:
        where = f"{100 * entry['fraction']:g} %, {entry['method']}"
        if entry["why_empty"] is not None:
            lines += ["", f"{where}: no trial finished ({entry['why_empty']})."]
        for reason in entry["failed_finals"]:
            lines += ["", f"{where}: a final failed ({reason})."]
    return "\n".join(lines) + "\n"


def _spread(seeds: int, split: str) -> str:
    if seeds == 1:
        return f"One retraining of the winner on {split}; a single seed has no interval."
    return (
        f"Mean over {seeds} seeds of the winner retrained on {split}, ± half a 95 % interval (Student's t over the "
        f"seeds)."
    )


def _part(frames: int | None) -> str:
    return "" if frames is None else f" (at most {frames} frames of it)"


def _cell(entry: Row) -> str:
    if entry["mean"] is None:
        return "–"
    half = entry["half_width_95"]
    return f"{100 * entry['mean']:.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _chosen(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items() if name != "index") or "as configured"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _is(job: Job, group: Group) -> bool:
    return job.group == group and job.kind == "trial"


def _finals(group: Group, ends: Ends) -> list[tuple[Job, End]]:
    return [(job, end) for job, end in ends.items() if job.group == group and job.kind == "final"]
