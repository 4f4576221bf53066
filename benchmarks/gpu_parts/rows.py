"""What the benchmark reports: rows, their table, and the file that a child process hands them over in."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Cell = float | str | None
State = Literal["ok", "wrong", "failed", "skipped"]
NO_GPU = "no GPU here"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    `cpu` and `gpu` are in `unit`; "error" is a relative error, ‖got - reference‖ / ‖reference‖, that must not exceed
    `limit`. `floor` is the least time possible, in `unit`, from the rates measured in this run.
    """

    section: str
    what: str
    unit: str = ""
    cpu: Cell = None
    gpu: Cell = None
    floor: float | None = None
    limit: float | None = None
    note: str = ""
    state: State = "ok"
    values: dict[str, Any] = field(default_factory=dict)


def judged(section: str, what: str, cpu: Cell, gpu: Cell, limit: float, note: str = "") -> Row:
    """A row of relative errors: wrong where one exceeds `limit` or is not a number."""
    errors = [value for value in (cpu, gpu) if isinstance(value, float)]
    wrong = any(not value <= limit for value in errors)  # NaN never passes
    return Row(section, what, "error", cpu, gpu, limit=limit, note=note, state="wrong" if wrong else "ok")


def table(rows: Iterable[Row], title: str) -> str:
    """All rows as aligned text, worst news in capitals."""
    header = ("section", "what", "unit", "CPU", "GPU", "floor", "limit", "")
    lines = [header] + [
        (
            row.section,
            row.what,
            row.unit,
            *(_text(value) for value in (row.cpu, row.gpu, row.floor, row.limit)),
            " ".join(filter(None, [{"ok": ""}.get(row.state, row.state.upper()), row.note])),
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = {3, 4, 5, 6}
    text = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *text])


def _text(value: Cell) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if value != 0 and (abs(value) < 0.01 or not math.isfinite(value)):
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


class Channel:
    """A file of JSON lines from a child process to its parent: sections that begin and end, rows, unit costs, facts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def send(self, kind: str, value: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, asdict(value) if isinstance(value, Row) else value]) + "\n")

    def received(self) -> list[tuple[str, Any]]:
        """Everything sent so far; a line that its writer did not finish is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text().split("\n")[:-1]
        return [(kind, Row(**value) if kind == "row" else value) for kind, value in map(json.loads, lines)]
