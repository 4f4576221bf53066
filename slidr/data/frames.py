"""The frame table: every keyframe of a data set in one parquet file, so that workers never parse its JSON.

One row is one `Frame`; its cameras are a list of structures, its matrices fixed-size lists (row by row). The
file's metadata hold the layout's number, the data set and a fingerprint of the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slidr.config import DatasetName, step_of
from slidr.data import storage
from slidr.data.image_list import ImageList, ImageRef, of_cameras
from slidr.data.splits import every, every_counted
from slidr.data.storage import DataError
from slidr.shapes import Int64
from slidr.types import Camera, Frame

LAYOUT = 1
ROW_GROUP = 256  # frames that are read and decoded together: about 1 MB and 5 ms
_CACHED_GROUPS = 32
_LAYOUT_KEY, _DATASET_KEY, _FINGERPRINT_KEY = b"slidr.layout", b"slidr.dataset", b"slidr.fingerprint"

_CAMERA_MATRICES = {
    "intrinsics": (3, 3),
    "ego_from_camera": (4, 4),
    "global_from_ego": (4, 4),
    "camera_from_lidar": (4, 4),
}
_FRAME_MATRICES = {"ego_from_lidar": (4, 4), "global_from_ego": (4, 4)}


def _matrix(shape: tuple[int, int]) -> pa.DataType:
    return pa.list_(pa.float64(), shape[0] * shape[1])


_CAMERA = pa.struct(
    [
        ("channel", pa.string()),
        ("token", pa.string()),
        ("image_path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("timestamp", pa.int64()),
        *((name, _matrix(shape)) for name, shape in _CAMERA_MATRICES.items()),
    ]
)
SCHEMA = pa.schema(
    [
        ("token", pa.string()),
        ("scene", pa.string()),
        ("timestamp", pa.int64()),
        ("lidar_token", pa.string()),
        ("lidar_path", pa.string()),
        ("label_path", pa.string()),
        *((name, _matrix(shape)) for name, shape in _FRAME_MATRICES.items()),
        ("cameras", pa.list_(_CAMERA)),
        ("previous", pa.string()),
        ("next", pa.string()),
        ("splits", pa.list_(pa.string())),
    ]
)
_SCALARS = ("token", "scene", "timestamp", "lidar_token", "lidar_path", "label_path", "previous", "next")
_CAMERA_SCALARS = ("channel", "token", "image_path", "width", "height", "timestamp")


def write_frames(frames: Iterable[Frame], path: str, dataset: DatasetName = "nuscenes") -> str:
    """Writes the frame table, in the order given; returns its fingerprint.

    `dataset` says what a label fraction counts: scenes for nuScenes, scans for SemanticKITTI.
    """
    if dataset not in get_args(DatasetName):
        raise DataError(f"{path}: dataset {dataset!r}; expected one of {list(get_args(DatasetName))}")
    digest = hashlib.sha256(dataset.encode())
    sink = pa.BufferOutputStream()
    stream = iter(frames)
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd") as writer:
        while group := list(islice(stream, ROW_GROUP)):
            batch = _encode(group)
            _update(digest, batch)
            writer.write_table(pa.Table.from_batches([batch]), row_group_size=ROW_GROUP)
        writer.add_key_value_metadata(
            {
                _LAYOUT_KEY: str(LAYOUT).encode(),
                _DATASET_KEY: dataset.encode(),
                _FINGERPRINT_KEY: digest.hexdigest().encode(),
            }
        )
    storage.write_bytes_atomic(path, sink.getvalue().to_pybytes())
    return digest.hexdigest()


def read_frames(path: str) -> list[Frame]:
    """Every frame of a table; for a large one, see `FrameTable`."""
    return list(FrameTable.open(path))


class FrameTable(Sequence[Frame]):
    """Some rows of a frame table file, in its order, decoded when asked for.

    Opening reads tokens, scenes and splits only. Pickled, it is its path and its row numbers.
    """

    def __init__(self, path: str, rows: Int64[np.ndarray, " N"] | None = None) -> None:
        self.path = path
        self._file = _open(path)
        metadata = self._file.metadata.metadata or {}
        if metadata.get(_LAYOUT_KEY, b"").decode() != str(LAYOUT):
            raise DataError(
                f"{path}: expected a frame table of layout {LAYOUT}, got "
                f"{metadata.get(_LAYOUT_KEY, b'none').decode()}; write it anew with `slidr frames`"
            )
        self.dataset: str = metadata[_DATASET_KEY].decode()
        self.fingerprint: str = metadata[_FINGERPRINT_KEY].decode()
        self._group_starts = _group_starts(self._file)
        self._rows = np.arange(self._group_starts[-1]) if rows is None else np.asarray(rows, np.int64)
        self._groups: OrderedDict[int, _Group] = OrderedDict()
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
                "choose one of these in data.train_split and data.val_split"
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
        cameras = _guarded(self.path, lambda: self._file.read(columns=columns)).column("cameras").combine_chunks()
        lists = cameras.take(pa.array(self._rows)) if len(self) else cameras[:0]
        return of_cameras(lists.flatten(), channels)

    def _read(self, name: str) -> pa.ChunkedArray:
        """A column that opening does not read."""
        column = _guarded(self.path, lambda: self._file.read(columns=[name])).column(name)
        return column.take(pa.array(self._rows))

    def _in_any(self, splits: list[str]) -> np.ndarray:
        lists = self._column("splits")
        inside = np.zeros(len(self), bool)
        hit = np.isin(lists.flatten().to_numpy(zero_copy_only=False).astype(str), splits)
        inside[np.repeat(np.arange(len(self)), np.diff(lists.offsets.to_numpy()))[hit]] = True
        return inside

    def _split_sizes(self) -> str:
        counts = self._column("splits").flatten().value_counts().to_pylist()
        return ", ".join(f"{c['values']} ({c['counts']} frames)" for c in counts) or "no frames at all"

    def _column(self, name: str) -> pa.Array:
        if self._light is None:
            columns = ["token", "scene", "splits.list.element"]
            whole = _guarded(self.path, lambda: self._file.read(columns=columns))
            self._light = whole.take(pa.array(self._rows)).combine_chunks()
        column = self._light.column(name)
        return column.chunk(0) if column.num_chunks else pa.array([], column.type)

    def _group(self, number: int) -> _Group:
        """A decoded row group; the ones used last are kept."""
        with self._lock:
            group = self._groups.pop(number, None)
            if group is None:
                group = _Group(_guarded(self.path, lambda: self._file.read_row_group(number)))
                if len(self._groups) >= _CACHED_GROUPS:
                    self._groups.popitem(last=False)
            self._groups[number] = group
            return group


class _Group:
    """A row group's columns as lists and arrays."""

    def __init__(self, table: pa.Table) -> None:
        batch = table.combine_chunks().to_batches()[0]
        self.scalars = {name: batch.column(name).to_pylist() for name in _SCALARS}
        self.splits = batch.column("splits").to_pylist()
        self.matrices = {name: _stack(batch.column(name), shape) for name, shape in _FRAME_MATRICES.items()}
        cameras = batch.column("cameras")
        self.first_camera = cameras.offsets.to_numpy()
        fields = cameras.values
        self.camera_scalars = {name: fields.field(name).to_pylist() for name in _CAMERA_SCALARS}
        self.camera_matrices = {n: _stack(fields.field(n), shape) for n, shape in _CAMERA_MATRICES.items()}

    def frame(self, row: int) -> Frame:
        return Frame(
            **{name: values[row] for name, values in self.scalars.items()},
            **{name: values[row].copy() for name, values in self.matrices.items()},
            cameras=tuple(self._camera(i) for i in range(self.first_camera[row], self.first_camera[row + 1])),
            splits=tuple(self.splits[row]),
        )

    def _camera(self, index: int) -> Camera:
        return Camera(
            **{name: values[index] for name, values in self.camera_scalars.items()},
            **{name: values[index].copy() for name, values in self.camera_matrices.items()},
        )


