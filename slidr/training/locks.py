"""One process at a time: locks that end with the process that holds them, however that ends.

A run's folder has two, since its driver can be killed alone: `lock` is held by the process that runs it, `lock.writer`
by the worker (or, without Ray, the process) that writes checkpoints and metrics. They are flock(2)'s: on NFS the server
keeps them, for all machines; an object store has none, so nothing is held there. The files stay, which means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from slidr.data import storage
from slidr.training.runs import RunError, RunFolder

# For what outlives a killed process: Ray ends a driver's workers within seconds, an NFSv4 server lets go of a lost
# machine's locks after 90 s.
WAIT_S = 120.0
_POLL_S = 0.2
_CANNOT = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EROFS}
_log = logging.getLogger(__name__)


class InUse(RunError):
    """A lock that another process holds; `holder` is what that one wrote of itself."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


@contextlib.contextmanager
def held(
    path: str, what: str, wait_s: float = 0.0, then: str = "let it end, or stop it, and run again", of: str = ""
) -> Iterator[None]:
    """Holds the lock file `path` for the block, waiting at most `wait_s` seconds for another holder to end.

    After that it raises `InUse`, which says that `what` is in use, by whom, and what to do (`then`). A wait is told of
    in a warning. The file names its holder: the process, and what it is part `of`. Where the file system has no locks
    or the file may not be written, a warning says so and the block runs.
    """
    file = None if storage.is_remote(path) else _take(path, what, wait_s, then)
    with file or contextlib.nullcontext():
        if file is not None:
            _sign(file, of)
        yield


def launching(folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """For the block, this process alone runs the folder's training. Raises `InUse` at once where another does."""
    then = "let it end, or stop it and continue with --run.resume, or choose another --run.name"
    return held(folder.file("lock"), _name(folder), then=then)


def await_writer(folder: RunFolder) -> None:
    """Waits until no worker of an earlier launch, whose driver was killed, writes into the folder any more.

    Raises `InUse` after `WAIT_S`.
    """
    with _writer(folder):
        pass


@contextlib.contextmanager
def writing(folder: RunFolder, launch: str) -> Iterator[None]:
    """For the block, this worker alone writes into the folder. Raises `InUse` where another does after `WAIT_S`.

    An earlier worker of the same launch is waited for as long, and then no longer: the launch started this one because
    that one is gone, and some servers (NFSv3's) keep a lost machine's locks for ever.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_writer(folder, launch))
        except InUse as error:
            if launch not in error.holder:
                raise
            _log.warning("%s: still locked by %s, which this launch has lost; going on", folder.path, error.holder)
        yield


def _writer(folder: RunFolder, launch: str = "") -> contextlib.AbstractContextManager[None]:
    then = (
        "a worker of an earlier launch should have ended with its driver: stop it, or, where its machine is gone for "
        "good, remove this file, and run again"
    )
    return held(folder.file("lock.writer"), _name(folder), WAIT_S, then, launch)


def _name(folder: RunFolder) -> str:
    return f"the run {storage.name_of(folder.path)}"


def _take(path: str, what: str, wait_s: float, then: str) -> BinaryIO | None:
    """The locked file; None where it cannot be locked."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    deadline, told = time.monotonic() + wait_s, False
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "ab+", buffering=0))
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    holder = _holder(file)
                    if time.monotonic() >= deadline:
                        raise InUse(f"{path}: {what} is in use by {holder}; {then}", holder) from None
                    if not told:
                        _log.warning("%s is in use by %s: waiting at most %g s for it to end", what, holder, wait_s)
                        told = True
                    time.sleep(_POLL_S)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            _log.warning("%s: cannot be locked (%s); take care that nothing else uses %s", path, error.strerror, what)
            return None
        stack.pop_all()
        return file


def _sign(file: BinaryIO, of: str) -> None:
    name = f"process {os.getpid()} on {socket.gethostname()}" + (f" ({of})" if of else "")
    with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
        file.truncate(0)
        file.write(name.encode())


def _holder(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip() or "another process"
