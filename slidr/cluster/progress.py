"""A progress bar for training that happens in other processes: it follows the run's journal."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_POLL_SECONDS = 0.5
_PLAIN_SECONDS = 15.0  # between lines where there is no terminal to draw on


@contextlib.contextmanager
def follow(journal: str | Path, steps: int, enabled: bool = True) -> Iterator[None]:
    """Shows how far the run that writes `journal` is, until the block ends."""
    if not enabled:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_show, args=(Path(journal), steps, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


def _show(journal: Path, steps: int, stop: threading.Event) -> None:
    console = Console(stderr=True, soft_wrap=True)
    reader = _Tail(journal)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting workers", total=steps)
        since_line, printed = _PLAIN_SECONDS, ""
        while True:
            ended = stop.wait(_POLL_SECONDS)
            fresh = reader.read()
            since_line += _POLL_SECONDS
            if fresh:
                bar.update(task, completed=reader.step, description=reader.text())
                line = f"training {reader.step}/{steps} {reader.text()}"
                due = since_line >= _PLAIN_SECONDS or reader.step >= steps
                if not console.is_terminal and due and line != printed:
                    console.print(line, highlight=False)
                    since_line, printed = 0.0, line
            if ended:
                return


class _Tail:
    """The newest values of a journal that grows."""

    _SHOWN = ("loss", "val_loss", "val_retrieval", "val_miou", "lr", "samples_per_second")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0
        self.step = 0
        self.values: dict[str, float] = {}

    def read(self) -> bool:
        """Takes in whole new lines; true when there were any."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self.position)
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # cut short by a kill
                continue
            self.step = entry["step"]
            self.values.update(entry["metrics"])
        return len(whole) > 0

    def text(self) -> str:
        shown = (f"{name} {self.values[name]:.4g}" for name in self._SHOWN if name in self.values)
        return "  ".join(shown)
