"""SemanticKITTI's sequences to `Frame`s: sweeps, labels, calibration and poses; no cameras.

The vehicle frame of a sequence is its left camera, in which its poses are given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from slidr.data import storage
from slidr.data.completeness import scan_gaps
from slidr.data.download import Download
from slidr.data.frame_rules import transform_problem
from slidr.data.splits import SEMANTIC_KITTI_SEQUENCES, sequence_splits
from slidr.data.storage import DataError
from slidr.shapes import Float64
from slidr.types import Frame

SCAN_MICROSECONDS = 100_000  # ten sweeps a second, where a sequence has no times.txt
_LATEST = 1e10  # s
_LONGEST = 10  # digits of a scan's number
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?", re.ASCII)  # what float() takes, but nan, inf and 1_0
_IMAGES = ("image_2", "image_3")  # folders of KITTI odometry's images, which nothing here reads


def read_frames(root: str) -> list[Frame]:
    """The scans of every sequence under `root`/sequences: see `read_download`."""
    return read_download(root).frames


def read_download(root: str) -> Download:
    """The scans of every sequence under `root`/sequences, in order; tokens are "sequence/scan", as 08/000123.

    A scan's `label_path` is None where it has no label file. Without poses.txt the car stands still at the origin,
    without calib.txt the lidar sits at the vehicle's origin. The notes name what the download lacks: scans of a
    sequence, labels or images of scans, rows of poses.txt (which no training reads: the car then stands still, too).
    Raises `DataError` naming what is missing or damaged.
    """
    found = storage.list_names(storage.join(root, "sequences"))
    known = {name for names in SEMANTIC_KITTI_SEQUENCES.values() for name in names}
    sequences = sorted(found & known)
    if not sequences:
        raise DataError(
            f"{storage.join(root, 'sequences')}: no sequence 00 to 21; data.root must be the folder that holds "
            f"sequences/"
        )
    notes: list[str] = []
    frames = [frame for name in sequences for frame in _sequence(root, name, notes)]
    if not frames:
        raise DataError(
            f"{storage.join(root, 'sequences')}: its sequences hold no velodyne/*.bin; is the download whole?"
        )
    return Download(frames, notes=[*scan_gaps(frame.token for frame in frames), *notes])


def _sequence(root: str, sequence: str, notes: list[str]) -> list[Frame]:
    folder = f"sequences/{sequence}"
    names = storage.list_names(storage.safe_join(root, folder))
    scans = _stems(root, f"{folder}/velodyne", ".bin")
    numbers = _numbers(scans, storage.join(root, folder, "velodyne"))
    labelled = set(_stems(root, f"{folder}/labels", ".label"))
    notes += _differences(root, sequence, scans, labelled)
    # By the folder's listing: a link to nothing is a file that cannot be read, not one that is not there.
    paths = {name: storage.safe_join(root, f"{folder}/{name}") for name in ("calib.txt", "poses.txt", "times.txt")}
    ego_from_lidar = _calibration(paths["calib.txt"]) if "calib.txt" in names else np.eye(4)
    poses = _poses(paths["poses.txt"], numbers, notes) if "poses.txt" in names else [np.eye(4)] * len(scans)
    times = _times(paths["times.txt"], numbers) if "times.txt" in names else [i * SCAN_MICROSECONDS for i in numbers]
    tokens = [f"{sequence}/{scan}" for scan in scans]
    return [
        Frame(
            token=token,
            scene=sequence,
            timestamp=times[i],
            lidar_token=token,
            lidar_path=f"{folder}/velodyne/{scan}.bin",
            label_path=f"{folder}/labels/{scan}.label" if scan in labelled else None,
            ego_from_lidar=ego_from_lidar,
            global_from_ego=poses[i],
            cameras=(),
            previous=tokens[i - 1] if i > 0 else None,
            next=tokens[i + 1] if i + 1 < len(tokens) else None,
            splits=sequence_splits(sequence),
        )
        for i, (scan, token) in enumerate(zip(scans, tokens, strict=True))
    ]


def _stems(root: str, folder: str, suffix: str) -> list[str]:
    """The names of a folder's files of one kind, without their ending, sorted.

    Hidden files are not data: macOS leaves one as ._000000.bin beside each file that it copies.
    """
    names = storage.list_names(storage.safe_join(root, folder))
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix) and not name.startswith("."))


def _numbers(scans: Sequence[str], folder: str) -> list[int]:
    """The scans' numbers: rows of poses.txt and times.txt."""
    for scan in scans:
        if not (scan.isascii() and scan.isdigit() and len(scan) <= _LONGEST):
            raise DataError(f"{storage.join(folder, scan)}.bin: expected a number for a name, as 000123.bin; rename it")
    scan_of: dict[int, str] = {}
    for scan in scans:
        other = scan_of.setdefault(int(scan), scan)
        if other != scan:
            raise DataError(f"{folder}: {other}.bin and {scan}.bin have one number; expected a file for each scan")
    return list(scan_of)


