"""SemanticKITTI's sequences to `Frame`s: sweeps, labels, calibration and poses; no cameras.

The vehicle frame of a sequence is its left camera, in which its poses are given.
"""

from __future__ import annotations

import numpy as np

from slidr.data import storage
from slidr.data.splits import SEMANTIC_KITTI_SEQUENCES, sequence_splits
from slidr.data.storage import DataError
from slidr.shapes import Float64
from slidr.types import Frame

SCAN_MICROSECONDS = 100_000  # ten sweeps a second, where a sequence has no times.txt


def read_frames(root: str) -> list[Frame]:
    """The scans of every sequence under `root`/sequences, in order; tokens are "sequence/scan", as 08/000123.

    A scan's `label_path` is None where it has no label file. Without poses.txt the car stands still at the origin,
    without calib.txt the lidar sits at the vehicle's origin. Raises `DataError` naming what is missing or damaged.
    """
    found = storage.list_names(storage.join(root, "sequences"))
    known = {name for names in SEMANTIC_KITTI_SEQUENCES.values() for name in names}
    sequences = sorted(found & known)
    if not sequences:
        raise DataError(
            f"{storage.join(root, 'sequences')}: no sequence 00 to 21; data.root must be the folder that holds "
            f"sequences/"
        )
    frames = [frame for name in sequences for frame in _sequence(root, name)]
    if not frames:
        raise DataError(
            f"{storage.join(root, 'sequences')}: its sequences hold no velodyne/*.bin; is the download whole?"
        )
    return frames


def _sequence(root: str, sequence: str) -> list[Frame]:
    folder = f"sequences/{sequence}"
    scans = _stems(root, f"{folder}/velodyne", ".bin")
    labelled = set(_stems(root, f"{folder}/labels", ".label"))
    ego_from_lidar = _calibration(storage.safe_join(root, f"{folder}/calib.txt"))
    poses = _poses(storage.safe_join(root, f"{folder}/poses.txt"), scans)
    times = _times(storage.safe_join(root, f"{folder}/times.txt"), scans)
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
    """The names of a folder's files of one kind, without their ending, sorted."""
    names = storage.list_names(storage.safe_join(root, folder))
    return sorted(name.removesuffix(suffix) for name in names if name.endswith(suffix))


def _calibration(path: str) -> Float64[np.ndarray, "4 4"]:
    """ego_from_lidar: the row "Tr:" of calib.txt."""
    if not storage.exists(path):
        return np.eye(4)
    for line in _lines(path):
        if line.startswith("Tr:"):
            return _matrix(line.removeprefix("Tr:"), path)
    raise DataError(f"{path}: has no row 'Tr:' with the lidar's place; copy the file again")


def _poses(path: str, scans: list[str]) -> list[Float64[np.ndarray, "4 4"]]:
    """global_from_ego of each scan: row i of poses.txt is that of scan i."""
    if not storage.exists(path):
        return [np.eye(4)] * len(scans)
    rows = _rows_of(path, scans)
    return [_matrix(row, path) for row in rows]


def _times(path: str, scans: list[str]) -> list[int]:
    """Microseconds of each scan from the sequence's start."""
    if not storage.exists(path):
        return [_number(scan, path) * SCAN_MICROSECONDS for scan in scans]
    try:
        return [round(float(row) * 1e6) for row in _rows_of(path, scans)]
    except ValueError as error:
        raise DataError(f"{path}: {error}; expected seconds, one scan a row") from error


def _rows_of(path: str, scans: list[str]) -> list[str]:
    rows = _lines(path)
    numbers = [_number(scan, path) for scan in scans]
    if numbers and max(numbers) >= len(rows):
        raise DataError(f"{path}: has {len(rows)} rows, too few for scan {max(numbers):06d}; copy the file again")
    return [rows[number] for number in numbers]


def _number(scan: str, path: str) -> int:
    if not scan.isdigit():
        raise DataError(f"{path.rpartition('/')[0]}/velodyne/{scan}.bin: expected a number for a name, as 000123.bin")
    return int(scan)


def _lines(path: str) -> list[str]:
    try:
        text = storage.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no text ({error}); copy the file again") from error
    return [line for line in text.splitlines() if line.strip()]


def _matrix(row: str, path: str) -> Float64[np.ndarray, "4 4"]:
    """Twelve numbers, the upper three rows of a transform."""
    try:
        upper = np.array(row.split(), np.float64).reshape(3, 4)
    except ValueError:
        raise DataError(f"{path}: expected 12 numbers, got {row.strip()[:60]!r}; copy the file again") from None
    return np.vstack([upper, [0, 0, 0, 1]])
