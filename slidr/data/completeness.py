"""What a data set lacks against its official size: scans of SemanticKITTI's sequences, scenes of nuScenes' splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from slidr.config import DatasetName
from slidr.data.splits import SEMANTIC_KITTI_SEQUENCES

_NAMED = 5  # ranges of scans, or scenes, that a text names


def scan_gaps(tokens: Iterable[str]) -> list[str]:
    """A line for each SemanticKITTI sequence that lacks scans, between its first and its last official one.

    `tokens` are those of the scans that are there, "sequence/scan"; others are ignored.

    >>> scan_gaps([f"04/{scan:06d}" for scan in range(271) if scan not in (7, 8, 100)])
    ['sequence 04 lacks 3 of 271 scans: 000007 to 000008, 000100']
    """
    official = {name: scans for names in SEMANTIC_KITTI_SEQUENCES.values() for name, scans in names.items()}
    there: dict[str, set[int]] = {}
    for token in tokens:
        sequence, _, scan = token.rpartition("/")
        if sequence in official and scan.isascii() and scan.isdigit():
            there.setdefault(sequence, set()).add(int(scan))
    lines = []
    for sequence, scans in sorted(there.items()):
        missing = sorted(set(range(official[sequence])) - scans)
        if missing:
            lines.append(f"sequence {sequence} lacks {len(missing)} of {official[sequence]} scans: {_ranges(missing)}")
    return lines


def lacking_of_split(dataset: DatasetName, split: str, tokens: Iterable[str], scenes: Iterable[str]) -> str:
    """What frames with these tokens and scenes lack of an official split, in words; empty where they lack nothing.

    Other splits (parametrize, verify, all) lack nothing. A benchmark refuses, or scores lower, what is not whole.
    """
    if dataset == "semantic_kitti":
        sequences = SEMANTIC_KITTI_SEQUENCES.get(split, {})
        there = list(tokens)
        known = {token.rpartition("/")[0] for token in there}
        absent = [f"sequence {name}" for name in sequences if name not in known]
        return "; ".join([*absent, *scan_gaps(token for token in there if token.rpartition("/")[0] in sequences)])
    from slidr.data.nuscenes import scenes_of_splits  # loads the devkit

    official = scenes_of_splits().get(split, ())
    found = set(scenes)
    missing = [scene for scene in official if scene not in found]
    if not missing:
        return ""
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    return f"{len(missing)} of {len(official)} scenes: {', '.join(missing[:_NAMED])}{more}"


def _ranges(numbers: Sequence[int]) -> str:
    """Scan numbers in words, neighbours as a range."""
    # Neighbours differ from their places in the list by the same number.
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    bounds = [(run[0][1], run[-1][1]) for run in runs]
    texts = [f"{first:06d}" if first == last else f"{first:06d} to {last:06d}" for first, last in bounds]
    more = f" and {len(texts) - _NAMED} more ranges" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more
