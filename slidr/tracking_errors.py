"""What goes wrong with MLflow's store, in one sentence and with a next step; no secret of its URI, no traceback."""

from __future__ import annotations

import re
from typing import Any

from slidr.urls import RedactedError, redact_url

_LONGEST = 300  # characters of a foreign reason
_INNERMOST = re.compile(r"\[Errno -?\d+\] ([^'\")]+)")  # of urllib3's nested reports
_STATUS = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}
_CREDENTIALS = (
    "write https://USER:PASSWORD@HOST in tracking.uri, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
    "or MLFLOW_TRACKING_TOKEN"
)
_AWAY = "start the server (docs/cluster.md), or --tracking.uri null for a file in run.folder"
ELSEWHERE = "choose another run.folder or tracking.uri"
MOVE_AWAY = "move the file away: the next run makes a new one and sends its metrics again"
_MAKE_ROOM = "free some space and run the same command again"
# What a database says, what that means here, and what to do.
_DATABASE = (
    (("disk is full", "disk full", "no space left"), "cannot be written", _MAKE_ROOM),
    (("readonly database", "read-only"), "may not be written", ELSEWHERE),
    (("database is locked",), "is busy", "run the same command again, or give several runs a server (docs/cluster.md)"),
    (
        ("not a database", "malformed", "no such table", "no such column"),
        "is damaged",
        MOVE_AWAY,
    ),
)


class TrackingError(RedactedError, RuntimeError):
    """MLflow's store cannot do what was asked; `what` and `next` say why and how to go on, `code` is MLflow's.

    `lasting`: the same call fails until someone changes something; a store that is away may come back by itself.
    """

    def __init__(self, uri: str, what: str, next: str, code: str = "", lasting: bool = False) -> None:
        super().__init__(redact_url(f"MLflow at {uri} {what}; {next}"))
        self.what, self.next, self.code, self.lasting = redact_url(what), redact_url(next), code, lasting


def tracking_error(uri: str, error: Exception) -> TrackingError:
    """What a library's error says about the store at `uri`."""
    text = redact_url(str(error))
    code = str(getattr(error, "error_code", ""))
    status = _STATUS.get(code)
    if status is not None:
        return refused(uri, status)
    for signs, what, next_step in _DATABASE:
        lines = [line for line in text.splitlines() if any(sign in line.lower() for sign in signs)]
        if lines:
            return TrackingError(uri, f"{what} ({_short(lines[0])})", next_step, code)
    if isinstance(error, OSError) and uri.startswith("sqlite:"):
        return TrackingError(uri, f"cannot be used ({_short(text)})", ELSEWHERE, code)
    if isinstance(error, OSError | ValueError) or "failed with" in text:
        return TrackingError(uri, f"cannot be reached ({_innermost(text) or type(error).__name__})", _AWAY, code)
    return TrackingError(uri, f"refuses this ({_short(text) or type(error).__name__})", "mend that and run again", code)


def refused(uri: str, status: int) -> TrackingError:
    """The error of a server that answered with an HTTP status."""
    if status == 401:
        return TrackingError(uri, "refuses the credentials, or wants some (401)", _CREDENTIALS, "UNAUTHENTICATED", True)
    if status == 403:
        allowed = "ask its administrator for the right to write the experiment (tracking.experiment)"
        return TrackingError(uri, "does not allow this user to do that (403)", allowed, "PERMISSION_DENIED", True)
    return TrackingError(uri, f"answers with status {status}", "check tracking.uri: is it MLflow's address?")


def is_foreign(error: Exception) -> bool:
    """Whether an error tells about the store; the others are this project's own faults and must stay visible."""
    faults: tuple[Any, ...] = (TypeError, AttributeError, NameError, LookupError, AssertionError, NotImplementedError)
    return not isinstance(error, faults)


def _innermost(text: str) -> str:
    found = _INNERMOST.findall(text)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "its TLS certificate is not trusted; see MLFLOW_TRACKING_SERVER_CERT_PATH"
    if found:
        return str(found[-1]).strip()
    if "timed out" in text or "timeout" in text:
        return "no answer in time"
    return _short(text)


def _short(text: str) -> str:
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
