"""Damaged files of unit costs, as passed by --costs: each is an error that names the file and the entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slidr.planning.costs import CostError, Costs, UnitCost, read_costs, write_costs

WHOLE: dict[str, Any] = {
    "name": "slic",
    "value": 1.5,
    "setting": {"pixels": 1440000, "segments": 150},
    "machine": "m",
    "date": "2026-11-28",
    "command": "c",
}


def entry(**changes: Any) -> str:
    return json.dumps([WHOLE, {**WHOLE, **changes}])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not readable JSON"),
        ("[" * 100_000, "nested too deeply|not readable JSON"),
        ("\xff\x00", "not readable JSON"),
        ("3", "entry 0: expected a JSON object, got int"),
        ("[3]", "entry 0: expected a JSON object, got int"),
        ("[[]]", "entry 0: expected a JSON object, got list"),
        ("{}", "entry 0: key 'name' is missing"),
        (entry(name="coffee"), "entry 1: got 'coffee'"),
        (entry(name=["slic"]), "entry 1: name: expected str"),
        (entry(value="1.5"), "entry 1: value: expected float"),
        (entry(value=float("nan")), "entry 1: value: expected float, got nan"),
        (entry(value=float("inf")), "entry 1: value: expected float, got inf"),
        (entry(value=-1.0), "entry 1: got 'slic' = -1.0"),
        (entry(value=10**400), "entry 1: (value: expected float|got .slic. = 1000)"),
        (entry(setting=[]), "entry 1: setting: expected dict"),
        (entry(setting={}), "entry 1: setting.pixels: expected the pixels of an image, got None"),
        (entry(setting={"pixels": 0}), "entry 1: setting.pixels: expected the pixels of an image, got 0"),
        (entry(setting={"pixels": "many"}), "entry 1: setting.pixels"),
        (entry(setting={"pixels": float("nan")}), "entry 1: setting.pixels"),
        (entry(machine=None), "entry 1: machine: expected str, got None"),
        (entry(colour="red"), "entry 1: unknown keys colour"),
    ],
)
def test_a_damaged_file_of_costs_is_named_with_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "costs.json").write_text(text, encoding="latin-1")
    with pytest.raises(CostError, match=says) as refused:
        read_costs(tmp_path / "costs.json")
    assert str(refused.value).startswith(f"{tmp_path}/costs.json: ")
    assert "slidr plan --measure" in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_missing_file_of_costs_is_named(tmp_path: Path) -> None:
    with pytest.raises(CostError, match=r"none\.json: cannot be read"):
        read_costs(tmp_path / "none.json")


def test_whole_files_are_read_and_sizes_are_sought_among_the_entries_that_have_one(tmp_path: Path) -> None:
    sized = UnitCost("sample", 2.0, {"job": "pretrain", "pixels": 100}, "m", "d", "c")
    without = UnitCost("sample", 3.0, {"job": "pretrain", "dataset": "nuscenes"}, "m", "d", "c")
    write_costs(tmp_path / "costs.json", Costs([sized, without]))
    assert list(read_costs(tmp_path / "costs.json")) == [sized, without]
    assert read_costs(tmp_path / "costs.json").nearest("sample", 144.0, job="pretrain") == sized
