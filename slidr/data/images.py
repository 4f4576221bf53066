"""Reading sensors' files: images, superpixel maps, sweeps and point labels. Damage is an error that names the file."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from slidr.data import storage
from slidr.data.image_bytes import DamagedImage, ImageHeader, read_header
from slidr.data.storage import SENSOR_BYTES, DataError
from slidr.ops.label_count import most_labels
from slidr.shapes import Float32, UInt8, UInt16
from slidr.urls import redact_url

NUSCENES_COLUMNS = 5  # x, y, z (m), intensity (0..255), ring
KITTI_COLUMNS = 4  # x, y, z (m), remission (0..1)
MAX_PIXELS = 2**26  # of an image; a larger one is refused before it is decoded, whatever Pillow's own limit is


class _NextStep(NamedTuple):
    """What a message advises for a damaged file and for one of another size."""

    damaged: str
    other_size: str


_MAKE_AGAIN = "make it again with `slidr superpixels CONFIG`"
_OF_IMAGE = _NextStep("copy the file again", "the table and the data root do not belong together")
_OF_MAP = _NextStep(_MAKE_AGAIN, _MAKE_AGAIN)


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """A JPEG or PNG image as RGB.

    `size` is (width, height) in pixels as the frame table states it. It is compared before anything is decoded. Raises
    `DataError` where the file is missing, damaged, of another size or larger than `MAX_PIXELS`, and for what has no
    exact RGB values of 8 bits: 16 bits a channel, CMYK, transparent pixels.
    """
    return decode_image(storage.read_bytes(path, SENSOR_BYTES), redact_url(os.fspath(path)), size)


def decode_image(data: bytes, name: str, size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """An encoded image as RGB, as `read_image` does; `name` is for the error."""
    header = _header(data, name, size, _OF_IMAGE)
    if header.bits > 8 or header.colours not in _EXACT_IN_RGB:
        raise DataError(
            f"{name}: has {header.bits} bits a channel ({header.colours}); expected an RGB, grey or palette image of 8 "
            "bits; convert the images to RGB"
        )
    return _decoded(data, header, name, _OF_IMAGE, lambda image: _rgb(image, name))


def read_label_map(
    path: str | os.PathLike[str], size: tuple[int, int] | None = None, segments: int | None = None
) -> UInt16[np.ndarray, "H W"]:
    """A superpixel map: a grey PNG of 8 or 16 bits.

    `size` is the image's (width, height); `segments` is how many superpixels its folder's parameters ask for. Raises
    `DataError` where the file is missing, damaged (every checksum is compared), not such a PNG, of another size, or
    holds labels that SLIC does not make for so many segments.
    """
    name = redact_url(os.fspath(path))
    data = storage.read_bytes(path, SENSOR_BYTES)
    header = require_label_map(data, name, size)
    labels = _decoded(data, header, name, _OF_MAP, lambda image: np.array(image).astype(np.uint16))
    if segments is not None:
        lowest, highest, most = int(labels.min()), int(labels.max()), most_labels(header.height, header.width, segments)
        if lowest > 0 or highest >= most:
            raise DataError(
                f"{name}: holds labels {lowest} to {highest}; {segments} segments make at most {most} labels, "
                "counted from 0; remove the file, then run `slidr superpixels CONFIG`"
            )
    return labels


def require_label_map(data: bytes, name: str, size: tuple[int, int] | None = None) -> ImageHeader:
    """The header of a superpixel map, a whole PNG of one channel. Raises `DataError`; no pixel is decoded."""
    header = _header(data, name, size, _OF_MAP)
    if header.format != "PNG" or header.colours != "grey" or header.bits not in (8, 16):
        raise DataError(
            f"{name}: expected a PNG of one channel of 8 or 16 bits, got a {header.format} of {header.bits} bits "
            f"({header.colours}); {_MAKE_AGAIN}"
        )
    if header.length != len(data):
        raise DataError(f"{name}: {len(data) - header.length} bytes follow the end of the PNG; {_MAKE_AGAIN}")
    return header


def encode_label_map(labels: UInt16[np.ndarray, "H W"]) -> bytes:
    """A superpixel map as PNG, of 8 bits where all labels fit and of 16 bits otherwise."""
    narrow = labels.size == 0 or int(labels.max()) < 2**8
    image = Image.fromarray(np.ascontiguousarray(labels, np.uint8 if narrow else np.uint16))
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


def read_sweep(path: str | os.PathLike[str], columns: int) -> Float32[np.ndarray, "N C"]:
    """A lidar sweep of float32 rows, `NUSCENES_COLUMNS` or `KITTI_COLUMNS` wide, unchecked (see `slidr.data.sweeps`).

    Raises `DataError` where the file is missing, is empty, or its size is not a whole number of rows.
    """
    return decode_sweep(storage.read_bytes(path, SENSOR_BYTES), os.fspath(path), columns)


def decode_sweep(data: bytes, name: str, columns: int) -> Float32[np.ndarray, "N C"]:
    """The rows of a sweep's bytes; `name` is for the error. Raises `DataError` as `read_sweep` does."""
    row = 4 * columns
    if not data:
        raise DataError(f"{name}: is empty, a sweep of no points; copy the file again")
    if len(data) % row:
        raise DataError(
            f"{name}: truncated: {len(data)} bytes are not a whole number of points of {row} bytes "
            f"({columns} float32); copy the file again, or write sweeps of {columns} columns"
        )
    return np.frombuffer(data, np.float32).reshape(-1, columns).copy()


