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
PACKAGED = Path(__file__).with_name("costs.json")


class CostError(ValueError):
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
            if entry.name == name and all(entry.setting.get(key) == value for key, value in setting.items())
        ]
        return min(fitting, key=lambda entry: abs(math.log(entry.setting["pixels"] / pixels)), default=None)

    def plus(self, entries: Iterable[UnitCost]) -> Costs:
        """These and newer ones."""
        return Costs([*self, *entries])


def read_costs(path: str | Path = PACKAGED) -> Costs:
    """The measurements in a file. Raises `CostError` naming the entry that is none."""
    try:
        raw = json.loads(storage.read_bytes(path))
    except ValueError as error:
        raise CostError(f"{path}: is no file of unit costs ({error}); write one with slidr plan --measure") from None
    entries = []
    for number, values in enumerate(raw if isinstance(raw, list) else [raw]):
        try:
            entry = UnitCost(**values)
        except TypeError as error:
            raise CostError(f"{path}: entry {number}: {error}; write the file anew with slidr plan --measure") from None
        if entry.name not in get_args(CostName) or not entry.value >= 0:
            raise CostError(
                f"{path}: entry {number}: got {entry.name!r} = {entry.value!r}, expected a value of at least 0 for one "
                f"of {list(get_args(CostName))}"
            )
        entries.append(entry)
    return Costs(entries)


def write_costs(path: str | Path, costs: Costs) -> None:
    """Writes a file that `read_costs` reads back."""
    text = json.dumps([asdict(entry) for entry in costs], indent=2)
    storage.write_bytes_atomic(path, text.encode() + b"\n")
