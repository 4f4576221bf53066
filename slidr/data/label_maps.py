"""A folder of superpixel maps: one PNG per image, named by the image's token, and the parameters of all."""

from __future__ import annotations

from functools import lru_cache

from slidr.data import storage
from slidr.data.records import read_record
from slidr.data.storage import DataError
from slidr.urls import redact_url

PARAMETERS = "parameters.json"
_RUN_AGAIN = "remove it and run `slidr superpixels CONFIG`, which writes it again and keeps the maps"
_LONGEST = 200  # bytes of a token: with an ending it still is a file name on every file system


def map_path(folder: str, token: str) -> str:
    """Where an image's map is. Raises `DataError` for a token that cannot name a file."""
    problem = name_problem(token)
    if problem is not None:
        raise DataError(f"{redact_url(folder)}: image token {token!r} {problem}; write the frame table again")
    return storage.safe_join(folder, f"{token}.png")


def name_problem(text: str) -> str | None:
    """Why a token cannot name a file, or None where it can."""
    if not text:
        return "is empty"
    if len(text.encode(errors="surrogatepass")) > _LONGEST:
        return f"has more than {_LONGEST} bytes"
    if not text.isprintable() or set(text) & set("/\\?") or text.startswith("."):
        return "cannot name a file; expected no '/', '\\', '?' or control character, and no '.' at the start"
    return None


def read_segments(folder: str) -> int | None:
    """How many superpixels the maps of a folder were asked to have; None where it holds no parameters.

    Raises `DataError` where the parameters are damaged.
    """
    path = storage.join(folder, PARAMETERS)
    if not storage.exists(path):
        return None
    segments = read_record(path, {"segments": int}, next_step=_RUN_AGAIN)["segments"]
    if segments < 1:
        raise DataError(f"{redact_url(path)}: segments: expected at least 1, got {segments}; {_RUN_AGAIN}")
    return int(segments)


@lru_cache(maxsize=32)
def known_segments(folder: str) -> int | None:
    """`read_segments`, read once by a process."""
    return read_segments(folder)
