"""The columns of a frame table: its schema, and frames as rows and back. One row is one `Frame`.

A frame's cameras are a list of structures; matrices are lists of a fixed size, stored row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slidr.data.frame_rules import stack
from slidr.data.storage import DataError
from slidr.types import Camera, Frame

CAMERA_MATRICES = {
    "intrinsics": (3, 3),
    "ego_from_camera": (4, 4),
    "global_from_ego": (4, 4),
    "camera_from_lidar": (4, 4),
}
FRAME_MATRICES = {"ego_from_lidar": (4, 4), "global_from_ego": (4, 4)}


def _matrix(shape: tuple[int, int]) -> pa.DataType:
    return pa.list_(pa.float64(), shape[0] * shape[1])


CAMERA = pa.struct(
    [
        ("channel", pa.string()),
        ("token", pa.string()),
        ("image_path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("timestamp", pa.int64()),
        *((name, _matrix(shape)) for name, shape in CAMERA_MATRICES.items()),
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
        *((name, _matrix(shape)) for name, shape in FRAME_MATRICES.items()),
        ("cameras", pa.list_(CAMERA)),
        ("previous", pa.string()),
        ("next", pa.string()),
        ("splits", pa.list_(pa.string())),
    ]
)
_SCALARS = ("token", "scene", "timestamp", "lidar_token", "lidar_path", "label_path", "previous", "next")
_CAMERA_SCALARS = ("channel", "token", "image_path", "width", "height", "timestamp")
_REFUSED = (pa.ArrowException, OverflowError, TypeError, ValueError)  # by pyarrow, of values of another type

Owner = Callable[[int], str]  # the name of row i in a message


def encode(frames: Sequence[Frame], table: str) -> pa.RecordBatch:
    """Frames as rows.

    Raises `DataError` for a matrix of another shape and a value of another type; `table` names the table's file.
    """
    flat = [(frame, camera) for frame in frames for camera in frame.cameras]

    def of_frame(i: int) -> str:
        return f"{table}: frame {frames[i].token!r} of {frames[i].scene!r}"

    def of_camera(i: int) -> str:
        return f"{table}: frame {flat[i][0].token!r} of {flat[i][0].scene!r}: {flat[i][1].channel}"

    columns: list[pa.Array] = []
    for field in SCHEMA:
        if field.name == "cameras":
            fields = [
                _values([getattr(camera, inner.name) for _, camera in flat], inner, of_camera) for inner in CAMERA
            ]
            offsets = np.concatenate([[0], np.cumsum([len(frame.cameras) for frame in frames])]).astype(np.int32)
            cameras = pa.StructArray.from_arrays(fields, fields=list(CAMERA))
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), cameras))
        else:
            columns.append(_values([getattr(frame, field.name) for frame in frames], field, of_frame))
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _values(values: Sequence[Any], field: pa.Field, owner: Owner) -> pa.Array:
    shape = FRAME_MATRICES.get(field.name) or CAMERA_MATRICES.get(field.name)
    if shape is not None:
        return _matrices(values, shape, field.name, owner)
    try:
        return pa.array(values, field.type)
    except _REFUSED:
        for i, value in enumerate(values):
            try:
                pa.array([value], field.type)
            except _REFUSED:
                raise DataError(f"{owner(i)}: {field.name}: expected {field.type}, got {value!r:.80}") from None
        raise


def _matrices(matrices: Sequence[np.ndarray], shape: tuple[int, int], name: str, owner: Owner) -> pa.FixedSizeListArray:
    arrays = []
    for i, matrix in enumerate(matrices):
        try:
            array = np.asarray(matrix, np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{owner(i)}: {name}: expected {shape} numbers, got {matrix!r:.80}") from None
        if array.shape != shape:
            raise DataError(f"{owner(i)}: {name}: got the shape {array.shape}; expected {shape}")
        arrays.append(array)
    values = np.array(arrays, np.float64).reshape(len(arrays), *shape)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), shape[0] * shape[1])


class Group:
    """Decoded rows: the columns as lists and arrays."""

    def __init__(self, table: pa.Table) -> None:
        batch = one_batch(table)
        self.scalars = {name: batch.column(name).to_pylist() for name in _SCALARS}
        self.splits = batch.column("splits").to_pylist()
        self.matrices = {name: stack(batch.column(name), shape) for name, shape in FRAME_MATRICES.items()}
        cameras = batch.column("cameras")
        self.first_camera = cameras.offsets.to_numpy()
        fields = cameras.values
        self.camera_scalars = {name: fields.field(name).to_pylist() for name in _CAMERA_SCALARS}
        self.camera_matrices = {n: stack(fields.field(n), shape) for n, shape in CAMERA_MATRICES.items()}

    def frame(self, row: int) -> Frame:
        """The frame of a row."""
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


def one_batch(table: pa.Table) -> pa.RecordBatch:
    """A table's rows as one batch."""
    batches = table.combine_chunks().to_batches()
    if len(batches) > 1:
        raise DataError(f"{table.num_rows} rows do not fit one batch; split the table")
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)