def read_point_labels(path: str | os.PathLike[str], dtype: type[np.generic], points: int) -> np.ndarray:
    """The raw label of each of a sweep's `points`: uint8 for nuScenes-lidarseg, uint32 for SemanticKITTI.

    Raises `DataError` where the file is missing or has another length.
    """
    data = storage.read_bytes(path, SENSOR_BYTES)
    size = np.dtype(dtype).itemsize
    if len(data) != points * size:
        raise DataError(
            f"{os.fspath(path)}: holds {len(data) / size:g} labels for a sweep of {points} points; "
            "sweep and labels do not belong together, or one is truncated"
        )
    return np.frombuffer(data, dtype).copy()


_EXACT_IN_RGB = ("RGB", "RGBA", "grey", "grey and alpha", "palette", "YCbCr or RGB")


def _header(data: bytes, name: str, size: tuple[int, int] | None, next_step: _NextStep) -> ImageHeader:
    """The header of a whole image of that size (width, height) and of at most `MAX_PIXELS`."""
    try:
        header = read_header(data)
    except DamagedImage as error:
        raise DataError(f"{name}: is truncated, damaged or not an image ({error}); {next_step.damaged}") from None
    if size is not None and (header.width, header.height) != size:
        raise DataError(
            f"{name}: is {header.width} x {header.height} pixels, the frame table says {size[0]} x {size[1]}; "
            f"{next_step.other_size}"
        )
    if not 0 < header.width * header.height <= MAX_PIXELS:
        raise DataError(
            f"{name}: states {header.width} x {header.height} pixels; expected 1 to {MAX_PIXELS} in all; is it the "
            "right file?"
        )
    return header


def _decoded(
    data: bytes, header: ImageHeader, name: str, next_step: _NextStep, convert: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
    """A whole image with all its pixels decoded, as an array.

    Pillow's own readers of these two formats are called, not `Image.open`: that one would try every format it knows
    and follow a limit that other packages change.
    """
    try:
        with (PngImageFile if header.format == "PNG" else JpegImageFile)(io.BytesIO(data)) as image:
            if image.size != (header.width, header.height):
                raise DamagedImage("it states two sizes")
            image.load()
            return convert(image)
    except DataError:
        raise
    except Exception as error:  # Pillow raises more than ten kinds for damaged bytes, all of them the file's fault
        reason = str(error) or type(error).__name__
        raise DataError(f"{name}: is truncated, damaged or not an image ({reason}); {next_step.damaged}") from error


def _rgb(image: Image.Image, name: str) -> UInt8[np.ndarray, "H W 3"]:
    """A decoded image of 8 bits as RGB, no value changed."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise DataError(f"{name}: has transparent pixels; expected an opaque image; convert the images to RGB")
    return np.array(image.convert("RGB"))
