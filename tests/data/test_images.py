"""Sensors' files: what is damaged is an error that names the file and what it holds."""

from __future__ import annotations

import io
import os
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from slidr.data import images
from slidr.data.storage import DataError
from slidr.ops.label_count import most_labels


@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_a_label_map_survives_its_png(tmp_path_factory: pytest.TempPathFactory, labels: np.ndarray) -> None:
    path = tmp_path_factory.mktemp("maps") / "map.png"
    path.write_bytes(images.encode_label_map(labels))
    read = images.read_label_map(path)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, labels)


@pytest.mark.parametrize(("highest", "mode"), [(255, "L"), (256, "I;16"), (65535, "I;16")])
def test_a_label_map_is_as_wide_as_its_labels_need(highest: int, mode: str) -> None:
    png = images.encode_label_map(np.array([[0, highest]], np.uint16))
    assert Image.open(io.BytesIO(png)).mode == mode


def test_an_image_of_colours_is_no_label_map(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: expected a PNG of one channel .*, got a PNG of 8 bits \(RGB\)"):
        images.read_label_map(tmp_path / "x.png")


@pytest.mark.parametrize("keep", [0, 10, 0.5, -3])
def test_a_truncated_image_is_refused_by_name(tmp_path: Path, keep: float) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, format="JPEG")
    data = whole.getvalue()
    end = int(keep * len(data)) if isinstance(keep, float) else keep
    (tmp_path / "x.jpg").write_bytes(data[:end])
    reason = "the file is empty" if end == 0 else "(?i:.*truncated)"
    with pytest.raises(DataError, match=rf"x\.jpg: is truncated, damaged or not an image \({reason}"):
        images.read_image(tmp_path / "x.jpg")


def test_a_file_that_is_no_image_is_refused_without_naming_a_buffer(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"x\.jpg: is truncated, .* \(its 6 bytes are neither JPEG nor PNG\)"):
        images.read_image(tmp_path / "x.jpg")


PIXELS = np.random.default_rng(1).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def opaque(alpha: int) -> Image.Image:
    image = Image.fromarray(PIXELS).convert("RGBA")
    image.putalpha(Image.new("L", image.size, 255))
    image.putpixel((3, 2), (*image.getpixel((3, 2))[:3], alpha))  # type: ignore[index]
    return image


def test_images_of_8_bits_are_read_with_every_value_as_it_is(tmp_path: Path) -> None:
    grey, palette = Image.fromarray(PIXELS[..., 0]), Image.fromarray(PIXELS).quantize(40)
    cases = {
        "rgb": (Image.fromarray(PIXELS), PIXELS),
        "grey": (grey, PIXELS[..., :1].repeat(3, 2)),
        "opaque": (opaque(255), PIXELS),
        "palette": (palette, np.array(palette.getpalette()).reshape(-1, 3)[np.array(palette)]),
        "black and white": (Image.fromarray(PIXELS[..., 0] > 99), 255 * (PIXELS[..., :1] > 99).repeat(3, 2)),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / f"{name}.png")
        read = images.read_image(tmp_path / f"{name}.png", (9, 6))
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, expected, err_msg=name)


