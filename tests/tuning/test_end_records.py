"""Damaged records of ended jobs: each is an error that names its file; what was written comes back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.data.storage import DataError
from slidr.training.runs import RunFolder
from slidr.tuning.jobs import End, end_from_json, end_to_json, read_end, write_end

WHOLE = {
    "status": "finished",
    "score": 0.5,
    "reason": None,
    "curve": [[1.0, 0.4], [2.0, 0.5]],
    "steps": 4,
    "seconds": 1,
}


def record(**changes: object) -> str:
    return json.dumps({**WHOLE, **changes})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not readable JSON"),
        ('{"status": "finished", "sco', "not readable JSON"),
        ("[" * 100_000, "nested too deeply|not readable JSON"),
        ("\x00\xff\xfe", "not readable JSON"),
        ("[]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ("3", "expected a JSON object, got int"),
        ("{}", "key 'status' is missing"),
        (record(status="done"), "status: expected one of finished, pruned, failed, got 'done'"),
        (record(status=None), "status: expected str"),
        (record(score=None), "score: expected a mIoU"),
        (record(score=math.nan), "score: expected float or null, got nan"),
        (record(score=math.inf), "score: expected float or null, got inf"),
        (record(score=5.5), "score: expected a mIoU from 0 to 1 as the job is finished, got 5.5"),
        (record(score=True), "score: expected float or null, got True"),
        (record(score="0.5"), "score: expected float or null"),
        (record(status="failed"), "score: expected null as the job is failed, got 0.5"),
        (record(curve={}), "curve: expected list"),
        (record(curve=[1.0]), "curve: expected pairs"),
        (record(curve=[[1.0]]), "curve: expected pairs"),
        (record(curve=[[1.0, "x"]]), "curve: expected pairs"),
        (record(curve=[[math.nan, 0.5]]), "curve: expected pairs"),
        (record(curve=[[1e300, 7.0]]), "curve: expected pairs"),
        (record(curve=[[10**400, 10**400]]), "curve: expected pairs"),
        (record(steps=1.5), "steps: expected int"),
        (record(steps=-1), "no negative numbers"),
        (record(seconds=math.nan), "seconds: expected float"),
        (record(reason=3), "reason: expected str or null"),
    ],
)
def test_a_damaged_record_is_named_with_what_is_wrong_and_what_to_do(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "end.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=says) as refused:
        read_end(RunFolder(str(tmp_path)))
    assert str(refused.value).startswith(f"{tmp_path}/end.json: ")
    assert "remove it: the same command" in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_record_that_is_a_folder_or_huge_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "end.json").mkdir()
    with pytest.raises(DataError, match=r"end\.json: is a folder"):
        read_end(RunFolder(str(tmp_path)))
    (tmp_path / "end.json").rmdir()
    with (tmp_path / "end.json").open("wb") as file:
        file.truncate(10 * 2**30)  # sparse
    with pytest.raises(DataError, match=r"end\.json: holds 10737418240 bytes"):
        read_end(RunFolder(str(tmp_path)))


scores = st.floats(0, 1)
curves = st.lists(st.tuples(st.floats(0, 1e6), scores), max_size=4).map(tuple)
ends = st.one_of(
    st.builds(End, st.sampled_from(["finished", "pruned"]), scores, st.none() | st.text(), curves, st.integers(0, 9)),
    st.builds(End, st.just("failed"), st.none(), st.text(), curves, st.integers(0, 9)),
)


@given(ends)
def test_what_was_written_comes_back_exactly(end: End) -> None:
    assert end_from_json(end_to_json(end)) == end


def test_records_of_other_versions_are_read(tmp_path: Path) -> None:
    """An earlier one may lack a field, a later one have more; a failed training may have no mIoU at a validation."""
    folder = RunFolder(str(tmp_path))
    assert end_from_json('{"status": "finished", "score": 1}') == End("finished", 1)
    assert end_from_json(record(machine="elsewhere")) == End("finished", 0.5, None, ((1.0, 0.4), (2.0, 0.5)), 4, 1)
    write_end(folder, End("failed", reason="the score is nan", curve=((1.0, math.nan),)))
    read = read_end(folder)
    assert read is not None
    assert math.isnan(read.curve[0][1])


@pytest.mark.parametrize("key", ["score", "curve", "steps", "seconds"])
def test_a_key_with_a_damaged_letter_is_not_taken_for_an_absent_one(key: str) -> None:
    damaged = {**WHOLE, "status": "failed", "score": None}
    damaged[f"x{key[1:]}"] = damaged.pop(key)
    with pytest.raises(DataError, match=rf"end\.json: unknown key 'x{key[1:]}' and no {key}; copy the file again"):
        end_from_json(json.dumps(damaged), "end.json")


def test_a_count_that_no_table_could_keep_is_refused() -> None:
    with pytest.raises(DataError, match=r"end\.json: steps: expected int"):
        end_from_json(record(steps=2**70), "end.json")
