"""Which scenes belong to which split, and which part of a split a fraction takes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TypeVar

from slidr.config import DatasetName, step_of

T = TypeVar("T")

# 100 training scenes held out of pretraining, on which it is verified: the numbers in scene-NNNN.
_VERIFY = """
0008 0009 0019 0029 0032 0042 0045 0049 0052 0054 0056 0066 0067 0073 0131 0152 0166 0168 0183 0190
0194 0208 0210 0211 0241 0243 0248 0259 0260 0261 0287 0292 0297 0305 0306 0350 0352 0358 0361 0365
0368 0377 0388 0391 0395 0413 0427 0428 0438 0444 0452 0453 0459 0463 0464 0475 0513 0533 0544 0575
0587 0589 0642 0652 0658 0669 0678 0687 0701 0703 0706 0710 0715 0726 0735 0740 0758 0786 0790 0804
0806 0847 0856 0868 0882 0897 0899 0976 0996 1012 1015 1016 1018 1020 1024 1044 1058 1094 1098 1107
"""
VERIFY_SCENES = frozenset(f"scene-{number}" for number in _VERIFY.split())

# The training sequence of SemanticKITTI held out to choose settings on: whole, as neighbouring scans are alike.
VERIFY_SEQUENCE = "07"

# Scans of each SemanticKITTI sequence, by split.
SEMANTIC_KITTI_SEQUENCES: dict[str, dict[str, int]] = {
    "train": {
        "00": 4541,
        "01": 1101,
        "02": 4661,
        "03": 801,
        "04": 271,
        "05": 2761,
        "06": 1101,
        "07": 1101,
        "09": 1591,
        "10": 1201,
    },
    "val": {"08": 4071},
    "test": {
        "11": 921,
        "12": 1061,
        "13": 3281,
        "14": 631,
        "15": 1901,
        "16": 1731,
        "17": 491,
        "18": 1801,
        "19": 4981,
        "20": 831,
        "21": 2721,
    },
}


def pretraining_splits(scene: str, official: Sequence[str]) -> tuple[str, ...]:
    """Every split of a nuScenes scene: its official ones; for training scenes verify or else parametrize."""
    if "train" not in official:
        return tuple(official)
    return (*official, "verify" if scene in VERIFY_SCENES else "parametrize")


def sequence_splits(sequence: str) -> tuple[str, ...]:
    """Every split of a SemanticKITTI sequence: its official one; for training sequences verify or else parametrize."""
    official = next(split for split, names in SEMANTIC_KITTI_SEQUENCES.items() if sequence in names)
    if official != "train":
        return (official,)
    return (official, "verify" if sequence == VERIFY_SEQUENCE else "parametrize")


def every(items: Sequence[T], fraction: float) -> list[T]:
    """The scans of SemanticKITTI that a fraction takes of a sorted list: items 0, k, 2k, ..."""
    return list(items[:: step_of(fraction)])


def every_counted(items: Sequence[T], fraction: float) -> list[T]:
    """The scenes of nuScenes that a fraction takes, counted from one: the k-th, 2k-th, ...; none of fewer than k."""
    step = step_of(fraction)
    return list(items[step - 1 :: step])


def published_fraction(dataset: DatasetName, fraction: float) -> list[str]:
    """The training scenes (SemanticKITTI: scans, "sequence/scan") of a published label fraction, from a frozen list.

    nuScenes' scene table is in order of name. All of SemanticKITTI is every scan of its training sequences. Raises
    `ValueError` for another fraction; the rules above make its list.
    """
    if dataset == "semantic_kitti" and fraction == 1.0:
        lengths = SEMANTIC_KITTI_SEQUENCES["train"]
        return [f"{sequence}/{scan:06d}" for sequence, scans in lengths.items() for scan in range(scans)]
    name = f"{dataset}_{100 * fraction:g}pct.txt"
    manifest = resources.files("slidr.data") / "manifests" / name
    if not manifest.is_file():
        raise ValueError(f"fraction: got {fraction}; lists are published for 0.01, 0.05, 0.1, 0.25 and 1.0")
    return manifest.read_text().split()
