"""The frame table: every keyframe of a data set in one parquet file, so that workers never parse its JSON.

One row is one `Frame` (`frame_columns`). The file's metadata hold the layout's number, the data set, a fingerprint of
the rows and digests that show damage (`frame_file`).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import pyarrow as pa

from slidr.config import DatasetName, MissingFiles, step_of
from slidr.data.frame_columns import Group
from slidr.data.frame_file import ALLOW_MISSING, LEFT_OUT, ROW_GROUP, TableFile, write_table
from slidr.data.image_list import ImageList, ImageRef, of_cameras
from slidr.data.splits import every, every_counted
from slidr.data.storage import DataError
from slidr.shapes import Bool, Int64
from slidr.types import Frame
from slidr.urls import redact_url

__all__ = ["ROW_GROUP", "FrameTable", "ImageRef", "open_table", "read_frames", "write_frames"]

_CACHED_GROUPS = 32


def write_frames(
    frames: Iterable[Frame],
    path: str,
    dataset: DatasetName = "nuscenes",
    allow_missing: MissingFiles | None = None,
    left_out: str = "",
) -> str:
    """Writes the frame table, in the order given; returns its fingerprint.

    `dataset` says what a label fraction counts: scenes for nuScenes, scans for SemanticKITTI. `allow_missing` and
    `left_out` (a sentence) record what a download that is not whole lacks. Raises `DataError` naming the frame, the
    camera, the field and the value where a frame breaks a rule of `frame_rules`.
    """
    if dataset not in get_args(DatasetName):
        raise DataError(f"{path}: dataset {dataset!r}; expected one of {list(get_args(DatasetName))}")
    notes = {} if allow_missing is None else {ALLOW_MISSING: allow_missing, LEFT_OUT: left_out}
    return write_table(frames, path, dataset, notes)


def read_frames(path: str) -> list[Frame]:
    """Every frame of a table; for a large one, see `FrameTable`."""
    return list(FrameTable.open(path))


def open_table(path: str, dataset: DatasetName) -> FrameTable:
    """The frame table that a job uses: `data.frames` and `data.dataset`. Every job and the doctor open it here.

    Raises `DataError` where it is missing or damaged, or holds another data set.
    """
    table = FrameTable.open(path)
    if table.dataset != dataset:
        raise DataError(
            f"{redact_url(path)}: holds frames of {table.dataset}, but data.dataset is {dataset}; set data.dataset: "
            f"{table.dataset}, or data.frames to a table of {dataset}"
        )
    return table


class FrameTable(Sequence[Frame]):
    """Some rows of a frame table file, in its order, decoded when asked for.

    Opening reads tokens, scenes and splits only. Pickled, it is its path and its row numbers.
    """

    def __init__(self, path: str, rows: Int64[np.ndarray, " N"] | None = None) -> None:
        self.path = path
        self._file = TableFile(path)
        self.dataset: DatasetName = self._file.dataset
        self.fingerprint = self._file.fingerprint
        self._group_starts = self._file.group_starts
        self._rows = np.arange(self._group_starts[-1]) if rows is None else np.asarray(rows, np.int64)
        self._groups: OrderedDict[int, Group] = OrderedDict()
        self._light: pa.Table | None = None
        self._lock = threading.Lock()  # threads of a loader share one table

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FrameTable:
        """The table in a file. Raises `DataError` where it is missing or no frame table."""
        return cls(os.fspath(path))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        row = int(self._rows[index])
        number = int(np.searchsorted(self._group_starts, row, side="right")) - 1
        return self._group(number).frame(row - int(self._group_starts[number]))

    def __iter__(self) -> Iterator[Frame]:
        return (self[i] for i in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameTable, (self.path, self._rows)

    @property
    def allow_missing(self) -> MissingFiles | None:
        """The `data.allow_missing` that the table was written with."""
        return self._file.allow_missing

    @property
    def left_out(self) -> str:
        """What the table lacks of the data set's tables, as a sentence."""
        return self._file.metadata.get(LEFT_OUT, "")

    def verify(self) -> None:
        """Reads the whole file. Raises `DataError` where it is damaged."""
        self._file.verify()

    @property
    def tokens(self) -> list[str]:
        """The frames' tokens."""
        return self._column("token").to_pylist()

    @property
    def unlabelled(self) -> int:
        """How many of the frames have no point labels."""
        return self._read("label_path").null_count

    @property
    def lidar_paths(self) -> list[str]:
        """The frames' sweeps, relative to the dataroot."""
        return self._read("lidar_path").to_pylist()

    @property
    def label_paths(self) -> list[str | None]:
        """The frames' point labels, relative to the dataroot; None for a frame that has none."""
        return self._read("label_path").to_pylist()

    @property
    def scenes(self) -> list[str]:
        """The frames' distinct scenes, in table order."""
        return list(dict.fromkeys(self._column("scene").to_pylist()))

    def take(self, indices: Int64[np.ndarray, " M"]) -> FrameTable:
        """The frames at these places, in this order."""
        return FrameTable(self.path, self._rows[np.asarray(indices, np.int64)])

    def select(self, split: str | Sequence[str], fraction: float = 1.0) -> FrameTable:
        """The frames of a split ("all": every frame) or of any of several, or a part of them.

        A fraction takes the k-th, 2k-th, ... scene of the split in table order, k = `step_of(fraction)`; of
        SemanticKITTI, the first scan in order of name and every k-th from there. Raises `DataError` where the
        table has no frame of the split, or fewer than k scenes.
        """
        splits = [split] if isinstance(split, str) else list(split)
        inside = np.ones(len(self), bool) if "all" in splits else self._in_any(splits)
        if not inside.any():
            raise DataError(
                f"{self.path}: no frame is in split {' or '.join(splits)}; the table has {self._split_sizes()}; "
                "choose one of these in data.train_split and data.val_split, or all for every frame"
            )
        unit = "token" if self.dataset == "semantic_kitti" else "scene"
        names = self._column(unit).to_numpy(zero_copy_only=False)
        distinct = list(dict.fromkeys(names[inside]))
        chosen = every(sorted(distinct), fraction) if unit == "token" else every_counted(distinct, fraction)
        if not chosen:
            raise DataError(
                f"{self.path}: data.train_fraction {fraction:g} takes every {step_of(fraction)}th scene, and split "
                f"{' or '.join(splits)} has {len(distinct)}; take at least {1 / len(distinct):.3g}"
            )
        return self.take(np.flatnonzero(inside & np.isin(names.astype(str), chosen)))

    def images(self, channels: Sequence[str] | None = None) -> list[ImageRef]:
        """The images of the frames' cameras (those of some channels), frame after frame; see also `image_list`."""
        return list(self.image_list(channels))

    def image_list(self, channels: Sequence[str] | None = None) -> ImageList:
        """`images` as columns, for millions of them."""
        names = ("channel", "token", "image_path", "width", "height")
        columns = [f"cameras.list.element.{name}" for name in names]
        cameras = self._file.read(columns).column("cameras").combine_chunks()
        lists = cameras.take(pa.array(self._rows)) if len(self) else cameras[:0]
        return of_cameras(lists.flatten(), channels)

    def lacking(self, channels: Sequence[str]) -> dict[str, int]:
        """How many of the frames have no image of each of these cameras; those that every frame has are left out."""
        there = self._has(channels).sum(0).tolist()
        return {name: len(self) - count for name, count in zip(channels, there, strict=True) if count < len(self)}

    def blind(self, channels: Sequence[str]) -> int:
        """How many of the frames have an image of none of these cameras."""
        return int((~self._has(channels).any(1)).sum())

    def _has(self, channels: Sequence[str]) -> Bool[np.ndarray, "N C"]:
        """Whether each frame has each of these cameras."""
        cameras = self._file.read(["cameras.list.element.channel"]).column("cameras").combine_chunks()
        lists = cameras.take(pa.array(self._rows)) if len(self) else cameras[:0]
        names = lists.flatten().field("channel").to_numpy(zero_copy_only=False).astype(str)
        frame_of_camera = np.repeat(np.arange(len(self)), lists.value_lengths().to_numpy())
        has = np.zeros((len(self), len(channels)), bool)
        for i, channel in enumerate(channels):
            has[frame_of_camera[names == channel], i] = True
        return has

    def _read(self, name: str) -> pa.ChunkedArray:
        """A column that opening does not read."""
        column = self._file.read([name]).column(name)
        return column.take(pa.array(self._rows))

    def _in_any(self, splits: list[str]) -> np.ndarray:
        lists = self._column("splits")
        inside = np.zeros(len(self), bool)
        hit = np.isin(lists.flatten().to_numpy(zero_copy_only=False).astype(str), splits)
        inside[np.repeat(np.arange(len(self)), np.diff(lists.offsets.to_numpy()))[hit]] = True
        return inside

    def _split_sizes(self) -> str:
        splits = self._column("splits")
        sizes = [f"{c['values']} ({c['counts']} frames)" for c in splits.flatten().value_counts().to_pylist()]
        without = [row for row, names in enumerate(splits.to_pylist()) if not names]
        if without:
            scenes = dict.fromkeys(self._column("scene").take(pa.array(without)).to_pylist())
            shown = ", ".join(list(scenes)[:3]) + (", ..." if len(scenes) > 3 else "")
            sizes.append(f"{len(without)} frames of scenes that are in no official split ({shown})")
        return ", ".join(sizes) or "no frames at all"

    def _column(self, name: str) -> pa.Array:
        if self._light is None:
            columns = ["token", "scene", "splits.list.element"]
            whole = self._file.read(columns)
            self._light = whole.take(pa.array(self._rows)).combine_chunks()
        column = self._light.column(name)
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def _group(self, number: int) -> Group:
        """A decoded row group; the ones used last are kept."""
        with self._lock:
            group = self._groups.pop(number, None)
            if group is None:
                group = Group(self._file.read_group(number))
                if len(self._groups) >= _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            self._groups[number] = group
            return group
