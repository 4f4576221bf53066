"""The book of faults: what tests broke on purpose, whether that was survived, and what it cost.

A row of the table is a kind of fault. Its columns:

injected  how often it was made to happen
survived  how often the job went on, came to its good end, and left what the undisturbed job leaves
lost      what had been done and kept, and was not there afterwards or not as it should be: superpixels: label maps that
          are missing at the end or are not the undisturbed job's, byte for byte; training: steps that an intact
          checkpoint held and that were trained again; searches: trainings on record that were run again, steps of a
          trial that its checkpoint held and that were trained again. "?": a test failed before it could count
again     what was not kept yet and was done a second time, in the same units; docs/faults.md says what bounds it
seconds   from the fault until the job had done something that it had not done before the fault: median (least to most)

A fault that cannot be made to happen on this machine has a row, too, of the reason.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNITS = ("images", "steps")


@dataclass
class Entry:
    """One fault that happened. `at`: how far the job was; `before`: what the test saw then, to compare with later."""

    fault: str
    unit: str
    at: int = 0
    before: Any = None
    load: float = 0.0  # the machine's load average, over one minute
    seconds: float | None = None  # until it was recovered from
    lost: int | None = None
    again: int | None = None
    survived: bool = False


@dataclass
class FaultBook:
    """The entries of a test session."""

    entries: list[Entry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # fault -> why it could not be made to happen

    def skip(self, fault: str, reason: str) -> None:
        """A fault that this machine does not allow to happen."""
        self.skipped[fault] = " ".join(reason.split())

    def open(self, fault: str, unit: str) -> Entry:
        """A fault that happens now."""
        assert unit in UNITS
        self.entries.append(Entry(fault, unit, load=round(os.getloadavg()[0], 1)))
        return self.entries[-1]

    def close(self, entries: Sequence[Entry]) -> None:
        """The last call of a test in which the faults were survived: all that it had to compare was the same."""
        for entry in entries:
            assert entry.seconds is not None, f"{entry.fault}: nobody saw it recover"
            assert entry.lost == 0, f"{entry.fault}: {entry.lost} {entry.unit} lost"
            entry.survived = True

    def rows(self) -> list[dict[str, Any]]:
        """One row a kind of fault, in the order in which they came first; last those that were skipped."""
        kinds = dict.fromkeys((entry.fault, entry.unit) for entry in self.entries)
        rows = [_row(*kind, [entry for entry in self.entries if (entry.fault, entry.unit) == kind]) for kind in kinds]
        return rows + [{"fault": fault, "injected": 0, "skipped": reason} for fault, reason in self.skipped.items()]

    def table(self) -> str:
        """All rows, as Markdown that reads well as it is."""
        head = ("fault", "injected", "survived", "lost", "done again", "seconds to recover")
        cells = [head, *(_cells(row) for row in self.rows())]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        cells.insert(1, tuple("-" * width for width in widths))
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in cells
        )

    def write(self, path: Path, rounds: int) -> None:
        """Keeps the rows as JSON, with machine, day and load."""
        loads = [entry.load for entry in self.entries] or [os.getloadavg()[0]]
        report = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": {"cpu": _cpu(), "cpus": os.cpu_count(), "load_average": [min(loads), max(loads)]},
            "rounds": rounds,
            "faults": self.rows(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")


def _row(fault: str, unit: str, entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        "fault": fault,
        "injected": len(entries),
        "survived": sum(entry.survived for entry in entries),
        "unit": unit,
        "lost": _total([entry.lost for entry in entries]),
        "done_again": _total([entry.again for entry in entries]),
        "seconds": [round(entry.seconds, 1) for entry in entries if entry.seconds is not None],
    }


def _total(counts: Sequence[int | None]) -> int | None:
    """None where one is unknown: a sum would hide it."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "skipped" in row:
        return row["fault"], "0", "skipped", "", "", row["skipped"].replace("|", "/")
    seconds = row["seconds"]
    span = f" ({min(seconds):.0f} to {max(seconds):.0f})" if len(seconds) > 1 else ""
    return (
        row["fault"],
        str(row["injected"]),
        str(row["survived"]),
        "?" if row["lost"] is None else f"{row['lost']} {row['unit']}",
        "?" if row["done_again"] is None else f"{row['done_again']} {row['unit']}",
        f"{statistics.median(seconds):.0f}{span}" if seconds else "never",
    )


def _cpu() -> str:
    """The processor's name, as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"