def _differences(root: str, sequence: str, scans: list[str], labelled: set[str]) -> list[str]:
    """Where a sequence has other numbers of labels or images than of sweeps."""
    folders = {"labels": labelled}
    folders |= {name: set(_stems(root, f"sequences/{sequence}/{name}", ".png")) for name in _IMAGES}
    lines = []
    for name, stems in folders.items():
        without, beyond = sorted(set(scans) - stems), sorted(stems - set(scans))
        if stems and (without or beyond):
            first = f"none for {without[0]}" if without else f"{beyond[0]} has no sweep"
            lines.append(f"sequence {sequence} has {len(scans)} sweeps and {len(stems)} files in {name}/: {first}")
    return lines


def _calibration(path: str) -> Float64[np.ndarray, "4 4"]:
    """ego_from_lidar: the row "Tr:" of calib.txt."""
    for number, line in enumerate(_lines(path), start=1):
        if line.startswith("Tr:"):
            return _matrix(line.removeprefix("Tr:"), path, number)
    raise DataError(
        f"{path}: has no row 'Tr:' with the lidar's place; the calib.txt in KITTI odometry's archives of images lacks "
        "it, that of data_odometry_calib.zip has it: copy that one"
    )


def _poses(path: str, numbers: Sequence[int], notes: list[str]) -> list[Float64[np.ndarray, "4 4"]]:
    """global_from_ego of each scan: row i of poses.txt is that of scan i."""
    rows = [_matrix(row, path, number) for number, row in enumerate(_lines(path), start=1)]
    if not rows:
        raise DataError(f"{path}: is empty; expected a pose a row; copy the file again, or remove it")
    if max(numbers, default=-1) >= len(rows):
        notes.append(
            f"{path}: has {len(rows)} rows, too few for scan {max(numbers):06d}; no pose of this sequence is taken (no "
            "training reads them)"
        )
        return [np.eye(4)] * len(numbers)
    return [rows[number] for number in numbers]


def _times(path: str, numbers: Sequence[int]) -> list[int]:
    """Microseconds of each scan from the sequence's start."""
    rows = _lines(path)
    if max(numbers, default=-1) >= len(rows):
        raise DataError(f"{path}: has {len(rows)} rows, too few for scan {max(numbers):06d}; copy the file again")
    return [_microseconds(rows[number], path, number + 1) for number in numbers]


def _microseconds(row: str, path: str, number: int) -> int:
    if _NUMBER.fullmatch(row.strip()) is None or not 0 <= float(row) <= _LATEST:
        raise DataError(f"{path}: row {number}: got {row.strip()[:60]!r}; expected seconds, 0 to {_LATEST:g}")
    return round(float(row) * 1e6)


def _lines(path: str) -> list[str]:
    """The rows of a text file, without empty ones at its end: row i belongs to scan i."""
    try:
        text = storage.read_bytes(path, storage.RECORD_BYTES).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not text ({error}); copy the file again") from error
    return text.rstrip().splitlines()


def _matrix(row: str, path: str, number: int) -> Float64[np.ndarray, "4 4"]:
    """Twelve numbers, the upper three rows of a rigid transform."""
    values = row.split()
    if len(values) != 12 or any(_NUMBER.fullmatch(value) is None for value in values):
        raise DataError(f"{path}: expected 12 numbers, got {row.strip()[:60]!r} in row {number}; copy the file again")
    matrix = np.vstack([np.array(values, np.float64).reshape(3, 4), [0, 0, 0, 1]])
    problem = transform_problem(matrix)
    if problem is not None:
        raise DataError(f"{path}: the matrix in row {number} {problem}; copy the file again")
    return matrix
