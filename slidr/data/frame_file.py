"""The file of a frame table: parquet with checksums, so that damage is an error and never another frame.

Three guards, each over what the one before leaves open: parquet's checksum of every page; a digest of every column of
every row group, compared with what was read; a digest of the file's own metadata, which hold those digests, the data
set and the fingerprint. Tables of earlier versions have a fingerprint only, over tokens, paths, splits and the cameras'
matrices: it is computed again when one is opened, and the rules for frames are applied to its rows.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any, TypeVar, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from slidr.config import DatasetName, MissingFiles
from slidr.data import storage
from slidr.data.frame_columns import CAMERA_MATRICES, SCHEMA, encode, one_batch
from slidr.data.frame_rules import FrameRules
from slidr.data.storage import DataError
from slidr.types import Frame
from slidr.urls import redact_url

T = TypeVar("T")

LAYOUT = 1
ROW_GROUP = 256  # frames that are read and decoded together: about 1 MB and 5 ms
_LAYOUT, _DATASET, _FINGERPRINT = "slidr.layout", "slidr.dataset", "slidr.fingerprint"
_COLUMNS, _DIGEST = "slidr.columns", "slidr.digest"
ALLOW_MISSING, LEFT_OUT = "slidr.allow_missing", "slidr.left_out"
_FIRST_KEYS = {_LAYOUT, _DATASET, _FINGERPRINT}  # all that earlier versions wrote
# What pyarrow raises of a damaged file, besides its own exceptions.
_DAMAGE = (pa.ArrowException, OSError, KeyError, IndexError, ValueError, OverflowError, MemoryError)


def write_table(frames: Iterable[Frame], path: str, dataset: DatasetName, notes: Mapping[str, str]) -> str:
    """Writes frames and `notes` (metadata) as a frame table; returns its fingerprint. Raises `DataError`."""
    fingerprint = hashlib.sha256(dataset.encode())
    rules = FrameRules(path, dataset)
    digests: list[dict[str, str]] = []
    rows: list[int] = []
    sink = pa.BufferOutputStream()
    stream = iter(frames)
    with pq.ParquetWriter(sink, SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        while group := list(islice(stream, ROW_GROUP)):
            batch = encode(group, path)
            rules.check(batch)
            _feed_fingerprint(fingerprint, batch)
            digests.append(column_digests(batch))
            rows.append(len(group))
            writer.write_table(pa.Table.from_batches([batch]), row_group_size=ROW_GROUP)
        metadata = {
            _LAYOUT: str(LAYOUT),
            _DATASET: dataset,
            _FINGERPRINT: fingerprint.hexdigest(),
            _COLUMNS: json.dumps({"rows": rows, "digests": digests}),
            **notes,
        }
        metadata[_DIGEST] = _digest_of(metadata)
        writer.add_key_value_metadata(metadata)
    storage.write_bytes_atomic(path, sink.getvalue().to_pybytes())
    return fingerprint.hexdigest()


class TableFile:
    """An open frame table. Opening compares metadata and schema; reading compares what is read with its digests."""

    def __init__(self, path: str, verified: bool = False) -> None:
        """`verified`: a table of an earlier version is not compared with its fingerprint."""
        self.path = path
        if not storage.exists(path):
            raise DataError(f"{redact_url(path)}: there is no frame table; write it with `slidr frames CONFIG`")
        source = storage.open_read(path)
        self._file: pq.ParquetFile = self._guarded(
            lambda: pq.ParquetFile(source, pre_buffer=True, page_checksum_verification=True)
        )
        self.metadata = self._guarded(
            lambda: {key.decode(): value.decode() for key, value in (self._file.metadata.metadata or {}).items()}
        )
        self._require_layout()
        self._require_schema()
        self.dataset = self._known_dataset()
        self.fingerprint = self._known_fingerprint()
        sizes = self._guarded(self._sizes)
        self.group_starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._digests = self._known_digests(sizes)
        if self._digests is None and not verified:
            _verify_earlier(path, _stamp(path))

    @property
    def allow_missing(self) -> MissingFiles | None:
        """The `data.allow_missing` that the table was written with."""
        noted = self.metadata.get(ALLOW_MISSING)
        return next((name for name in get_args(MissingFiles) if name == noted), None)

    def read(self, columns: list[str]) -> pa.Table:
        """Some columns of all rows."""
        table = self._guarded(lambda: self._file.read(columns=columns))
        self._compare(table, range(len(self.group_starts) - 1))
        return table

    def read_group(self, number: int) -> pa.Table:
        """All columns of a row group."""
        table = self._guarded(lambda: self._file.read_row_group(number))
        self._compare(table, [number])
        return table

    def verify(self) -> None:
        """Reads and compares everything, once a process. Raises `DataError` where the file is damaged."""
        _verify(self.path, _stamp(self.path))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows, row group by row group."""
        for number in range(len(self.group_starts) - 1):
            yield one_batch(self.read_group(number))

    def _guarded(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except DataError:
            raise
        except _DAMAGE as error:
            if getattr(error, "errno", None) == errno.EMFILE:
                raise  # this process's own fault, not the file's
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> DataError:
        return DataError(
            f"{redact_url(self.path)}: is not a readable frame table ({what[:200]}); write it again with `slidr frames "
            "CONFIG`"
        )

    def _require_layout(self) -> None:
        layout = self.metadata.get(_LAYOUT, "none")
        if layout != str(LAYOUT):
            raise DataError(
                f"{redact_url(self.path)}: expected a frame table of layout {LAYOUT}, got {layout:.20}; write it again "
                "with `slidr frames CONFIG`"
            )

    def _require_schema(self) -> None:
        found = self._guarded(lambda: {field.name: field.type for field in self._file.schema_arrow})
        for field in SCHEMA:
            if field.name not in found:
                raise self._damaged(f"column {field.name} is missing; it has {', '.join(found) or 'none'}")
            if not found[field.name].equals(field.type):
                raise self._damaged(f"column {field.name}: expected {field.type}, got {found[field.name]}")

    def _known_dataset(self) -> DatasetName:
        for name in get_args(DatasetName):
            if self.metadata.get(_DATASET) == name:
                return name
        raise self._damaged(
            f"data set {self.metadata.get(_DATASET, 'none'):.40}; expected one of {list(get_args(DatasetName))}"
        )

    def _known_fingerprint(self) -> str:
        fingerprint = self.metadata.get(_FINGERPRINT, "none")
        if re.fullmatch(r"[0-9a-f]{64}", fingerprint) is None or not fingerprint.strip("0"):
            raise self._damaged(f"fingerprint {fingerprint:.80}; expected 64 hexadecimal digits")
        return fingerprint

    def _sizes(self) -> list[int]:
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if min(sizes, default=0) < 0 or sum(sizes) != metadata.num_rows:
            raise self._damaged(f"{metadata.num_rows} rows in groups of {sizes[:20]}")
        return sizes

    def _known_digests(self, sizes: list[int]) -> list[dict[str, str]] | None:
        """The digests of each row group's columns; None where the table has none, as earlier versions'."""
        if _DIGEST not in self.metadata and {key for key in self.metadata if key.startswith("slidr.")} <= _FIRST_KEYS:
            return None
        if self.metadata.get(_DIGEST) != _digest_of(self.metadata):
            raise self._damaged("its metadata do not have the digest that they were written with")
        columns = json.loads(self.metadata[_COLUMNS])
        if columns["rows"] != sizes:
            raise self._damaged(f"row groups of {sizes[:20]} frames, written were {columns['rows'][:20]}")
        return columns["digests"]

    def _compare(self, table: pa.Table, groups: Sequence[int]) -> None:
        """Compares what was read from row groups in a row with their digests."""
        rows = int(self.group_starts[groups[-1] + 1] - self.group_starts[groups[0]]) if groups else 0
        if table.num_rows != rows:
            raise self._damaged(f"expected {rows} rows, got {table.num_rows}")
        if self._digests is None or not groups:
            return
        batch = one_batch(table)
        first = self.group_starts[groups[0]]
        for number in groups:
            start, end = (int(self.group_starts[i] - first) for i in (number, number + 1))
            found = self._guarded(partial(column_digests, batch.slice(start, end - start)))
            for name, digest in found.items():
                if self._digests[number].get(name) != digest:
                    place = f"{first + start} to {first + end - 1}"
                    raise self._damaged(f"column {name} of frames {place} is not what was written")


def column_digests(batch: pa.RecordBatch) -> dict[str, str]:
    """A short digest of every column, and of every field of the cameras."""
    digests: dict[str, str] = {}
    for field in batch.schema:
        column = batch.column(field.name)
        if field.name == "cameras":
            digests["cameras"] = _short_digest(_lengths(column))
            cameras = column.flatten()
            digests |= {f"cameras.{f.name}": _short_digest(*_parts(cameras.field(f.name))) for f in cameras.type}
        else:
            digests[field.name] = _short_digest(*_parts(column))
    return digests


def _parts(column: pa.Array) -> Iterator[np.ndarray]:
    """Arrays that say all that a column holds, however its buffers are laid out."""
    yield column.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_list(column.type):
        yield _lengths(column)
        yield from _parts(column.flatten())
    elif pa.types.is_fixed_size_list(column.type):
        yield from _parts(column.flatten())
    elif pa.types.is_string(column.type):
        whole = column.fill_null("")
        _, offsets, data = whole.buffers()
        if not len(whole) or offsets is None:
            return
        bounds = np.frombuffer(offsets, np.int32)[whole.offset : whole.offset + len(whole) + 1]
        yield np.diff(bounds)
        if data is not None:
            yield np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    else:
        yield column.fill_null(0).to_numpy(zero_copy_only=False)


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)


