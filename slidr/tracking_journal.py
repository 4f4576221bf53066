"""A run's metrics: a line each in a file of the run's folder first, and from there in MLflow.

A store that goes away costs nothing: what it missed is sent when it is back, in slices, so that no training step waits
for more than one of them; the rest follows at the end, or by the next process that attaches.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slidr.data import storage
from slidr.tracking_errors import TrackingError
from slidr.tracking_store import Client, connect
from slidr.urls import RedactedError, redact_url, redacting_logger

_log = redacting_logger(__name__)
SLICE = 500  # lines that are sent at once
_SEND_SECONDS = 5.0
_UPLOAD_SECONDS = 30.0  # between uploads of a journal in an object store
_AWAY_SECONDS = 60.0  # before a store that did not answer is tried again
_APPEND = os.O_APPEND | os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK  # opening a FIFO must not wait for a reader
_BATCH = 500  # MLflow takes at most 1000 metrics a request
_LONGEST_LINE = 1 << 20
_NAME = re.compile(r"[/\w.\- :]{1,250}")  # of a metric, as MLflow takes it
_LARGEST = 2**63 - 1  # step and time that a store can keep


@dataclass(frozen=True)
class RunHandle:
    """Where a run lives; small and picklable, for workers."""

    uri: str
    run_id: str


class JournalError(RedactedError, RuntimeError):
    """A journal that cannot be written; the message says where and why."""


@dataclass(frozen=True)
class Line:
    """One line of a journal: metrics at a step, or a message (a note or a warning) for the user who follows the run."""

    time_ms: int = 0
    step: int = 0
    metrics: dict[str, float] | None = None
    kind: str = ""  # of a message: "note" or "warning"
    text: str = ""


class Journal:
    """A run's metrics: one JSON line each in `path`, and, given a handle, the same in MLflow.

    An object store cannot append: there the lines are kept in memory and uploaded whole by `flush`, every half a
    minute and whenever the caller asks for it, as before each checkpoint.
    """

    def __init__(self, path: str | Path, handle: RunHandle | None = None) -> None:
        self.path = os.fspath(path)
        self.handle = handle
        self._remote = storage.is_remote(self.path)
        self._lines = bytearray(_read(self.path) if self._remote else b"")  # of an object store's journal
        self._uploaded = len(self._lines)
        self._cursor = storage.sibling(self.path, ".sent")  # bytes of the journal that MLflow has
        self._client: Client | None = None
        self._last_upload = time.monotonic()
        self._next_try = self._last_upload + _SEND_SECONDS
        self._warned = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Adds metrics at a step; sends a slice to MLflow every few seconds.

        Raises `JournalError` where it cannot write.
        """
        self._append({"step": step, "time_ms": int(time.time() * 1000), "metrics": metrics})
        if time.monotonic() > self._next_try:
            sent = self.send_slice()
            # Counted from the end of the try: one that ran into time-outs must not be followed by the next at once.
            self._next_try = time.monotonic() + (_SEND_SECONDS if sent else _AWAY_SECONDS)

    def note(self, text: str) -> None:
        """Adds a line for the user who follows the run. Raises `JournalError` where it cannot write."""
        self._append({"time_ms": int(time.time() * 1000), "note": redact_url(text)})
        self.flush()

    def flush(self) -> None:
        """Makes what was logged visible to others; on this machine it is already."""
        if len(self._lines) > self._uploaded:
            with self._writing():
                storage.write_bytes_atomic(self.path, bytes(self._lines))
            self._uploaded, self._last_upload = len(self._lines), time.monotonic()

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Within the block, this project's log warnings of this process are lines of the journal too.

        A worker's own output stays on its node; `slidr.cluster.progress` shows these lines where the command runs.
        """
        handler, logger = _JournalHandler(self), logging.getLogger("slidr")
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            self.flush()

    def send(self, tell: Callable[[int, int], None] = lambda sent, size: None) -> bool:
        """Sends all that MLflow does not have yet; false, with one warning, where the store does not take it.

        `tell(sent, size)` is called before each further slice, in bytes.
        """
        while self.send_slice():
            if not self.pending():
                return True
            tell(self._sent(), self._size())
        return False

    def pending(self) -> bool:
        """Whether there are whole lines that MLflow does not have yet."""
        return self.handle is not None and bool(self._slice(self._sent()))

    def send_slice(self) -> bool:
        """Sends at most `SLICE` lines of what MLflow does not have yet; false as `send`.

        Lines that are not records of metrics are left out; the damaged ones among them with a warning.
        """
        if self.handle is None:
            return True
        sent = self._sent()
        fresh = self._slice(sent)
        if not fresh:
            return True
        metrics = self._metrics(sent, fresh)
        try:
            for first in range(0, len(metrics), _BATCH):
                self._client = self._client or connect(self.handle.uri)
                self._client.log_batch(self.handle.run_id, metrics=metrics[first : first + _BATCH])
            with self._writing(self._cursor):
                storage.write_bytes_atomic(self._cursor, str(sent + sum(map(len, fresh))).encode())
        except (TrackingError, JournalError) as error:  # without the cursor the slice is sent again, which is harmless
            self._client = None
            if not self._warned:
                self._warned = True
                _log.warning("%s; metrics wait in %s and are sent later", error, redact_url(self.path))
            return False
        self._warned = False
        return True

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        if self._remote:
            self._lines += line
            if time.monotonic() - self._last_upload > _UPLOAD_SECONDS:
                self.flush()
            return
        with self._writing():
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(self.path, _APPEND, 0o666), "ab") as file:
                # A kill in the middle of a line must not swallow this one.
                file.write(line if self._ends_whole() else b"\n" + line)

    @contextlib.contextmanager
    def _writing(self, path: str | None = None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JournalError(
                f"{redact_url(path or self.path)}: cannot be written ({redact_url(str(error.strerror or error))})"
            ) from error

    def _size(self) -> int:
        with self._open() as file:
            return file.seek(0, os.SEEK_END)

    def _slice(self, start: int) -> list[bytes]:
        """Up to `SLICE` whole lines of the journal from a byte on; the last one may still be being written."""
        with self._open() as file:
            file.seek(start)
            lines = list(itertools.islice(_lines_of(file), SLICE))
        while lines and not lines[-1].endswith(b"\n"):  # a very long line is several pieces
            lines.pop()
        return lines

    def _open(self) -> contextlib.AbstractContextManager[IO[bytes]]:
        if self._remote or not storage.exists(self.path):
            return io.BytesIO(self._lines)
        return storage.open_read(self.path)

    def _ends_whole(self) -> bool:
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"

    def _sent(self) -> int:
        """Bytes of the journal that MLflow has; after damage, none: a metric sent twice is the same metric."""
        try:
            sent = int(storage.read_bytes(self._cursor, 64))
        except ValueError:  # no file, or no number in it
            return 0
        if not 0 < sent <= self._size():
            return 0
        with self._open() as file:
            file.seek(sent - 1)
            return sent if file.read(1) == b"\n" else 0

    def _metrics(self, start: int, lines: list[bytes]) -> list[Any]:
        """MLflow's metrics of some lines, the first of which begins at a byte of the journal."""
        from mlflow.entities import Metric

        metrics, damaged = [], []
        for index, line in enumerate(lines):
            try:
                entry = parse_line(line)
                values = entry.metrics or {}
                _require_names(values)
            except ValueError as error:
                if line.strip().endswith(b"}"):  # else a kill cut it short
                    damaged.append((index, error))
                continue
            metrics += [Metric(name, value, entry.time_ms, entry.step) for name, value in values.items()]
        if damaged:
            index, reason = damaged[0]
            more = f", and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
            number = self._line_number(start) + index
            _log.warning(
                "%s: line %d is damaged (%s)%s: left out of MLflow", redact_url(self.path), number, reason, more
            )
        return metrics

    def _line_number(self, start: int) -> int:
        """The number of the line that begins at a byte."""
        with self._open() as file:
            return file.read(start).count(b"\n") + 1


