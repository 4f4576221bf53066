"""The rules for frames of any origin: names, sizes and matrices with which later steps can work.

One set of rules for the frames that `write_frames` gets and for rows of tables that other programs wrote.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from slidr.config import DatasetName
from slidr.data.label_maps import name_problem
from slidr.data.storage import DataError
from slidr.shapes import Bool, Float, Float64

LARGEST_IMAGE = 65_535  # pixels of a side, as in JPEG
ORTHONORMAL = 5e-3  # how far an entry of R R^T may be from the identity's; three decimals of R are up to 1.8e-3 off
FARTHEST = 1e8  # m; the Earth's circumference is 4e7


def path_problem(path: str) -> str | None:
    """Why a path is not one inside the data root, or None where it is."""
    if not path:
        return "is empty"
    if "\\" in path:
        return "has backslashes, as tables made on Windows do; expected '/' between folders"
    if _control(path):
        return "has control characters"
    if posixpath.isabs(path) or ".." in path.split("/") or "://" in path:
        return "leaves the data root; expected a relative path without '..'"
    return None


def transform_problem(matrix: Float[np.ndarray, "4 4"]) -> str | None:
    """Why a matrix is not a rigid transform (a rotation and a translation in metres), or None where it is."""
    if not np.isfinite(matrix).all():
        return "is not finite"
    if np.abs(matrix[3] - [0, 0, 0, 1]).max() > ORTHONORMAL:
        return f"has the last row {matrix[3].tolist()}; expected 0 0 0 1"
    rotation = matrix[:3, :3]
    if np.abs(rotation).max() > 2 or np.abs(rotation @ rotation.T - np.eye(3)).max() > ORTHONORMAL:
        return f"has no rotation in its upper left 3 x 3 block: {rotation.tolist()}"
    if np.linalg.det(rotation) < 0:
        return f"is mirrored: its upper left 3 x 3 block {rotation.tolist()} has determinant -1; expected +1"
    if np.abs(matrix[:3, 3]).max() > FARTHEST:
        return f"moves by {matrix[:3, 3].tolist()}; expected metres, at most {FARTHEST:g}"
    return None


def intrinsics_problem(matrix: Float[np.ndarray, "3 3"]) -> str | None:
    """Why a matrix is not a pinhole camera's, or None where it is."""
    if not np.isfinite(matrix).all():
        return f"is not finite: {matrix.tolist()}"
    if np.abs(matrix[2] - [0, 0, 1]).max() > 1e-6:
        return f"has the last row {matrix[2].tolist()}; expected 0 0 1"
    if not (matrix[0, 0] > 0 and matrix[1, 1] > 0):
        return f"has focal lengths {matrix[0, 0]:g} and {matrix[1, 1]:g}; expected positive ones, in pixels"
    if not np.linalg.det(matrix[:2, :2]) > 0:
        return f"cannot be inverted: {matrix.tolist()}"
    return None


