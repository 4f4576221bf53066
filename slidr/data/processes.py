"""Which process wrote a file, so that others can find out whether it still runs.

A host name and a process number do not identify a process: containers may share a host name without seeing each
other's processes. The kernel's boot, the process namespace, the number and the time of the start together do.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Mark(NamedTuple):
    """One process, among all that ever run: `place` is its kernel and namespace, `start` in ticks since the boot."""

    place: str
    pid: int
    start: int

    def __str__(self) -> str:
        return f"{self.place}-{self.pid}-{self.start}"


def own_mark() -> Mark | None:
    """This process's mark; None where the system does not say enough (without Linux's /proc)."""
    place, start = _place(), _start("self")
    return None if place is None or start is None else Mark(place, os.getpid(), start)


def parse_mark(text: str) -> Mark | None:
    """The inverse of `str(mark)`; None for any other text."""
    place, *numbers = text.split("-")
    if len(numbers) != 2 or not place or not all(number.isascii() and number.isdigit() for number in numbers):
        return None
    return Mark(place, int(numbers[0]), int(numbers[1]))


def has_ended(mark: Mark) -> bool | None:
    """Whether that process has ended; None where it cannot be known from here."""
    if mark.place != _place():
        return None
    return _start(str(mark.pid)) != mark.start


def boot() -> str:
    """Names this run of this machine's kernel, for all its containers; without Linux's /proc, the machine."""
    try:
        return _digest((_PROC / "sys/kernel/random/boot_id").read_text().strip())
    except OSError:
        return _digest(f"{sys.platform} {socket.gethostname()}")


def _place() -> str | None:
    return _place_of(os.getpid())  # a fork may be in another namespace


@lru_cache(maxsize=8)
def _place_of(pid: int) -> str | None:
    try:
        if os.readlink(_PROC / "self") != str(pid):  # the /proc of another namespace: its numbers are others' here
            return None
        kinds = ("pid", "time") if os.path.lexists(_PROC / "self/ns/time") else ("pid",)  # Linux 5.6 has the second
        names = [os.readlink(_PROC / "self/ns" / kind) for kind in kinds]
        return _digest("\n".join([boot(), *names]))
    except OSError:
        return None


def _start(process: str) -> int | None:
    """When a process was started; None where there is none, or a dead one that its parent has not taken note of."""
    try:
        # After the name, which may hold anything: state, parent, ... and the start as field 22 of proc(5).
        fields = (_PROC / process / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
