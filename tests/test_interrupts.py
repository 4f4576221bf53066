"""How a process ends that gets SIGINT, SIGTERM or SIGHUP: real signals to real processes."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slidr.interrupts import interruptible

ROOT = Path(__file__).parents[1]
# What works for a minute, cleans up for `sys.argv[1]` seconds when interrupted, and then takes that long to exit.
_WORK = """
import atexit, os, signal, sys, time
from slidr.interrupts import interruptible
clean = float(sys.argv[1])
def work():
    try:
        print("works", flush=True)
        for _ in range(600):  # in slices: a signal just before a sleep begins does not end it
            time.sleep(0.1)
        return 0
    finally:
        print("cleans up", flush=True)
        time.sleep(clean)
        print("clean", flush=True)
@atexit.register
def leave():
    print("leaves", flush=True)
    time.sleep(clean)
with interruptible("do this", own_process=True) as interruption:
    try:
        status = work()
    except KeyboardInterrupt:
        status = interruption.status
sys.exit(status)
"""
# One whose first interruption gets lost, as in a finalizer.
_LOSES_ONE = """
import os, signal, sys, time
from slidr.interrupts import interruptible
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
sys.unraisablehook = lambda *arguments: None
with interruptible("do this", own_process=True) as interruption:
    try:
        Finalized()
        print("works", flush=True)
        for _ in range(600):  # in slices: a signal just before a sleep begins does not end it
            time.sleep(0.1)
    except KeyboardInterrupt:
        sys.exit(interruption.status)
"""
# Signals as a login shell leaves them, whatever this test was started by.
_DEFAULTS = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    """The script in a process of its own, once it works."""
    process = subprocess.Popen(
        [sys.executable, "-c", _DEFAULTS, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    return process


@pytest.mark.parametrize(
    ("number", "status", "cause"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "stopped by SIGTERM"),
        (signal.SIGHUP, 129, "stopped by SIGHUP"),
    ],
)
def test_each_signal_says_why_and_how_to_go_on_cleans_up_and_gives_its_status(
    number: int, status: int, cause: str
) -> None:
    process = start(_WORK, "0")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert out == "cleans up\nclean\nleaves\n"
    assert err == f"slidr: {cause}; do this\n"


def test_a_second_ctrl_c_ends_the_process_at_once_without_a_traceback() -> None:
    process = start(_WORK, "60")
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "cleans up\n"
    process.send_signal(signal.SIGINT)  # the same press, passed on by a wrapper such as `uv run`
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert err == "slidr: interrupted; do this\nslidr: ended at once; do this\n"


def test_a_ctrl_c_while_the_process_exits_prints_no_traceback_either() -> None:
    process = start(_WORK, "1.3")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    while process.stdout.readline() != "leaves\n":
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 143
    assert process.stderr is not None
    assert process.stderr.read() == "slidr: stopped by SIGTERM; do this\nslidr: ended at once; do this\n"


def test_an_exit_that_hangs_keeps_the_status() -> None:
    """As Ray's does where the signal has ended a private cluster, too: a minute later it exits with status 1."""
    slow = _WORK.replace("time.sleep(clean)\nwith", "time.sleep(60)\nwith")
    script = f"import slidr.interrupts\nslidr.interrupts._EXIT_S = 0.3\n{slow}"
    process = start(script, "0")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert out.endswith("leaves\n")


def test_a_second_sigterm_leaves_the_cleaning_up_alone() -> None:
    process = start(_WORK, "1.5")
    assert process.stdout is not None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleans up\n"
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert out.startswith("clean\n")


def test_a_signal_whose_exception_got_lost_counts_when_it_comes_again() -> None:
    process = start(_LOSES_ONE)
    time.sleep(1.2)
    assert process.poll() is None, "the first one was not lost: this test shows nothing"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_a_signal_that_is_ignored_as_by_nohup_stays_ignored() -> None:
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _WORK
    process = start(script, "0")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143


def test_a_terminal_that_closes_ends_the_process_cleanly(tmp_path: Path) -> None:
    """Writing to a terminal that is gone is an error of its own: cleaning up must not meet it."""
    log = tmp_path / "log.txt"
    script = _WORK.replace("time.sleep(clean)\n        print", f"open({str(log)!r}, 'w').write('clean')\n        print")
    pid, terminal = pty.fork()
    if pid == 0:  # the session's leader, with the terminal as its own
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", _DEFAULTS, "-c", script, "0"])
    assert b"works" in os.read(terminal, 100)
    os.close(terminal)
    _, ended = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(ended) == 129
    assert log.read_text() == "clean"


def test_handlers_are_put_back_where_more_comes_after_the_block() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with interruptible("do this"):
        pass
    assert [signal.getsignal(number) for number in numbers] == before