def test_what_has_no_exact_rgb_values_of_8_bits_is_refused_by_name(tmp_path: Path) -> None:
    deep = np.full((6, 9), 4000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    (tmp_path / "deep-rgb.png").write_bytes(sixteen_bits_of_rgb())
    Image.new("CMYK", (9, 6)).save(tmp_path / "cmyk.jpg")
    opaque(254).save(tmp_path / "alpha.png")
    keyed = Image.fromarray(PIXELS)
    keyed.save(tmp_path / "keyed.png", transparency=tuple(int(v) for v in PIXELS[2, 3]))
    Image.fromarray(PIXELS[..., 0].astype(np.float32)).save(tmp_path / "float.tiff")
    for name, reason in {
        "deep.png": r"has 16 bits a channel \(grey\)",
        "deep-rgb.png": r"has 16 bits a channel \(RGB\)",
        "cmyk.jpg": r"\(CMYK\)",
        "alpha.png": "has transparent pixels",
        "keyed.png": "has transparent pixels",
        "float.tiff": "neither JPEG nor PNG",
    }.items():
        with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
            images.read_image(tmp_path / name)


def sixteen_bits_of_rgb() -> bytes:
    """A PNG that Pillow cannot write: 2 x 1 pixels of three channels of 16 bits."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1 + 12))),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def png_that_states(width: int, height: int) -> bytes:
    """A small file with right checksums whose header states any size."""
    whole = encode(Image.new("L", (8, 8)), "PNG")
    body = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + b"IHDR" + body + struct.pack(">I", zlib.crc32(b"IHDR" + body))
    return whole[:8] + header + whole[8 + len(header) :]


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, form, **options)
    return data.getvalue()


@pytest.mark.parametrize("size", [None, (1600, 900), (65_000, 65_000)])
def test_an_image_of_another_size_or_of_too_many_pixels_is_refused_without_memory_for_it(
    tmp_path: Path, size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    path = tmp_path / "bomb.png"
    path.write_bytes(png_that_states(65_000, 65_000))
    reason = "is 65000 x 65000 pixels, the frame table says 1600 x 900" if size == (1600, 900) else "states 65000 x"
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=rf"bomb\.png: {reason}"):
        images.read_image(path, size)
    with pytest.raises(DataError, match=rf"bomb\.png: {reason}"):
        images.read_label_map(path, size)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB; decoded, 4 GB


def test_pillows_own_limit_neither_helps_nor_hinders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    np.testing.assert_array_equal(images.read_image(tmp_path / "x.png", (9, 6)), PIXELS)


def test_a_postscript_file_that_is_called_jpg_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    path = tmp_path / "x.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(DataError, match=r"x\.jpg: is truncated, .* neither JPEG nor PNG"):
        images.read_image(path)


def test_a_jpeg_of_several_pictures_gives_its_first(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (9, 6), (200, 0, 0)), Image.new("RGB", (9, 6), (0, 0, 200))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second])
    with Image.open(tmp_path / "x.jpg") as opened:
        assert opened.format == "MPO"
    first.save(tmp_path / "alone.jpg", "JPEG")
    np.testing.assert_array_equal(
        images.read_image(tmp_path / "x.jpg", (9, 6)), images.read_image(tmp_path / "alone.jpg")
    )


def test_a_sparse_file_and_a_fifo_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(10 * 2**30)
    os.mkfifo(tmp_path / "fifo.jpg")
    for read in (images.read_image, images.read_label_map):
        with pytest.raises(DataError, match=r"huge\.jpg: holds 10737418240 bytes, more than"):
            read(tmp_path / "huge.jpg")
        with pytest.raises(DataError, match=r"fifo\.jpg: is a FIFO"):
            read(tmp_path / "fifo.jpg")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_label_map_is_refused_or_unchanged(tmp_path: Path, data: st.DataObject) -> None:
    labels = np.random.default_rng(0).integers(0, 150, (18, 32)).astype(np.uint16)
    png = bytearray(images.encode_label_map(labels))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(png) - 1))
        png[at] = data.draw(st.integers(0, 255))
    (tmp_path / "map.png").write_bytes(png)
    read = read_or_reason(images.read_label_map, tmp_path / "map.png", (32, 18))
    if isinstance(read, str):
        assert str(tmp_path / "map.png") in read
    else:
        np.testing.assert_array_equal(read, labels)


def read_or_reason(read: Callable[..., np.ndarray], path: Path, size: tuple[int, int]) -> np.ndarray | str:
    try:
        return read(path, size)
    except DataError as error:
        return str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_image_is_a_named_error_or_an_image_of_its_size(tmp_path: Path, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["JPEG", "PNG"]))
    spoiled = bytearray(encode(Image.fromarray(PIXELS), form))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(spoiled) - 1))
        spoiled[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.img"
    path.write_bytes(spoiled[: data.draw(st.integers(len(spoiled) // 2, len(spoiled)))])
    read = read_or_reason(images.read_image, path, (9, 6))
    assert str(path) in read if isinstance(read, str) else read.shape == (6, 9, 3)


def test_checked_pngs_that_hold_too_little_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png_that_states(500, 400))
    with pytest.raises(DataError, match=r"x\.png: is truncated, damaged or not an image"):
        images.read_image(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: is truncated, .*; make it again with `slidr superpixels"):
        images.read_label_map(tmp_path / "x.png")


def test_a_label_map_of_another_kind_or_with_impossible_labels_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    Image.new("RGB", (32, 18)).save(path)
    with pytest.raises(DataError, match=r"map\.png: expected a PNG of one channel .* got a PNG of 8 bits \(RGB\)"):
        images.read_label_map(path)
    Image.new("1", (32, 18)).save(path)
    with pytest.raises(DataError, match="got a PNG of 1 bits"):
        images.read_label_map(path)
    Image.new("L", (32, 18)).save(path, "JPEG")
    with pytest.raises(DataError, match="got a JPEG of 8 bits"):
        images.read_label_map(path)
    labels = np.zeros((18, 32), np.uint16)
    path.write_bytes(images.encode_label_map(labels) + b"x")
    with pytest.raises(DataError, match="1 bytes follow the end"):
        images.read_label_map(path)
    most = most_labels(18, 32, 10)
    for label, taken in ((most - 1, True), (most, False), (65_535, False)):
        labels[3, 4] = label
        path.write_bytes(images.encode_label_map(labels))
        np.testing.assert_array_equal(images.read_label_map(path, (32, 18)), labels)  # without a known count
        if taken:
            np.testing.assert_array_equal(images.read_label_map(path, (32, 18), segments=10), labels)
        else:
            with pytest.raises(DataError, match=rf"map\.png: holds labels 0 to {label}; 10 .* at most {most} labels"):
                images.read_label_map(path, (32, 18), segments=10)
    path.write_bytes(images.encode_label_map(np.ones((18, 32), np.uint16)))
    with pytest.raises(DataError, match=r"map\.png: holds labels 1 to 1; .*counted from 0"):
        images.read_label_map(path, segments=10)


@pytest.mark.parametrize(("columns", "size"), [(5, 20), (4, 16)])
def test_a_sweep_of_no_whole_number_of_points_is_refused(tmp_path: Path, columns: int, size: int) -> None:
    cloud = np.random.default_rng(0).normal(size=(7, columns)).astype(np.float32)
    path = tmp_path / "x.bin"
    path.write_bytes(cloud.tobytes())
    np.testing.assert_array_equal(images.read_sweep(path, columns), cloud)
    path.write_bytes(cloud.tobytes()[:-3])
    with pytest.raises(DataError, match=rf"x\.bin: truncated: {7 * size - 3} bytes .* {size} bytes"):
        images.read_sweep(path, columns)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.bin: is empty"):
        images.read_sweep(path, columns)


def test_labels_of_another_number_of_points_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(range(6)))
    assert images.read_point_labels(path, np.uint8, 6).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"x\.bin: holds 6 labels for a sweep of 7 points"):
        images.read_point_labels(path, np.uint8, 7)
    with pytest.raises(DataError, match=r"holds 1\.5 labels for a sweep of 6 points"):
        images.read_point_labels(path, np.uint32, 6)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: cannot be read \(No such file"):
        images.read_image(tmp_path / "gone.jpg")
