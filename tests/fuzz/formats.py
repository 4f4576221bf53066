"""Structured damage of formats without a tree: parquet, rows of numbers, images, safetensors."""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from safetensors.torch import load, save

from . import trees
from .mutations import Change, Skipped

# ---------------------------------------------------------------------------------------------- parquet


def _missing_column(table: pa.Table, rng: random.Random) -> pa.Table:
    return table.drop_columns([rng.choice(table.column_names)])


def _null_column(table: pa.Table, rng: random.Random) -> pa.Table:
    number = rng.randrange(table.num_columns)
    field = table.schema.field(number)
    nulls = pa.nulls(len(table), rng.choice((field.type, pa.null())))
    return table.set_column(number, pa.field(field.name, nulls.type), nulls)


def _other_column_type(table: pa.Table, rng: random.Random) -> pa.Table:
    number = rng.randrange(table.num_columns)
    text = pa.array([str(value) for value in table.column(number).to_pylist()])
    numbers = pa.array(range(len(table)), pa.int64())
    column = rng.choice((text, numbers, pa.array([[str(i)] for i in range(len(table))]), pa.array([b"x"] * len(table))))
    return table.set_column(number, table.column_names[number], column)


def _renamed_column(table: pa.Table, rng: random.Random) -> pa.Table:
    names = list(table.column_names)
    names[rng.randrange(len(names))] += rng.choice("xé ")
    return table.rename_columns(names)


def _other_rows(table: pa.Table, rng: random.Random) -> pa.Table:
    rows = list(range(len(table)))
    chosen = rng.choice((rows[:-1], [*rows, 0], rows[::-1], rows[:0], [1, *rows[1:]]))
    return table.take(pa.array(chosen, pa.int64()))


def _other_value(table: pa.Table, rng: random.Random) -> pa.Table:
    """One cell has a value of another row, or a number of it is not finite, zero or huge."""
    number = rng.randrange(table.num_columns)
    values = table.column(number).to_pylist()
    row = rng.randrange(len(values))
    bad = (float("nan"), float("inf"), 0.0, 1e30, -1e300)
    if isinstance(values[row], list) and values[row] and isinstance(values[row][0], float):
        values[row] = [rng.choice(bad) if rng.random() < 0.3 else value for value in values[row]]
        values[row][rng.randrange(len(values[row]))] = rng.choice(bad)
    elif isinstance(values[row], list) and values[row] and isinstance(values[row][0], dict):
        camera = values[row][rng.randrange(len(values[row]))]
        key = rng.choice(list(camera))
        camera[key] = _like(camera[key], rng, bad)
    else:
        values[row] = _like(values[row], rng, bad)
    field = table.schema.field(number)
    return table.set_column(number, field, pa.array(values, field.type))


def _like(value: Any, rng: random.Random, bad: tuple[float, ...]) -> Any:
    if isinstance(value, int):
        return rng.choice((0, -1, 2**31 - 1))
    if isinstance(value, str):
        return rng.choice(("", "x" * 400, "../../etc/passwd", "/etc/passwd", "a/b", "a\0b", None))
    if isinstance(value, list):
        return [rng.choice(bad)] * len(value) if value and isinstance(value[0], float) else []
    return None


def _other_metadata(table: pa.Table, rng: random.Random) -> pa.Table:
    metadata = dict(table.schema.metadata or {})
    if not metadata:
        raise Skipped("no metadata")
    key = rng.choice(sorted(metadata))
    value = rng.choice((None, b"", b"0", b"\xff\xfe", b"cityscapes", b"0" * 64, b"2"))
    if value is None:
        del metadata[key]
    else:
        metadata[key] = value
    return table.replace_schema_metadata(metadata)


_TABLE_CHANGES: Mapping[str, Callable[[pa.Table, random.Random], pa.Table]] = {
    "missing column": _missing_column,
    "null column": _null_column,
    "other column type": _other_column_type,
    "renamed column": _renamed_column,
    "other rows": _other_rows,
    "other value": _other_value,
    "other metadata": _other_metadata,
}


def _parquet(change: Callable[[pa.Table, random.Random], pa.Table]) -> Change:
    """The changed table under the old file's own metadata, as another program would write it."""

    def changed(data: bytes, rng: random.Random) -> bytes:
        file = pq.ParquetFile(io.BytesIO(data))
        own = {k: v for k, v in (file.metadata.metadata or {}).items() if k != b"ARROW:schema"}
        table = change(file.read().replace_schema_metadata(own), rng)
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, table.schema, compression="zstd", store_schema=True) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata(table.schema.metadata or {})
        return sink.getvalue()

    return changed


PARQUET: Mapping[str, Change] = {name: _parquet(change) for name, change in _TABLE_CHANGES.items()}

# ---------------------------------------------------------------------------------------------- rows of numbers


