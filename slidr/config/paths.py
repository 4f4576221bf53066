"""From what a user writes to a path: one function for every key, option and argument that names a file or folder."""

from __future__ import annotations

import os
from urllib.parse import unquote, urlsplit

_SQLITE = "sqlite:///"


def user_path(text: str | os.PathLike[str]) -> str:
    """The path that a text means: `~` and file:// become paths of this machine, URIs of other storages stay.

    Applied again it changes nothing. Raises `ValueError` for a file:// URI of another machine, an unknown user's `~`
    and a zero byte.

    >>> user_path("file:///data/my%20logs"), user_path("s3://bucket/~/file"), user_path("runs")
    ('/data/my logs', 's3://bucket/~/file', 'runs')
    """
    path = os.fspath(text)
    if "\0" in path:
        raise ValueError(f"{path!r}: holds a zero byte, which no path has")
    if path.startswith(("file://", "file:/")):
        return from_file_uri(path)
    return path if "://" in path else _expanded(path)


def user_uri(text: str) -> str:
    """An MLflow tracking URI as it is used: `~` at the start of a path, or of an sqlite file's path, is expanded.

    Anything else is MLflow's to read.
    """
    if text.startswith(_SQLITE):
        return _SQLITE + _expanded(text.removeprefix(_SQLITE))
    return text if "://" in text else _expanded(text)


def absolute_path(text: str) -> str:
    """`user_path`, absolute where it is on this machine: it means the same in every process."""
    path = user_path(text)
    return path if "://" in path else os.path.abspath(path)


def from_file_uri(uri: str) -> str:
    """The path in a file:// URI, its percent escapes decoded. Raises `ValueError` for one of another machine."""
    parts = urlsplit(uri.replace("?", "%3F").replace("#", "%23"))  # a file's name may hold both
    if parts.netloc not in ("", "localhost"):
        raise ValueError(
            f"{uri}: names the machine {parts.netloc!r}; write file:///{parts.netloc}{parts.path} or the path alone"
        )
    return unquote(parts.path)


def _expanded(path: str) -> str:
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        name = path.partition("/")[0]
        raise ValueError(
            f"{path}: this machine has no user {name[1:]!r}; write the whole path, or ./{path} for a folder"
        )
    return expanded