def _short_digest(*parts: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _digest_of(metadata: Mapping[str, str]) -> str:
    """The digest of this project's metadata: all of them but the digest itself."""
    known = {key: value for key, value in metadata.items() if key.startswith("slidr.") and key != _DIGEST}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def _feed_fingerprint(digest: Any, batch: pa.RecordBatch) -> None:
    """Feeds rows to the fingerprint, whose value runs and searches record: it must never change for equal rows."""
    for row in batch.select(["token", "lidar_path", "label_path", "splits"]).to_pylist():
        digest.update(json.dumps(row, sort_keys=True).encode())
    cameras = batch.column("cameras").flatten()
    digest.update(json.dumps(cameras.field("token").to_pylist()).encode())
    for name in CAMERA_MATRICES:
        digest.update(np.ascontiguousarray(cameras.field(name).flatten().to_numpy(zero_copy_only=False)))


@lru_cache(maxsize=16)
def _verify_earlier(path: str, stamp: tuple[float, ...]) -> None:
    """Compares the rows of a table of an earlier version with its fingerprint and the rules: once for each `stamp`."""
    table = TableFile(path, verified=True)
    digest, rules = hashlib.sha256(table.dataset.encode()), FrameRules(path, table.dataset, earlier=True)
    for batch in table.batches():
        table._guarded(partial(rules.check, batch))
        _feed_fingerprint(digest, batch)
    if digest.hexdigest() != table.fingerprint:
        raise table._damaged("its rows do not have the fingerprint that they were written with")


@lru_cache(maxsize=16)
def _verify(path: str, stamp: tuple[float, ...]) -> None:
    """Reads every row group of a table and compares it with its digests: once for each `stamp`."""
    table = TableFile(path)
    for number in range(len(table.group_starts) - 1):
        table.read_group(number)


def _stamp(path: str) -> tuple[float, ...]:
    """Changes when a file is written."""
    if storage.is_remote(path):
        return (storage.modified(path),)
    status = os.stat(storage.join(path))
    return (status.st_mtime_ns, status.st_size, status.st_ino)
