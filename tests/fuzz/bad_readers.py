"""Inputs whose readers do what none may do: the harness must see each."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slidr.data import records, storage
from slidr.data.storage import DataError

from .harness import Input


def _make(variant: int) -> None:
    Path("file").write_text(json.dumps({"number": 0, "text": "abc"}))


def _or(act: Callable[[], Any]) -> Callable[[], Any]:
    """A reader that acts where the file is damaged."""

    def read() -> Any:
        whole = '{"number": 0, "text": "abc"}'
        return "good" if Path("file").read_text(errors="replace") == whole else act()

    return read


def _raise(error: BaseException) -> Any:
    raise error


def _die() -> None:
    import os

    os._exit(3)


INPUTS = (
    Input("good", _make, "file", lambda: records.read_json("file")["text"]),
    Input("regular only", _make, "file", lambda: storage.read_bytes("file", 1000) and "read"),
    Input("falls back", _make, "file", _or(lambda: "older"), instead=lambda value: value == "older"),
    Input("as written", _make, "file", _or(lambda: "newer"), says=lambda value: value == "newer"),
    Input("wrong", _make, "file", _or(lambda: "bad")),
    Input("foreign", _make, "file", _or(lambda: {}["key"])),
    Input("nameless", _make, "file", _or(lambda: _raise(DataError("something is damaged")))),
    Input("endless", _make, "file", _or(lambda: time.sleep(60))),
    Input("greedy", _make, "file", _or(lambda: float(np.ones(20_000_000).sum() * 0) or "good")),
    Input("dies", _make, "file", _or(_die)),
)