def _stack(column: pa.FixedSizeListArray, shape: tuple[int, int]) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)


def _encode(frames: Sequence[Frame]) -> pa.RecordBatch:
    columns: dict[str, pa.Array] = {}
    for name in SCHEMA.names:
        kind = SCHEMA.field(name).type
        if name == "cameras":
            columns[name] = _encode_cameras([frame.cameras for frame in frames])
        elif name in _FRAME_MATRICES:
            columns[name] = _encode_matrices([getattr(frame, name) for frame in frames], _FRAME_MATRICES[name])
        else:
            columns[name] = pa.array([getattr(frame, name) for frame in frames], kind)
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def _encode_cameras(cameras: Sequence[tuple[Camera, ...]]) -> pa.ListArray:
    flat = [camera for frame in cameras for camera in frame]
    fields = [
        _encode_matrices([getattr(camera, field.name) for camera in flat], _CAMERA_MATRICES[field.name])
        if field.name in _CAMERA_MATRICES
        else pa.array([getattr(camera, field.name) for camera in flat], field.type)
        for field in _CAMERA
    ]
    offsets = np.concatenate([[0], np.cumsum([len(frame) for frame in cameras])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(fields, fields=list(_CAMERA)))


def _encode_matrices(matrices: Sequence[np.ndarray], shape: tuple[int, int]) -> pa.FixedSizeListArray:
    values = np.asarray(matrices, np.float64).reshape(len(matrices), *shape)  # a wrong shape fails here
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), shape[0] * shape[1])


def _update(digest: Any, batch: pa.RecordBatch) -> None:
    """Feeds the rows to the fingerprint: what a frame is and where its files are."""
    for row in batch.select(["token", "lidar_path", "label_path", "splits"]).to_pylist():
        digest.update(json.dumps(row, sort_keys=True).encode())
    cameras = batch.column("cameras").values
    digest.update(json.dumps(cameras.field("token").to_pylist()).encode())
    for name in _CAMERA_MATRICES:
        digest.update(np.ascontiguousarray(cameras.field(name).flatten().to_numpy(zero_copy_only=False)))


def _open(path: str) -> pq.ParquetFile:
    if not storage.exists(path):
        raise DataError(f"{path}: there is no frame table; write it with `slidr frames CONFIG`")
    return _guarded(path, lambda: pq.ParquetFile(storage.open_read(path), pre_buffer=True))


def _guarded(path: str, read: Any) -> Any:
    try:
        return read()
    except (pa.ArrowInvalid, pa.ArrowIOError, KeyError) as error:
        raise DataError(f"{path}: is no readable frame table ({error}); write it anew with `slidr frames`") from error


def _group_starts(file: pq.ParquetFile) -> Int64[np.ndarray, " G"]:
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
