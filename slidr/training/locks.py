"""One process at a time: locks that end with the process that holds them, however that ends.

A run's folder has two, since its driver can be killed alone: `lock` is held by the process that runs it, `lock.writer`
by the worker (or, without Ray, the process) that writes checkpoints and metrics. They are flock(2)'s: on NFS the server
keeps them, for all machines; an object store has none, so nothing is held there. The files stay, which means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from slidr.data import storage
from slidr.data.processes import boot
from slidr.training.runs import RunError, RunFolder
from slidr.urls import redacting_logger

# For what outlives a killed process: Ray ends a driver's workers within seconds, an NFSv4 server lets go of a lost
# machine's locks after 90 s.
WAIT_S = 120.0
_POLL_S = 0.2
_sleep = time.sleep
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
# No server, none of this kind here, or (NFS) none of a file opened for reading.
_CANNOT = _REFUSED | {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
_BUSY = {errno.EWOULDBLOCK, errno.EACCES}  # EACCES: SMB's
_BOOT = "boot "  # begins the second line of a lock file
_REPLACED = 10  # times in a row that a lock file can be another one by then; more, and its numbers mean nothing
_log = redacting_logger(__name__)


class InUse(RunError):
    """A lock that another process holds; `holder` is what that one wrote of itself."""

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


@contextlib.contextmanager
def held(
    path: str, what: str, wait_s: float | None = None, then: str = "let it end, or stop it, and run again", of: str = ""
) -> Iterator[None]:
    """Holds the lock file `path` for the block, waiting at most `wait_s` seconds for another holder to end.

    Without a number it does not wait for a process of this machine, whose lock ends with it, and `WAIT_S` for any
    other: a server keeps the locks of a machine that is gone for a while. After that it raises `InUse`, which says
    that `what` is in use, by whom, and what to do (`then`). A wait is told of in a warning. The file names its holder:
    the process, and what it is part `of`. Where the file system has no locks, or the file may not be opened, a warning
    says so and the block runs.
    """
    file = None if storage.is_remote(path) else _take(path, what, wait_s, then)
    with file or contextlib.nullcontext():
        if file is not None:
            _sign(file, of)
        yield


def launching(folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """For the block, this process alone runs the folder's training. Raises `InUse` where another does.

    That is at once where the other one is a process of this machine, else after `WAIT_S`.
    """
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


def _take(path: str, what: str, wait_s: float | None, then: str) -> BinaryIO | None:
    """The locked file; None where it cannot be locked."""
    parent = Path(path).parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{parent}: cannot be made ({error.strerror}); choose a folder that you may write") from error
    started, told, replaced = time.monotonic(), False, 0
    while True:
        # Opened anew each time: the file may have been removed, and NFS shows what it holds to those who open it.
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(_open(path))
                if _lock(file):
                    if _is_at(file, path) or replaced == _REPLACED:
                        stack.pop_all()
                        return file
                    replaced += 1
                    continue
            except OSError as error:
                if error.errno == errno.EMFILE:
                    raise  # this process's own fault
                if error.errno not in _CANNOT:
                    raise RunError(
                        f"{path}: cannot be locked ({error.strerror}); remove it, or choose another folder or name"
                    ) from error
                unsafe = "take care that nothing else uses"
                _log.warning("%s: cannot be locked (%s); %s %s", path, error.strerror, unsafe, what)
                return None
            holder, here = _holder(file)
        patience = wait_s if wait_s is not None else 0.0 if here else WAIT_S
        if time.monotonic() >= started + patience:
            raise InUse(f"{path}: {what} is in use by {holder}; {then}", holder)
        if not told:
            _log.warning("%s is in use by %s: waiting at most %g s for it to end", what, holder, patience)
            told = True
        _sleep(_POLL_S)


def _open(path: str) -> BinaryIO:
    """The file, made where there is none. Another user's is opened for reading: enough to lock it on a local disk."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as refusal:
        if refusal.errno not in _REFUSED:
            raise
        try:
            return open(path, "rb", buffering=0)
        except OSError:
            raise refusal from None
    return open(descriptor, "rb+", buffering=0)


def _lock(file: BinaryIO) -> bool:
    """Whether the lock was free, and now is this process's."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        raise
    return True


def _is_at(file: BinaryIO, path: str) -> bool:
    """Whether the path still leads to the open file: who locks one that was removed keeps nobody out."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def _sign(file: BinaryIO, of: str) -> None:
    """Writes who holds the lock, and on a line of its own the boot of this machine, which no other machine shares."""
    if not file.writable():
        return
    name = f"process {os.getpid()} on {socket.gethostname()}" + (f" ({of})" if of else "")
    with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
        file.truncate(0)
        file.seek(0)
        file.write(f"{name}\n{_BOOT}{boot()}".encode())
        os.fsync(file.fileno())  # NFS: only then do other machines see it


def _holder(file: BinaryIO) -> tuple[str, bool]:
    """What the holder wrote about itself, and whether it is a process of this machine, in whatever container.

    The host name is not compared: containers on two machines may share one.
    """
    try:
        text = file.read().decode(errors="replace").strip()
    except OSError:  # SMB lets nobody read what another has locked
        text = ""
    name, _, machine = text.partition("\n")
    return name or "another process", machine == f"{_BOOT}{boot()}"
