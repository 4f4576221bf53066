"""JSON records: results, notes, search records, tables. Damage is a `DataError` that names the file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from slidr.data import storage
from slidr.data.storage import RECORD_BYTES, DataError

Types = type | tuple[type, ...]
_INTEGERS = 2**63  # as many as a table of results, or MLflow, can keep
_COPY = "copy the file again or remove it"


def read_json(path: str | os.PathLike[str], limit: int = RECORD_BYTES, next_step: str = _COPY) -> Any:
    """The value in a JSON file. Raises `DataError` where the file is missing, too large or damaged."""
    return parse_json(storage.read_bytes(path, limit), os.fspath(path), next_step)


def read_record(
    path: str | os.PathLike[str],
    required: Mapping[str, Types],
    optional: Mapping[str, Types] | None = None,
    next_step: str = _COPY,
) -> dict[str, Any]:
    """The object in a JSON file, its keys' types checked; further keys are kept.

    Raises `DataError` as `read_json` does, and for a value that `require_record` refuses.
    """
    return require_record(read_json(path, next_step=next_step), os.fspath(path), required, optional, next_step)


def parse_json(data: bytes | str, name: str, next_step: str = _COPY) -> Any:
    """The value that a JSON text describes; `name` names the file. Raises `DataError` for anything else.

    NaN and infinities, which JSON does not have and Python writes, are read as such.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DataError(f"{storage.redact_url(name)}: is not readable JSON ({reason}); {next_step}") from None


def require_record(
    value: Any,
    name: str,
    required: Mapping[str, Types],
    optional: Mapping[str, Types] | None = None,
    next_step: str = _COPY,
) -> dict[str, Any]:
    """`value` if it is an object with these keys and types (`bool` is not an `int`, an `int` is a `float` and has
    at most 64 bits).

    Floats must be finite. An optional key may be absent. Raises `DataError` naming the first key that differs.
    """
    name = storage.redact_url(name)
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a JSON object, got {type(value).__name__}; {next_step}")
    for key, types in {**required, **(optional or {})}.items():
        if key not in value:
            if key in required:
                raise DataError(f"{name}: key {key!r} is missing; {next_step}")
            continue
        if not _is(value[key], types):
            raise DataError(f"{name}: {key}: expected {_names(types)}, got {_short(value[key])}; {next_step}")
    return value


def _is(value: Any, types: Types) -> bool:
    wanted = types if isinstance(types, tuple) else (types,)
    if isinstance(value, bool):
        return bool in wanted
    if isinstance(value, float):
        return float in wanted and math.isfinite(value)
    if isinstance(value, int):
        return (int in wanted or float in wanted) and -_INTEGERS <= value < _INTEGERS
    return isinstance(value, wanted)


def _names(types: Types) -> str:
    wanted = types if isinstance(types, tuple) else (types,)
    return " or ".join("null" if one is type(None) else one.__name__ for one in wanted)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