class FrameRules:
    """The rules for the rows of one table, given in batches of the table's schema, in order.

    A table of an `earlier` version may have scenes without a name or in several parts: both train as they did then.
    """

    def __init__(self, name: str, dataset: DatasetName, earlier: bool = False) -> None:
        self._name = name
        self._dataset = dataset
        self._earlier = earlier
        self._tokens: set[str] = set()
        self._scenes: set[str] = set()
        self._scene: str | None = None  # the last row's
        self._images: dict[str, int] = {}  # a hash of the path and the size of each image token

    def check(self, batch: pa.RecordBatch) -> None:
        """Raises `DataError` naming the frame, the camera, the field and the value that breaks a rule."""
        self._check_nulls(batch)
        tokens, scenes = batch.column("token").to_pylist(), batch.column("scene").to_pylist()
        lists = batch.column("cameras")
        cameras = lists.flatten()
        channels = cameras.field("channel").to_pylist()
        row_of_camera = np.repeat(np.arange(len(tokens)), np.diff(lists.offsets.to_numpy()))

        def of_frame(row: int) -> str:
            return f"{self._name}: frame {tokens[row]!r} of {scenes[row]!r}"

        def of_camera(i: int) -> str:
            return f"{of_frame(int(row_of_camera[i]))}: {channels[i]}"

        self._check_order(tokens, scenes, of_frame)
        for field in ("lidar_path", "label_path"):
            _check_each(batch.column(field).to_pylist(), path_problem, field, of_frame)
        for field, problem in {"channel": _text_problem, "token": name_problem, "image_path": path_problem}.items():
            _check_each(cameras.field(field).to_pylist(), problem, field, of_camera)
        for field in ("width", "height"):
            _check_each(cameras.field(field).to_pylist(), _size_problem, field, of_camera)
        for field in ("ego_from_lidar", "global_from_ego"):
            _check_matrices(stack(batch.column(field), (4, 4)), field, of_frame)
        _check_matrices(stack(cameras.field("intrinsics"), (3, 3)), "intrinsics", of_camera)
        for field in ("ego_from_camera", "global_from_ego", "camera_from_lidar"):
            _check_matrices(stack(cameras.field(field), (4, 4)), field, of_camera)
        self._check_images(cameras, row_of_camera, of_camera)

    def _check_nulls(self, batch: pa.RecordBatch) -> None:
        optional = ("label_path", "previous", "next")
        cameras = batch.column("cameras").flatten()
        columns = {name: batch.column(name) for name in batch.schema.names if name not in optional}
        columns |= {f"cameras.{field.name}": cameras.field(field.name) for field in cameras.type}
        for name, column in columns.items():
            inner = column.flatten() if hasattr(column, "flatten") and pa.types.is_nested(column.type) else []
            nested = any(part.null_count for part in (inner if isinstance(inner, list) else [inner]))
            if column.null_count or (nested and name != "cameras"):
                raise DataError(f"{self._name}: column {name} has rows without a value; expected one in every row")

    def _check_order(self, tokens: list[str], scenes: list[str], of_frame: Any) -> None:
        for row, (token, scene) in enumerate(zip(tokens, scenes, strict=True)):
            # SemanticKITTI's predictions are files named by the frame's token, those of nuScenes by the sweep's.
            problem = _file_problem(token) if self._dataset == "semantic_kitti" else _text_problem(token)
            if problem is None and token in self._tokens:
                problem = "is the token of an earlier frame, too; expected one frame a token"
            if problem is not None:
                raise DataError(f"{of_frame(row)}: token {problem}")
            if not scene and not self._earlier:
                raise DataError(f"{of_frame(row)}: scene is empty")
            if scene != self._scene and scene in self._scenes and not self._earlier:
                raise DataError(
                    f"{of_frame(row)}: scene comes a second time, after {self._scene!r}; expected the frames of a "
                    "scene one after the other"
                )
            self._tokens.add(token)
            self._scenes.add(scene)
            self._scene = scene

    def _check_images(self, cameras: pa.StructArray, rows: np.ndarray, of_camera: Any) -> None:
        fields = ("token", "image_path", "width", "height", "channel")
        seen_in_frame: set[tuple[int, str]] = set()
        columns = zip(*(cameras.field(name).to_pylist() for name in fields), strict=True)
        for i, (token, path, width, height, channel) in enumerate(columns):
            place = (int(rows[i]), channel)
            if place in seen_in_frame:
                raise DataError(f"{of_camera(i)}: channel comes twice in one frame; expected one image a camera")
            seen_in_frame.add(place)
            image = hash((path, width, height))
            if self._images.setdefault(token, image) != image:
                raise DataError(
                    f"{of_camera(i)}: token {token!r} is another image's, too ({path} here), and would share its "
                    "superpixel map; expected one image a token"
                )


def stack(column: pa.FixedSizeListArray, shape: tuple[int, int]) -> Float64[np.ndarray, "N R C"]:
    """A column of matrices, stored row by row, as one array."""
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)


def _check_each(values: Sequence[Any], problem: Any, field: str, of_owner: Any) -> None:
    for i, value in enumerate(values):
        found = None if value is None else problem(value)
        if found is not None:
            raise DataError(f"{of_owner(i)}: {field} {_short(value)} {found}")


def _check_matrices(matrices: Float64[np.ndarray, "N R C"], field: str, of_owner: Any) -> None:
    problem = transform_problem if matrices.shape[1] == 4 else intrinsics_problem
    for i in np.flatnonzero(~_plausible(matrices)).tolist():
        found = problem(matrices[i])
        if found is not None:
            raise DataError(f"{of_owner(i)}: {field} {found}")


def _plausible(matrices: Float64[np.ndarray, "N R C"]) -> Bool[np.ndarray, " N"]:
    """False for every matrix that may be wrong: a fast look at all of them."""
    size = matrices.shape[1] - 1
    with np.errstate(all="ignore"):
        last_row = np.abs(matrices[:, size] - np.eye(size + 1)[size]).max(1) <= 1e-6
        if size == 2:
            finite = np.isfinite(matrices).all((1, 2))
            return finite & last_row & (matrices[:, 0, 0] > 0) & (matrices[:, 1, 1] > 0) & (matrices[:, 1, 0] == 0)
        rotations = matrices[:, :3, :3]
        off = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max((1, 2))
        near = np.abs(matrices[:, :3, 3]).max(1) <= FARTHEST
        return last_row & (off <= ORTHONORMAL) & near & (np.linalg.det(rotations) > 0)


def _text_problem(text: str) -> str | None:
    if not text:
        return "is empty"
    return "has control characters" if _control(text) else None


def _file_problem(text: str) -> str | None:
    """Why a token is not one or more names of files with '/' between them."""
    return next((found for part in text.split("/") if (found := name_problem(part)) is not None), None)


def _size_problem(pixels: int) -> str | None:
    return None if 1 <= pixels <= LARGEST_IMAGE else f"pixels; expected 1 to {LARGEST_IMAGE}"


def _control(text: str) -> bool:
    return any(ord(letter) < 32 or ord(letter) == 127 for letter in text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
