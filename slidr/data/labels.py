"""Point classes: what the raw labels of nuScenes-lidarseg and SemanticKITTI become. Class 0 is ignored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from slidr.config import DatasetName
from slidr.data.storage import DataError
from slidr.shapes import Int64, Integer, UInt32

NUSCENES_CLASSES = (
    "ignored",
    "barrier",
    "bicycle",
    "bus",
    "car",
    "construction vehicle",
    "motorcycle",
    "pedestrian",
    "traffic cone",
    "trailer",
    "truck",
    "driveable surface",
    "other flat",
    "sidewalk",
    "terrain",
    "manmade",
    "vegetation",
)
SEMANTIC_KITTI_CLASSES = (
    "ignored",
    "car",
    "bicycle",
    "motorcycle",
    "truck",
    "other vehicle",
    "person",
    "bicyclist",
    "motorcyclist",
    "road",
    "parking",
    "sidewalk",
    "other ground",
    "building",
    "fence",
    "vegetation",
    "trunk",
    "terrain",
    "pole",
    "traffic sign",
)
CLASSES: dict[DatasetName, tuple[str, ...]] = {
    "nuscenes": NUSCENES_CLASSES,
    "semantic_kitti": SEMANTIC_KITTI_CLASSES,
}

# The raw labels of each class; the first one stands for the class when predictions are written out.
_NUSCENES_RAW: dict[int, tuple[int, ...]] = {
    0: (0, 1, 5, 7, 8, 10, 11, 13, 19, 20, 29, 31),
    1: (9,),
    2: (14,),
    3: (15, 16),
    4: (17,),
    5: (18,),
    6: (21,),
    7: (2, 3, 4, 6),
    8: (12,),
    9: (22,),
    10: (23,),
    11: (24,),
    12: (25,),
    13: (26,),
    14: (27,),
    15: (28,),
    16: (30,),
}
_SEMANTIC_KITTI_RAW: dict[int, tuple[int, ...]] = {
    0: (0, 1, 52, 99),
    1: (10, 252),
    2: (11,),
    3: (15,),
    4: (18, 258),
    5: (20, 13, 16, 256, 257, 259),
    6: (30, 254),
    7: (31, 253),
    8: (32, 255),
    9: (40, 60),
    10: (44,),
    11: (48,),
    12: (49,),
    13: (50,),
    14: (51,),
    15: (70,),
    16: (71,),
    17: (72,),
    18: (80,),
    19: (81,),
}


def _lookup(raw_of_class: Mapping[int, tuple[int, ...]]) -> Int64[np.ndarray, " R"]:
    """The class of each raw label; -1 where there is none."""
    table = np.full(max(max(raws) for raws in raw_of_class.values()) + 1, -1, np.int64)
    for cls, raws in raw_of_class.items():
        table[list(raws)] = cls
    return table


CLASS_OF_RAW: dict[DatasetName, Int64[np.ndarray, " R"]] = {
    "nuscenes": _lookup(_NUSCENES_RAW),
    "semantic_kitti": _lookup(_SEMANTIC_KITTI_RAW),
}
_KITTI_RAW_OF_CLASS = np.array([raws[0] for raws in _SEMANTIC_KITTI_RAW.values()], np.uint32)


def classes_of(raw: Integer[np.ndarray, " N"], dataset: DatasetName, name: str = "labels") -> Int64[np.ndarray, " N"]:
    """The classes of raw point labels (of SemanticKITTI the low 16 bits count; the rest is the instance).

    Raises `DataError` listing the labels that the data set does not have; `name` names the file.
    """
    table = CLASS_OF_RAW[dataset]
    values = raw.astype(np.int64)
    if dataset == "semantic_kitti":
        values &= 0xFFFF
    known = (values >= 0) & (values < len(table))
    classes = np.where(known, table[np.where(known, values, 0)], -1)
    if (classes < 0).any():
        strange, counts = np.unique(values[classes < 0], return_counts=True)
        listed = ", ".join(f"{v} ({c} points)" for v, c in zip(strange, counts, strict=True))
        raise DataError(f"{name}: raw labels that {dataset} does not have: {listed}; is it that data set's file?")
    return classes


def semantic_kitti_raw(classes: Int64[np.ndarray, " N"]) -> UInt32[np.ndarray, " N"]:
    """The raw labels that SemanticKITTI's benchmark expects for classes."""
    return _KITTI_RAW_OF_CLASS[classes]
