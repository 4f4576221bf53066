"""The rows of nuScenes' tables: which keys they have and of which types, checked before anything is joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from slidr.data.frame_rules import FARTHEST, intrinsics_problem, path_problem
from slidr.data.label_maps import name_problem
from slidr.data.storage import DataError

Row = dict[str, Any]
Problem = Callable[[Any], str | None]  # why a value is not one of its kind; None where it is
_COPY = "copy the table again"
_LATEST = 2**53  # microseconds; larger ones are not exact as JSON numbers


def _text(value: Any) -> str | None:
    return None if type(value) is str else "expected a text"


def _name(value: Any) -> str | None:
    return "expected a token" if type(value) is not str else name_problem(value)


def _path(value: Any) -> str | None:
    return "expected a path" if type(value) is not str else path_problem(value)


def _truth(value: Any) -> str | None:
    return None if type(value) is bool else "expected true or false"


def _time(value: Any) -> str | None:
    if type(value) in (int, float) and 0 <= value < _LATEST:
        return None
    return "expected microseconds"


def _pixels(value: Any) -> str | None:
    return None if type(value) is int and 0 <= value <= 65_535 else "expected pixels, 0 to 65535"


def _numbers(value: Any, count: int) -> bool:
    return (
        type(value) is list
        and len(value) == count
        and all(type(number) in (int, float) and abs(number) <= FARTHEST for number in value)
    )


def _translation(value: Any) -> str | None:
    return None if _numbers(value, 3) else f"expected 3 metres, at most {FARTHEST:g}"


def _rotation(value: Any) -> str | None:
    if _numbers(value, 4) and math.hypot(*value) > 1e-6:
        return None
    return "is not a rotation; expected a quaternion w, x, y, z"


def _intrinsics(value: Any) -> str | None:
    """Of a camera; other sensors have an empty list."""
    if value == []:
        return None
    if not (type(value) is list and len(value) == 3 and all(_numbers(row, 3) for row in value)):
        return "expected 3 x 3 numbers, or an empty list"
    return intrinsics_problem(np.array(value, np.float64))


def _texts(value: Any) -> str | None:
    return None if type(value) is list and all(type(each) is str for each in value) else "expected a list of texts"


ROWS: dict[str, dict[str, Problem]] = {
    "category": {},
    "sensor": {"channel": _text, "modality": _text},
    "calibrated_sensor": {
        "sensor_token": _text,
        "translation": _translation,
        "rotation": _rotation,
        "camera_intrinsic": _intrinsics,
    },
    "log": {},
    "map": {"log_tokens": _texts},
    "scene": {"name": _text, "first_sample_token": _text},
    "sample": {"token": _name, "scene_token": _text, "prev": _text, "next": _text},
    "sample_data": {
        "token": _name,
        "sample_token": _text,
        "ego_pose_token": _text,
        "calibrated_sensor_token": _text,
        "filename": _path,
        "timestamp": _time,
        "width": _pixels,
        "height": _pixels,
    },
    "ego_pose": {"translation": _translation, "rotation": _rotation},
    "lidarseg": {"sample_data_token": _text, "filename": _path},
}
# The keys that select the keyframes: most rows of sample_data are sweeps between keyframes, which nothing else reads.
SELECTION: dict[str, Problem] = {"is_key_frame": _truth, "calibrated_sensor_token": _text}


def require_records(table: Any, path: str) -> list[Row]:
    """A table as it was read, if it is a list of records with a token each. Raises `DataError` naming the file."""
    if not isinstance(table, list):
        raise DataError(f"{path}: expected a list of records, got {type(table).__name__}; {_COPY}")
    for number, row in enumerate(table):
        if type(row) is not dict:
            raise DataError(f"{path}: expected a list of records, but number {number} is {_short(row)}; {_COPY}")
        if type(row.get("token")) is not str or not row["token"]:
            raise DataError(f"{path}: record {number} has no token: {_short(row)}; {_COPY}")
    return table


def require_keys(rows: Sequence[Row], path: str, problems: Mapping[str, Problem]) -> None:
    """Raises `DataError` naming the file, the record, the key and the value that is missing or not of its kind."""
    for key, problem in problems.items():
        for row in rows:
            if key not in row:
                raise DataError(f"{path}: record {row['token']!r} has no {key!r}; {_COPY}")
            found = problem(row[key])
            if found is not None:
                raise DataError(f"{path}: record {row['token']!r}: {key} {_short(row[key])}: {found}; {_COPY}")


def require_distinct(rows: Iterable[Row], path: str) -> None:
    """Raises `DataError` where two records have one token."""
    seen: set[str] = set()
    for row in rows:
        if row["token"] in seen:
            raise DataError(f"{path}: two records have the token {row['token']!r}; {_COPY}")
        seen.add(row["token"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
