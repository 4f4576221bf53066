"""The images of a frame table as columns: millions of them in little memory, decoded a few at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import eq
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from slidr.data.label_maps import name_problem
from slidr.data.storage import DataError
from slidr.shapes import Int64

_AT_ONCE = 4096  # images that are Python objects at a time
_MADE_AT_ONCE = 65_536  # images whose columns are made together
_NAMED = 5  # images that a message names

SCHEMA = pa.schema([("token", pa.string()), ("path", pa.string()), ("width", pa.int32()), ("height", pa.int32())])


@dataclass(frozen=True)
class ImageRef:
    """An image of the table: what the superpixel job needs to know of it."""

    token: str
    path: str  # relative to the dataroot
    width: int  # pixels
    height: int  # pixels


class ImageList(Sequence[ImageRef]):
    """Images, stored as columns. A slice is a list of the same kind and copies nothing."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, images: Iterable[ImageRef]) -> ImageList:
        """The list of these images."""
        stream, parts = iter(images), [SCHEMA.empty_table()]
        while some := list(islice(stream, _MADE_AT_ONCE)):
            columns = ([getattr(image, name) for image in some] for name in SCHEMA.names)
            parts.append(pa.table(list(columns), schema=SCHEMA))
        return cls(pa.concat_tables(parts).combine_chunks())

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> ImageRef: ...
    @overload
    def __getitem__(self, index: slice) -> ImageList: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"image list: a slice has step 1, got {step}")
            return ImageList(self.table.slice(first, max(0, last - first)))
        if not -len(self) <= index < len(self):
            raise IndexError(f"image list: {index} is outside of {len(self)} images")
        return next(iter(ImageList(self.table.slice(index % len(self), 1))))

    def __iter__(self) -> Iterator[ImageRef]:
        for first in range(0, len(self), _AT_ONCE):
            yield from map(ImageRef, *(c.to_pylist() for c in self.table.slice(first, _AT_ONCE).columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None  # type: ignore[assignment]

    def take(self, indices: Int64[np.ndarray, " M"]) -> ImageList:
        """The images at these places, in this order."""
        return ImageList(self.table.take(pa.array(np.asarray(indices, np.int64))))

    @property
    def tokens(self) -> Iterator[str]:
        """The images' tokens, one after the other."""
        column = self.table.column("token")
        return (token for first in range(0, len(self), _AT_ONCE) for token in column.slice(first, _AT_ONCE).to_pylist())

    @property
    def pixels(self) -> Int64[np.ndarray, " M"]:
        """The pixels of each image."""
        width, height = (self.table.column(name).to_numpy().astype(np.int64) for name in ("width", "height"))
        return width * height

    def distinct(self) -> ImageList:
        """Each image once, in the order of its first row.

        Raises `DataError` where two images have one token, or where a token cannot name a superpixel map.
        """
        self._require_file_names()
        number = self.table.column("token").combine_chunks().dictionary_encode().indices.to_numpy()
        first = np.unique(number, return_index=True)[1][number]  # of each row, the row where its token comes first
        again = np.flatnonzero(first != np.arange(len(first)))
        if not len(again):
            return self
        repeated, original = self.take(again), self.take(first[again])
        differ = [pair for pair in zip(original, repeated, strict=True) if pair[0] != pair[1]]
        if differ:
            text = "; ".join(f"{a.token}: {a.path} and {b.path}" for a, b in differ[:_NAMED])
            raise DataError(
                f"{text}{_more(len(differ))}: two images have one token and would share a superpixel map; write the "
                "frame table again with a token for each image"
            )
        return self.take(np.flatnonzero(first == np.arange(len(first))))

    def _require_file_names(self) -> None:
        bad = np.fromiter((name_problem(token) is not None for token in self.tokens), bool, len(self))
        if bad.any():
            images = self.take(np.flatnonzero(bad))
            text = ", ".join(
                f"{each.path} (token {each.token!r} {name_problem(each.token)})" for each in images[:_NAMED]
            )
            raise DataError(f"{text}{_more(len(images))}; a superpixel map needs its name; write the frame table again")


def of_cameras(cameras: pa.StructArray, channels: Sequence[str] | None = None) -> ImageList:
    """The images of a frame table's cameras; those of some channels, or all."""
    column = dict(zip((field.name for field in cameras.type), cameras.flatten(), strict=True))
    table = pa.table([column[name] for name in ("token", "image_path", "width", "height")], schema=SCHEMA)
    if channels is not None:
        table = table.filter(pc.is_in(column["channel"], pa.array(list(channels), pa.string())))
    return ImageList(table)


def _more(count: int) -> str:
    return f" (and {count - _NAMED} more)" if count > _NAMED else ""
