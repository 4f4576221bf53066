"""One process at a time: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path

from slidr.training.runs import RunError

_POLL_S = 0.2


@contextlib.contextmanager
def held(path: str, what: str, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the lock file `path` for the block, waiting at most `wait_s` seconds for another holder to end.

    Raises `RunError`, which says that `what` is in use, after that.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RunError(
                        f"{path}: {what} is in use by another process; let it end, or stop it, and run again"
                    ) from None
                time.sleep(_POLL_S)
        yield
