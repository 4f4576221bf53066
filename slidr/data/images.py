"""Reading sensors' files: images, sweeps and point labels. Damage is an error that names the file and
sizes."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from slidr.data import storage
from slidr.data.storage import DataError
from slidr.shapes import Float32, UInt8, UInt16

NUSCENES_COLUMNS = 5  # x, y, z (m), intensity (0..255), ring
KITTI_COLUMNS = 4  # x, y, z (m), remission (0..1)


def read_image(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """An image file as RGB. Raises `DataError` where it is missing, truncated or no image."""
    return decode_image(storage.read_bytes(path), os.fspath(path))


def decode_image(data: bytes, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """An encoded image as RGB; `name` is for the error."""
    with _opened(data, name) as image:
        return np.array(image.convert("RGB"))


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """(width, height) that an encoded image's header states; its pixels are not looked at."""
    try:
        return Image.open(io.BytesIO(data)).size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: is no image ({_reason(error, data)}); copy the file again") from error


def read_label_map(path: str | os.PathLike[str]) -> UInt16[np.ndarray, "H W"]:
    """A superpixel map: a PNG of 8 or 16 bits. Raises `DataError` where it is missing or damaged."""
    name = os.fspath(path)
    with _opened(storage.read_bytes(path), name, "make it again with `slidr superpixels CONFIG`") as image:
        if image.mode not in ("L", "I;16", "I;16B", "I"):
            raise DataError(f"{name}: expected one channel of 8 or 16 bits, got PNG mode {image.mode}")
        return np.array(image).astype(np.uint16)


def encode_label_map(labels: UInt16[np.ndarray, "H W"]) -> bytes:
    """A superpixel map as PNG, of 8 bits where all labels fit and of 16 bits otherwise."""
    narrow = labels.size == 0 or int(labels.max()) < 2**8
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8 if narrow else np.uint16))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def read_sweep(path: str | os.PathLike[str], columns: int) -> Float32[np.ndarray, "N C"]:
    """A lidar sweep of float32 rows: `NUSCENES_COLUMNS` or `KITTI_COLUMNS` wide.

    Raises `DataError` where the file is missing, is empty, or its size is no whole number of rows.
    """
    data = storage.read_bytes(path)
    row = 4 * columns
    if not data:
        raise DataError(f"{os.fspath(path)}: is empty, a sweep of no points; copy the file again")
    if len(data) % row:
        raise DataError(
            f"{os.fspath(path)}: truncated: {len(data)} bytes are no whole number of points of {row} bytes "
            f"({columns} float32); copy the file again"
        )
    return np.frombuffer(data, np.float32).reshape(-1, columns).copy()


def read_point_labels(path: str | os.PathLike[str], dtype: type[np.generic], points: int) -> np.ndarray:
    """The raw label of each of a sweep's `points`: uint8 for nuScenes-lidarseg, uint32 for SemanticKITTI.

    Raises `DataError` where the file is missing or has another length.
    """
    data = storage.read_bytes(path)
    size = np.dtype(dtype).itemsize
    if len(data) != points * size:
        raise DataError(
            f"{os.fspath(path)}: holds {len(data) / size:g} labels for a sweep of {points} points; "
            "sweep and labels do not belong together, or one is truncated"
        )
    return np.frombuffer(data, dtype).copy()


def _opened(data: bytes, name: str, mend: str = "copy the file again") -> Image.Image:
    """A decoded image, all its pixels read."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: is no whole image ({_reason(error, data)}); {mend}") from error
    return image


def _reason(error: Exception, data: bytes) -> str:
    """Why an image could not be opened. Pillow's words for an unknown format name a buffer, not the file."""
    if not data:
        return "the file is empty"
    return f"{len(data)} bytes of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
