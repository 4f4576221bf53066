"""A JSON record is what it should be, or an error names the file and the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slidr.data.records import parse_json, read_record
from slidr.data.storage import DataError

_KEYS = {"name": str, "steps": int, "score": (float, type(None))}


def _read(folder: Path, text: str | bytes) -> dict[str, object]:
    path = folder / "end.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_record(path, _KEYS)


def test_a_sound_record_comes_back_with_its_further_keys(tmp_path: Path) -> None:
    record = {"name": "a", "steps": 3, "score": 1, "later": [1]}
    assert _read(tmp_path, json.dumps(record)) == record


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        b"\xff\xfe",
        "[" * 100_000,
        "[]",
        "null",
        '{"name": "a", "steps": 3}',
        '{"name": ["a"], "steps": 3, "score": null}',
        '{"name": "a", "steps": true, "score": null}',
        '{"name": "a", "steps": 3.5, "score": null}',
        '{"name": "a", "steps": 3, "score": NaN}',
        '{"name": "a", "steps": 9223372036854775808, "score": null}',
        '{"name": "a", "steps": 3, "score": 1180591620717411303424}',
        '{"name": "a", "steps": 3, "score": 1e999}',
        '{"name": "a", "steps": ' + "9" * 5000 + ', "score": 1}',
    ],
)
def test_a_damaged_record_is_an_error_that_names_the_file(tmp_path: Path, text: str | bytes) -> None:
    with pytest.raises(DataError, match=r"end\.json: "):
        _read(tmp_path, text)


def test_an_error_about_a_remote_record_shows_no_secret() -> None:
    with pytest.raises(DataError, match=r"^s3://bucket/end\.json: is not readable JSON"):
        parse_json(b"{", "s3://KEY:SECRET@bucket/end.json?token=1")
