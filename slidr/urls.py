"""URLs in messages, errors, logs, records and MLflow: without the secrets that they may carry."""

from __future__ import annotations

import logging
import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>`]+")
_TRAILING = ".,;:)]}"  # punctuation of the sentence around a URL
_PORT = re.compile(r":\d{1,5}$")


def redact_url(text: str) -> str:
    """`text` with every URL in it reduced to scheme, host, port and path: no user, password or query.

    A plain path, and any text without a URL, comes back unchanged. Access keys (``s3://KEY:SECRET@bucket``), pre-signed
    queries and tokens are removed, an unescaped "/" in a secret included.

    >>> redact_url("s3://KEY:SE/CRET@bucket/a.pt?token=1: cannot be read")
    's3://bucket/a.pt: cannot be read'
    """
    return _URL.sub(_redacted, text)


def _redacted(match: re.Match[str]) -> str:
    url = match[0].rstrip(_TRAILING)
    trailing = match[0][len(url) :]
    scheme, _, rest = url.partition("://")
    web = scheme.lower().startswith("http")
    location = re.split(r"[?#]" if web else r"[?]", rest, maxsplit=1)[0]
    host, slash, path = location.partition("/")
    if "@" in host:
        host = host.rpartition("@")[2]
    elif "@" in path and ":" in host and not (web and _PORT.search(host)):  # only http has ports before an "@"
        host, slash, path = location.rpartition("@")[2].partition("/")  # the secret holds an unescaped "/"
    return f"{scheme}://{host}{slash}{path}{trailing}"


class RedactedError(Exception):
    """The base of every error of this project: its message shows no secret of a URL."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redact_url(each) if isinstance(each, str) else each for each in arguments))


def redacting_logger(name: str) -> logging.Logger:
    """The logger of that name; its messages show no secret of a URL."""
    logger = logging.getLogger(name)
    logger.addFilter(_redact_record)
    return logger


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redact_url(record.getMessage()), ()
    return True
