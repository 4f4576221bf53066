"""Predictions in the formats of the two benchmarks' test servers.

nuScenes-lidarseg    lidarseg/SPLIT/LIDAR_TOKEN_lidarseg.bin (uint8 classes) and SPLIT/submission.json
SemanticKITTI        sequences/SEQUENCE/predictions/SCAN.label (uint32 raw labels)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from slidr.config import DatasetName
from slidr.data import storage
from slidr.data.label_maps import name_problem
from slidr.data.labels import CLASSES, semantic_kitti_raw
from slidr.data.storage import DataError
from slidr.shapes import Int64
from slidr.types import Frame

# What a nuScenes submission has to say of its inputs.
NUSCENES_META = {
    "meta": {"use_camera": False, "use_lidar": True, "use_radar": False, "use_map": False, "use_external": False}
}


@dataclass(frozen=True)
class Submission:
    """A folder of predictions; workers write their own frames into it, and one of them the `close`."""

    dataset: DatasetName
    folder: str
    split: str

    def path_of(self, frame: Frame) -> str:
        """The file of a frame's predictions. Raises `DataError` for a frame whose token cannot name one."""
        if self.dataset == "semantic_kitti":
            sequence, slash, scan = frame.token.partition("/")
            if not slash or "/" in scan:
                raise DataError(f"frame {frame.token!r}: expected a token as 08/000123, which names its predictions")
            return storage.join(self.folder, "sequences", sequence, "predictions", f"{scan}.label")
        problem = name_problem(frame.lidar_token)
        if problem is not None:
            raise DataError(
                f"frame {frame.token!r}: lidar_token {frame.lidar_token!r} {problem}; it names the file of predictions"
            )
        return storage.join(self.folder, "lidarseg", self.split, f"{frame.lidar_token}_lidarseg.bin")

    def write(self, frame: Frame, classes: Int64[np.ndarray, " N"]) -> str:
        """Writes a frame's predictions, one class a point in the sweep's order; returns the path.

        Raises `ValueError` for classes that the benchmark does not take: the ignored one and those it does not have.
        """
        path, last = self.path_of(frame), len(CLASSES[self.dataset]) - 1
        if len(classes) > 0 and not (int(classes.min()) >= 1 and int(classes.max()) <= last):
            raise ValueError(
                f"{path}: predictions span {int(classes.min())} to {int(classes.max())}, {self.dataset} takes 1 to "
                f"{last}; leave the ignored class 0 out of the argmax"
            )
        raw = semantic_kitti_raw(classes) if self.dataset == "semantic_kitti" else classes.astype(np.uint8)
        storage.write_bytes_atomic(path, raw.tobytes())
        return path

    def close(self) -> None:
        """Writes what belongs to no single frame."""
        if self.dataset == "nuscenes":
            storage.write_bytes_atomic(self._meta_path, json.dumps(NUSCENES_META).encode())

    def missing(self, frames: Iterable[Frame]) -> list[str]:
        """The files that a closed submission of these frames has and this one lacks. Each folder is listed once."""
        wanted = [self.path_of(frame) for frame in frames]
        if self.dataset == "nuscenes":
            wanted.append(self._meta_path)
        there: dict[str, set[str]] = {}
        lacking = []
        for path in wanted:
            folder, name = storage.split(path)
            if folder not in there:
                there[folder] = storage.list_names(folder)
            if name not in there[folder]:
                lacking.append(path)
        return lacking

    @property
    def _meta_path(self) -> str:
        return storage.join(self.folder, self.split, "submission.json")
