"""Ctrl-C, SIGTERM and SIGHUP end every command alike: a line at once, KeyboardInterrupt, exit status 128 + number."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

_CAUSES = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped by SIGHUP",
}
_EXIT_S = 20.0  # for the process to exit once the command has ended: Ray waits 60 s for a cluster that has gone
_SAME_PRESS_S = 1.0  # a terminal and a wrapper such as `uv run` may both pass on the same Ctrl-C


@dataclass
class Interruption:
    """The first signal that a command got, and how the command goes on after it (`advice`)."""

    advice: str
    number: int | None = None
    since: float = 0.0  # time.monotonic
    over: bool = False  # the command has ended, the process not yet

    @property
    def status(self) -> int:
        """The exit status: 128 + the signal's number; of an interruption without a signal, SIGINT's."""
        return 128 + (self.number or signal.SIGINT)

    def tell(self, cause: str) -> None:
        """Prints why the command ends and how it goes on; a terminal that has gone is not an error."""
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: in the middle of another print
            print(f"slidr: {cause}; {self.advice}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interruptible(advice: str, own_process: bool = False) -> Iterator[Interruption]:
    """In the block each of the three signals prints a line at once and raises `KeyboardInterrupt`.

    At once, since SIGKILL may follow within seconds. A second Ctrl-C ends the process without further cleaning up; a
    second SIGTERM or SIGHUP changes nothing, except where the first one's exception got lost. A signal that this
    process was started to ignore, as by `nohup`, stays ignored. With `own_process` the handlers stay after the block,
    where every signal ends the process at once and without a traceback; after an interruption it ends within 20 s.
    """
    interruption = Interruption(advice)
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only that one may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interruption.number is None and not interruption.over:
            interruption.number, interruption.since = number, time.monotonic()
            interruption.tell(_CAUSES[signal.Signals(number)])
            if number == signal.SIGHUP:
                _forget_terminal()
            raise KeyboardInterrupt
        if time.monotonic() - interruption.since < _SAME_PRESS_S:
            return
        if number == signal.SIGINT or interruption.over:
            interruption.number = interruption.number or number
            interruption.tell("ended at once")
            os._exit(interruption.status)
        if not _is_ending(sys.exc_info()[1]):
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in _CAUSES}
    ours = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in ours:
        signal.signal(number, handle)
    try:
        yield interruption
    finally:
        interruption.over = True
        if own_process and interruption.number is not None:
            last = threading.Timer(_EXIT_S, os._exit, (interruption.status,))
            last.daemon = True
            last.start()
        if not own_process:
            for number in ours:
                signal.signal(number, before[number] or signal.SIG_DFL)


def _is_ending(handled: BaseException | None) -> bool:
    """Whether the exception that is being handled comes from a `KeyboardInterrupt`.

    Python ignores one that is raised within a finalizer or a callback: the command then runs on.
    """
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return True
        handled = handled.__context__
    return False


def _forget_terminal() -> None:
    """Output to a terminal goes nowhere from now on: after SIGHUP each write to it may fail."""
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (1, 2):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):
                os.dup2(nowhere, descriptor)
        os.close(nowhere)
