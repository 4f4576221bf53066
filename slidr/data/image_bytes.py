"""What the bytes of a JPEG or PNG file state, before a pixel is decoded: size, depth, and whether the file is whole.

A PNG holds a checksum for each of its parts, so any damage is found. A JPEG holds none: `read_header` finds a JPEG that
is cut short, lacks its end, or whose parts do not follow each other; changed bytes inside the compressed pixels that
still make a JPEG are not detectable.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

from slidr.urls import RedactedError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

_JPEG_END = 0xD9
_JPEG_SCAN = 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BETWEEN_SCANS = frozenset({0xC4, 0xDA, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
_MARKER_IN_PIXELS = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # FF 00 is a byte FF, FF D0 to D7 are restarts


class DamagedImage(RedactedError, ValueError):
    """Bytes that are not a whole JPEG or PNG; the message gives the reason, without a file's name."""


@dataclass(frozen=True)
class ImageHeader:
    """What a file states about its image."""

    format: Literal["JPEG", "PNG"]
    width: int  # pixels
    height: int  # pixels
    bits: int  # of a channel
    colours: str  # "grey", "RGB", "palette", "grey and alpha", "RGBA"; of a JPEG "grey", "YCbCr or RGB", "CMYK"
    length: int  # bytes from the first to the end that the format marks; what follows does not belong to the image


def read_header(data: bytes) -> ImageHeader:
    """The header of a whole JPEG or PNG. Raises `DamagedImage` for anything else.

    Every checksum of a PNG is compared; the parts of a JPEG are followed to its end. Nothing is decompressed.
    """
    try:
        if data.startswith(PNG_SIGNATURE):
            return _read_png(memoryview(data))
        if data.startswith(JPEG_SIGNATURE):
            return _read_jpeg(data)
    except (struct.error, IndexError):
        raise DamagedImage(f"truncated: its {len(data)} bytes end inside a header") from None
    if not data:
        raise DamagedImage("the file is empty")
    raise DamagedImage(f"its {len(data)} bytes are neither JPEG nor PNG")


_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}


def _read_png(data: memoryview) -> ImageHeader:
    at, kind, header, pixels = len(PNG_SIGNATURE), b"", None, False
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise DamagedImage(f"truncated: {len(data)} bytes of at least {end}")
        if zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise DamagedImage(f"a checksum differs: bytes {at} to {end} were changed")
        if (kind == b"IHDR") != (header is None):
            raise DamagedImage("expected one header, in the first place")
        if kind == b"IHDR":
            header = struct.unpack_from(">IIBB", data, at + 8)
        pixels = pixels or kind == b"IDAT"
        at = end
    if header is None or not pixels:
        raise DamagedImage("it holds no pixels")
    width, height, bits, colours = header
    if colours not in _PNG_COLOURS:
        raise DamagedImage(f"colour type {colours} does not exist")
    return ImageHeader("PNG", width, height, bits, _PNG_COLOURS[colours], at)


_JPEG_COLOURS = {1: "grey", 3: "YCbCr or RGB", 4: "CMYK"}


def _read_jpeg(data: bytes) -> ImageHeader:
    at, frame, scanned = 2, None, False
    while True:
        if data[at] != 0xFF:
            raise DamagedImage(f"byte {at} should begin a part of a JPEG")
        while data[at + 1] == 0xFF:  # padding
            at += 1
        marker = data[at + 1]
        at += 2
        if marker == _JPEG_END:
            break
        if scanned and marker not in _BETWEEN_SCANS:
            raise DamagedImage(f"marker {marker:02X} at byte {at - 1} cannot follow compressed pixels")
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2 or at + length > len(data):
            raise DamagedImage(f"truncated: the part at byte {at} needs {length} bytes")
        if marker in _JPEG_FRAMES:
            if frame is not None:
                raise DamagedImage("it states its size twice")
            frame = struct.unpack_from(">BHHB", data, at + 2)
        at += length
        if marker == _JPEG_SCAN:
            scanned = True
            found = _MARKER_IN_PIXELS.search(data, at)
            if found is None:
                raise DamagedImage(f"truncated: no end after {len(data)} bytes")
            at = found.start()
    if frame is None or not scanned:
        raise DamagedImage("it holds no pixels")
    bits, height, width, channels = frame
    return ImageHeader("JPEG", width, height, bits, _JPEG_COLOURS.get(channels, f"{channels} channels"), at)
