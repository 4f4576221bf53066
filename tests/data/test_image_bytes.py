"""What the bytes of an image state: damage is found before a pixel is decoded, and a whole file is never refused."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slidr.data.image_bytes import DamagedImage, ImageHeader, read_header
from slidr.data.images import encode_label_map

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_flipped_bit_and_any_cut_of_a_png_is_found(data: st.DataObject) -> None:
    labels = np.random.default_rng(0).integers(0, 300, (12, 20)).astype(np.uint16)
    png = encode_label_map(labels)
    assert read_header(png) == ImageHeader("PNG", 20, 12, 16, "grey", len(png))
    with pytest.raises(DamagedImage):
        read_header(png[: data.draw(st.integers(0, len(png) - 1))])
    spoiled = bytearray(png)
    spoiled[data.draw(st.integers(0, len(png) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedImage):
        read_header(bytes(spoiled))
    assert read_header(png + b"more").length == len(png)


@pytest.mark.parametrize(
    ("mode", "bits", "colours"),
    [
        ("1", 1, "grey"),
        ("L", 8, "grey"),
        ("I;16", 16, "grey"),
        ("LA", 8, "grey and alpha"),
        ("RGB", 8, "RGB"),
        ("RGBA", 8, "RGBA"),
    ],
)
def test_a_png_states_its_depth_and_colours(mode: str, bits: int, colours: str) -> None:
    header = read_header(encoded(Image.new(mode, (5, 3)), "PNG"))
    assert (header.width, header.height, header.bits, header.colours) == (5, 3, bits, colours)


@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}, {"restart_marker_blocks": 3}, {"quality": 100}],
    ids=str,
)
@pytest.mark.parametrize("tail", [b"", b"\0\0", b"\xff\xd8\xff thumbnail"], ids=["nothing", "zeros", "a picture"])
def test_whole_jpegs_of_every_kind_are_taken_with_what_follows_them(options: dict[str, object], tail: bytes) -> None:
    jpeg = encoded(Image.fromarray(NOISE), "JPEG", **options)
    header = read_header(jpeg + tail)
    assert header == ImageHeader("JPEG", 40, 24, 8, "YCbCr or RGB", len(jpeg))


@pytest.mark.parametrize(("mode", "colours"), [("L", "grey"), ("CMYK", "CMYK")])
def test_a_jpeg_states_its_colours(mode: str, colours: str) -> None:
    assert read_header(encoded(Image.new(mode, (4, 4)), "JPEG")).colours == colours


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_jpeg_cut_anywhere_is_found(data: st.DataObject) -> None:
    jpeg = encoded(Image.fromarray(NOISE), "JPEG", progressive=data.draw(st.booleans()))
    with pytest.raises(DamagedImage):
        read_header(jpeg[: data.draw(st.integers(0, len(jpeg) - 1))])


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd8\xff\xda\0\2"]))
def test_no_bytes_raise_anything_else(data: bytes, start: bytes) -> None:
    with contextlib.suppress(DamagedImage):
        read_header(start + data)


def test_a_second_header_is_refused() -> None:
    """Pillow follows the last one, after the first was compared with the frame table."""
    small, large = (chunk(b"IHDR", struct.pack(">IIBBBBB", n, n, 8, 0, 0, 0, 0)) for n in (4, 60_000))
    rest = chunk(b"IDAT", zlib.compress(bytes(20))) + chunk(b"IEND", b"")
    read_header(b"\x89PNG\r\n\x1a\n" + small + rest)
    with pytest.raises(DamagedImage, match="one header"):
        read_header(b"\x89PNG\r\n\x1a\n" + small + large + rest)
    jpeg = encoded(Image.fromarray(NOISE), "JPEG")
    at = jpeg.index(b"\xff\xc0")
    frame = jpeg[at : at + 2 + struct.unpack_from(">H", jpeg, at + 2)[0]]
    with pytest.raises(DamagedImage, match="its size twice"):
        read_header(jpeg[:at] + frame + jpeg[at:])


def test_a_marker_amid_compressed_pixels_is_found() -> None:
    jpeg = encoded(Image.fromarray(NOISE), "JPEG")
    middle = (jpeg.index(b"\xff\xda") + len(jpeg)) // 2
    with pytest.raises(DamagedImage, match=r"marker C0 at byte .* cannot follow compressed pixels"):
        read_header(jpeg[:middle] + b"\xff\xc0" + jpeg[middle + 2 :])