def read_journal(path: str | Path) -> dict[int, dict[str, float]]:
    """Metrics by step; where a resumed run repeated a step, the later value counts.

    A damaged line is left out, with a warning that names the first of them.
    """
    by_step: dict[int, dict[str, float]] = {}
    damaged: list[tuple[int, ValueError]] = []
    for number, line in enumerate(_lines_at(os.fspath(path)), 1):
        try:
            entry = parse_line(line)
        except ValueError as error:
            if line.strip().endswith(b"}"):  # else a kill cut it short
                damaged.append((number, error))
            continue
        if entry.metrics is not None:
            by_step.setdefault(entry.step, {}).update(entry.metrics)
    if damaged:
        number, reason = damaged[0]
        more = f", and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
        _log.warning("%s: line %d is damaged (%s)%s: left out", redact_url(os.fspath(path)), number, reason, more)
    return by_step


def parse_line(line: bytes) -> Line:
    """What a journal's line says, but for values that are not finite.

    Raises `ValueError` with the reason for one that is not a record.
    """
    try:
        raw = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(raw, dict):
        raise ValueError(f"expected a JSON object, got {type(raw).__name__}")
    if "metrics" not in raw:
        for kind in ("warning", "note"):
            if isinstance(raw.get(kind), str):
                return Line(kind=kind, text=raw[kind])
        raise ValueError("neither metrics nor a message")
    metrics = raw["metrics"]
    if not isinstance(metrics, dict):
        raise ValueError(f"metrics: expected an object, got {type(metrics).__name__}")
    numbers = {name: _number(name, value) for name, value in metrics.items()}
    return Line(
        _whole(raw, "time_ms"),
        _whole(raw, "step"),
        {name: value for name, value in numbers.items() if math.isfinite(value)},
    )


class _JournalHandler(logging.Handler):
    """Writes warnings as lines of a journal."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = redact_url(record.getMessage())
            self._journal._append({"time_ms": int(record.created * 1000), "warning": text})
            self._journal.flush()
        except Exception:
            self.handleError(record)


def _whole(raw: dict[str, Any], key: str) -> int:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST:
        raise ValueError(f"{key}: expected a whole number of at least 0, got {str(value)[:40]}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


def _require_names(metrics: dict[str, float]) -> None:
    """Raises `ValueError` for a metric's name that no MLflow takes: it would refuse the whole slice."""
    for name in metrics:
        if not _NAME.fullmatch(name) or os.path.normpath(name) != name or name.startswith(("/", "..")) or name == ".":
            raise ValueError(f"{name[:40]!r} is not a metric's name")


def _lines_at(path: str) -> Iterator[bytes]:
    """A journal's lines; none where there is no file yet."""
    if storage.is_remote(path):
        yield from io.BytesIO(_read(path))
    elif storage.exists(path):
        with storage.open_read(path) as file:
            yield from _lines_of(file)


def _lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """A file's lines; of a longer one than any that is written, pieces."""
    while line := file.readline(_LONGEST_LINE):
        yield line


def _read(path: str) -> bytes:
    """The bytes of an object store's journal; none where there is no file yet."""
    return storage.read_bytes(path, storage.TABLE_BYTES) if storage.exists(path) else b""
