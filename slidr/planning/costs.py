"""Unit costs: what one image, sample or frame takes, each with the machine, day and command that measured it.

The package's own are in `costs.json`, one entry a measurement. `slidr plan --measure` adds this machine's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from slidr.data import storage
from slidr.data.records import Types, read_json, require_record
from slidr.data.storage import DataError
from slidr.urls import RedactedError

CostName = Literal[
    "slic",  # CPU s an image
    "label_map",  # bytes an image
    "superpixel_job",  # s an image, of the whole job's, whatever the number of CPUs: listing, scheduling, writing
    "sample",  # CPU s a keyframe: decoding, pairing, augmentation, voxels
    "train_frame",  # s a keyframe on one worker: forward, backward, update
    "validate_frame",  # s a keyframe on one worker
    "worker_memory",  # bytes of a training worker's process
]
UNITS: dict[CostName, str] = {
    "slic": "CPU s/image",
    "label_map": "bytes/image",
    "superpixel_job": "s/image",
    "sample": "CPU s/keyframe",
    "train_frame": "s/keyframe",
    "validate_frame": "s/keyframe",
    "worker_memory": "bytes/worker",
}
_BY_SIZE = ("slic", "label_map")  # of images, so that the size belongs to the setting
_MOST = 1e18  # above any measurement
PACKAGED = Path(__file__).with_name("costs.json")


class CostError(RedactedError, ValueError):
    """A file of unit costs that cannot be used."""


@dataclass(frozen=True)
class UnitCost:
    """One measurement: `value` in `UNITS[name]`, for what `setting` says, and where it comes from."""

    name: CostName
    value: float
    setting: dict[str, Any]
    machine: str
    date: str  # YYYY-MM-DD
    command: str

    @property
    def unit(self) -> str:
        return UNITS[self.name]


class Costs:
    """Measurements, the newest last; a later one of the same name and setting replaces the earlier."""

    def __init__(self, entries: Iterable[UnitCost] = ()) -> None:
        self._entries: dict[str, UnitCost] = {}
        for entry in entries:
            key = json.dumps([entry.name, entry.setting], sort_keys=True)
            self._entries.pop(key, None)
            self._entries[key] = entry

    def __iter__(self) -> Any:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, name: CostName, **setting: Any) -> UnitCost | None:
        """The newest measurement of that name whose setting has these values; None where nobody measured it."""
        wanted = json.loads(json.dumps(setting))
        for entry in reversed(list(self)):
            if entry.name == name and all(entry.setting.get(key) == value for key, value in wanted.items()):
                return entry
        return None

    def nearest(self, name: CostName, pixels: float, **setting: Any) -> UnitCost | None:
        """As `find`, of images whose size is nearest to that many pixels; the newest of equals."""
        fitting = [
            entry
            for entry in reversed(list(self))
            if entry.name == name
            and "pixels" in entry.setting
            and all(entry.setting.get(key) == value for key, value in setting.items())
        ]
        return min(fitting, key=lambda entry: abs(math.log(entry.setting["pixels"] / pixels)), default=None)

    def plus(self, entries: Iterable[UnitCost]) -> Costs:
        """These and newer ones."""
        return Costs([*self, *entries])


def read_costs(path: str | Path = PACKAGED) -> Costs:
    """The measurements in a file. Raises `CostError` naming the file and the entry that cannot be used."""
    try:
        raw = read_json(path, next_step=_AGAIN)
        rows = raw if isinstance(raw, list) else [raw]
        return Costs(_entry(values, f"{path}: entry {number}") for number, values in enumerate(rows))
    except DataError as error:
        raise CostError(str(error)) from None


_AGAIN = "write one with slidr plan --measure --costs FILE"
_FIELDS: dict[str, Types] = {
    "name": str, "value": float, "setting": dict, "machine": str, "date": str, "command": str
}  # fmt: skip


def _entry(raw: Any, name: str) -> UnitCost:
    """The measurement of an entry, `name`d in errors. Raises `DataError` for what is not one."""
    values = require_record(raw, name, _FIELDS, next_step=_AGAIN)
    unknown = sorted(values.keys() - _FIELDS.keys())
    if unknown:
        raise DataError(f"{name}: unknown keys {', '.join(unknown)[:200]}; {_AGAIN}")
    if values["name"] not in get_args(CostName) or not 0 <= values["value"] < _MOST:
        raise DataError(
            f"{name}: got {values['name'][:80]!r} = {values['value']!r:.80}, expected a value of at least 0 for one of "
            f"{list(get_args(CostName))}; {_AGAIN}"
        )
    pixels = values["setting"].get("pixels", 1 if values["name"] not in _BY_SIZE else None)
    if type(pixels) not in (int, float) or not 0 < pixels < _MOST:
        raise DataError(f"{name}: setting.pixels: expected the pixels of an image, got {pixels!r:.80}; {_AGAIN}")
    return UnitCost(**values)


def write_costs(path: str | Path, costs: Costs) -> None:
    """Writes a file that `read_costs` reads back."""
    text = json.dumps([asdict(entry) for entry in costs], indent=2)
    storage.write_bytes_atomic(path, text.encode() + b"\n")
