"""What the terminal shows of work in other processes, as a bar; where there is no terminal, as a line now and then.

Training is followed by its journal, with what the workers have to say; superpixels are counted as they come.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from slidr.data import storage
from slidr.urls import redact_url, redacting_logger

_log = redacting_logger(__name__)
_POLL_SECONDS = 0.5
_POLL_REMOTE_SECONDS = 10.0  # in an object store, where a journal arrives in large pieces anyway
_BACKLOG_SECONDS = 5.0  # between lines on metrics that MLflow missed
_PLAIN_SECONDS = 15.0  # between lines where there is no terminal to draw on


@contextlib.contextmanager
def follow(journal: str | Path, steps: int, enabled: bool = True) -> Iterator[None]:
    """Shows how far the run that writes `journal` is, until the block ends; not `enabled`, only its warnings."""
    stop = threading.Event()
    thread = threading.Thread(target=_show, args=(os.fspath(journal), steps, stop, enabled), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


@contextlib.contextmanager
def counting(what: str, total: int, enabled: bool = True) -> Iterator[Callable[[bool], None]]:
    """Shows how many of `total` are done; the block calls what it is given for each, with whether that one is good."""
    console = Console(stderr=True, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began, told = 0.0, time.monotonic()
    done = failed = 0
    drawn = enabled and (console.is_terminal or console.is_jupyter)
    if enabled and not drawn:  # it may be long until the first is done, where nodes are still to come
        console.print(f"{what} 0/{total}", highlight=False)
    with Progress(*columns, console=console, disable=not drawn, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def count(good: bool) -> None:
            nonlocal began, done, failed, told
            now = time.monotonic()
            began = began if done else now  # what came before the first, such as nodes, is no part of the rate
            done, failed = done + 1, failed + (not good)
            text = f"{what} ({failed} failed)" if failed else what
            bar.update(task, completed=done, description=text)
            if enabled and not drawn and now - told >= _PLAIN_SECONDS:
                rate = f", {(done - 1) / (now - began):.3g} a second" if now > began else ""
                console.print(f"{text} {done}/{total}{rate}", highlight=False)
                told = now

        yield count


def telling_backlog() -> Callable[[int, int], None]:
    """For metrics that MLflow missed: a function that prints now and then how far the sending is."""
    console, printed = Console(stderr=True, soft_wrap=True), time.monotonic()

    def tell(sent: int, size: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _BACKLOG_SECONDS:
            printed = time.monotonic()
            console.print(f"sending the metrics that MLflow missed: {sent / max(size, 1):.0%}", highlight=False)

    return tell


def _show(journal: str, steps: int, stop: threading.Event, enabled: bool) -> None:
    console = Console(stderr=True, soft_wrap=True)
    reader = _Tail(journal)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task("starting workers", total=steps)
        since_line, printed = _PLAIN_SECONDS, ""
        pause = _POLL_REMOTE_SECONDS if storage.is_remote(journal) else _POLL_SECONDS
        while True:
            ended = stop.wait(pause)
            fresh = reader.read()
            since_line += pause
            for kind, text in reader.take_messages():
                if kind == "warning":
                    _log.warning("%s", text)
                elif enabled:
                    console.print(redact_url(text), highlight=False, markup=False)
            if fresh and enabled:
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

    def __init__(self, path: str) -> None:
        self.path = path
        self.position = _size(path)
        self.step = 0
        self.values: dict[str, float] = {}
        self._messages: list[tuple[str, str]] = []

    def read(self) -> bool:
        """Takes in whole new lines; true when there were metrics among them."""
        from slidr.tracking_journal import parse_line  # here: it brings torch, which a superpixel task does not need

        fresh = self._fresh()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self.position += len(whole)
        found = False
        for line in whole.splitlines():
            try:
                entry = parse_line(line)
            except ValueError:  # cut short by a kill, or damaged: the journal names it when it is sent
                continue
            if entry.metrics is not None:
                found, self.step = True, entry.step
                self.values.update(entry.metrics)
            else:
                self._messages.append((entry.kind, entry.text))
        return found

    def take_messages(self) -> list[tuple[str, str]]:
        """What was read since the last call: ("warning" or "note", text)."""
        taken, self._messages = self._messages, []
        return taken

    def _fresh(self) -> bytes:
        """The bytes from `position` on."""
        try:
            with storage.open_read(self.path) as file:
                file.seek(self.position)
                return file.read()
        except (OSError, storage.DataError):  # not written yet, or a store that is away for a moment
            return b""

    def text(self) -> str:
        shown = (f"{name} {self.values[name]:.4g}" for name in self._SHOWN if name in self.values)
        return "  ".join(shown)


def _size(path: str) -> int:
    """Bytes of a journal; 0 where there is none yet."""
    try:
        with storage.open_read(path) as file:
            return file.seek(0, os.SEEK_END)
    except (OSError, storage.DataError):
        return 0