def numbers(dtype: type[np.generic], columns: int) -> Mapping[str, Change]:
    """The structured mutations of a file of bare rows, such as a sweep."""

    def rows(data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype).reshape(-1, columns).copy()

    def one(data: bytes, rng: random.Random, values: tuple[float, ...]) -> bytes:
        table = rows(data)
        table[rng.randrange(len(table)), rng.randrange(columns)] = rng.choice(values)
        return table.tobytes()

    floats = np.issubdtype(dtype, np.floating)
    table: dict[str, Change] = {
        "transposed": lambda data, rng: np.ascontiguousarray(rows(data).T).tobytes(),
        "other dtype": lambda data, rng: rows(data).astype(rng.choice((np.float64, np.float16, np.int16))).tobytes(),
        "other columns": lambda data, rng: _columns(rows(data), rng).tobytes(),
        "other rows": lambda data, rng: rng.choice((rows(data)[:-1], rows(data)[::-1][:7], rows(data)[:1])).tobytes(),
    }
    if floats:
        table["not finite"] = lambda data, rng: one(data, rng, (np.nan, np.inf, -np.inf))
        table["huge number"] = lambda data, rng: one(data, rng, (1e30, -1e30, 1e9, -1.0, 3e38))
    else:
        table["huge number"] = lambda data, rng: one(data, rng, (np.iinfo(dtype).max, np.iinfo(dtype).max - 3, 200))
    return table


def _columns(table: np.ndarray, rng: random.Random) -> np.ndarray:
    wider = np.concatenate([table, table[:, :1]], axis=1)
    return rng.choice((wider, table[:, :-1])) if table.shape[1] > 1 else wider


# ---------------------------------------------------------------------------------------------- text of numbers


def _word(data: bytes, rng: random.Random, options: tuple[bytes, ...]) -> bytes:
    lines = data.split(b"\n")
    rows = [i for i, line in enumerate(lines) if line.strip()]
    row = rng.choice(rows)
    words = lines[row].split(b" ")
    words[rng.randrange(len(words))] = rng.choice(options)
    lines[row] = b" ".join(words)
    return b"\n".join(lines)


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    return b"\n".join(rng.choice((lines[1:], lines[:1], lines[::-1], [*lines, b"x y z"], [b"# a comment", *lines])))


TEXT: Mapping[str, Change] = {
    "not finite": lambda data, rng: _word(data, rng, (b"nan", b"inf", b"-inf", b"NaN")),
    "huge number": lambda data, rng: _word(data, rng, (b"1e300", b"1e30", b"-1e30", b"9" * 400, b"1e999")),
    "other type": lambda data, rng: _word(
        data, rng, (b"text", b"1_0", b"", b"0x10", b"1,5", b"\xc2\xb2", b"\0", b"[1]")
    ),
    "other lines": _lines,
    "repeated line": trees.JSON["repeated line"],
    "windows": lambda data, rng: rng.choice(
        (data.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + data, data.decode().encode("utf-16"))
    ),
}

# ---------------------------------------------------------------------------------------------- images


def _as(mode: str, form: str) -> Change:
    def change(data: bytes, rng: random.Random) -> bytes:
        image = Image.open(io.BytesIO(data))
        sink = io.BytesIO()
        if mode == "I;16":
            image = Image.fromarray((np.asarray(image.convert("L"), np.uint16) * 257).astype(np.uint16))
        elif mode == "labels":
            image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) + rng.choice((1, 40, 1000, 60000)))
        elif mode == "size":
            image = image.resize((image.width + rng.choice((-1, 1, 16)), image.height))
        elif mode == "transposed":
            image = image.transpose(Image.Transpose.ROTATE_90)
        else:
            image = image.convert(mode)
        image.save(sink, format=form)
        return sink.getvalue()

    return change


def _bomb(data: bytes, rng: random.Random) -> bytes:
    """A PNG of a few bytes whose header says 65000 x 65000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    depth = rng.choice((b"\x08\x00", b"\x08\x02", b"\x10\x00"))
    header = struct.pack(">II", 65000, 65000) + depth + b"\0\0\0"
    pixels = zlib.compress(bytes(5_000_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _postscript(data: bytes, rng: random.Random) -> bytes:
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 160 90\n{} loop\n"


IMAGE: Mapping[str, Change] = {
    "16 bits": _as("I;16", "PNG"),
    "float": _as("F", "TIFF"),
    "palette": _as("P", "PNG"),
    "one channel": _as("L", "PNG"),
    "alpha": _as("RGBA", "PNG"),
    "cmyk": _as("CMYK", "JPEG"),
    "other format": _as("RGB", "GIF"),
    "other size": _as("size", "PNG"),
    "transposed": _as("transposed", "PNG"),
    "bomb": _bomb,
    "postscript": _postscript,
}
LABEL_MAP: Mapping[str, Change] = {
    "other labels": _as("labels", "PNG"),
    "colours": _as("RGB", "PNG"),
    "palette": _as("P", "PNG"),
    "one bit": _as("1", "PNG"),
    "other format": _as("L", "TIFF"),
    "other size": _as("size", "PNG"),
    "transposed": _as("transposed", "PNG"),
    "bomb": _bomb,
    "postscript": _postscript,
}

# ---------------------------------------------------------------------------------------------- safetensors


def _header(name: str) -> Change:
    """The JSON before the tensors changed, its length put right."""

    def change(data: bytes, rng: random.Random) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        text = trees.JSON[name](data[8 : 8 + length], rng)
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return change


def _tensors(name: str) -> Change:
    def change(data: bytes, rng: random.Random) -> bytes:
        (length,) = struct.unpack_from("<Q", data)
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
        state = trees.change_tensor(dict(load(data)), name, rng)
        if not all(isinstance(value, trees.Tensor) for value in state.values()):
            raise Skipped("safetensors holds tensors only")
        return save({key: value.contiguous() for key, value in state.items()}, metadata)

    return change


SAFETENSORS: Mapping[str, Change] = {
    **{name: _header(name) for name in trees.NAMES},
    **{name: _tensors(name) for name in ("tensor dtype", "tensor not finite", "tensor shape", "tensor transposed")},
}
