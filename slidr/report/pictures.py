"""Pictures beside results: what is measured is kept first, and a picture that cannot be drawn costs nothing else."""

from __future__ import annotations

from collections.abc import Callable

from slidr.data import storage
from slidr.urls import redact_url, redacting_logger

_log = redacting_logger(__name__)


def save_picture(path: str, draw: Callable[[], bytes]) -> str | None:
    """Draws a picture and writes it; returns its path, or None, with a warning, where that fails for any reason."""
    try:
        storage.write_bytes_atomic(path, draw())
    except Exception as error:
        ours = type(error).__module__.split(".")[0] == "slidr"
        reason = str(error) if ours else f"{type(error).__name__}: {error}"
        _log.warning("%s is not drawn (%s); the results are kept", redact_url(path), reason)
        return None
    return path
