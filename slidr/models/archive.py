"""Files of weights opened safely: of bounded size, with intact checksums, without running code from them.

torch itself skips the checksums of its zip files, so a flipped bit would become another weight. Files of torch's older
format and foreign .safetensors have no checksum; our own .safetensors hold a digest of their contents.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, Literal

import numpy as np
import torch
from torch import Tensor

from slidr.data.storage import WEIGHTS_BYTES
from slidr.urls import RedactedError

Kind = Literal["zip", "pickle", "safetensors"]

HEAD_BYTES = 64  # enough of a file for `kind_of`
DIGEST = "digest"  # the metadata key of our own .safetensors
INFLATED_BYTES = 2**30  # the most that compressed entries may unpack to; torch.save compresses none

_OWN_METADATA = {"format", "epoch", "config", DIGEST}
_HEADER_BYTES = 100_000_000  # safetensors' own limit of its header
_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number, with which its older format begins

# What published checkpoints hold besides tensors and plain values; none of it can run code when loaded.
_scalar: Any = np.float64(0).__reduce__()[0]  # how numpy pickles its numbers; its module differs between numpy 1 and 2
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
]


class Damaged(RedactedError, ValueError):
    """The reason why a file of weights cannot be read, without the file's name."""


class NeedsCode(Damaged):
    """A pickle that holds an object other than tensors and plain values; `wanted` is the name of its class."""

    def __init__(self, wanted: str) -> None:
        super().__init__(f"loading it would run {wanted}")
        self.wanted = wanted


def kind_of(head: bytes) -> Kind | None:
    """The format of a file that begins with `head` (`HEAD_BYTES` of it), or None for a file that `load` cannot read."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head[:1] == b"\x80" and _MAGIC in head:
        return "pickle"
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _HEADER_BYTES:
        return "safetensors"
    return None


def load(file: IO[bytes], expected: Kind | None = None) -> Any:
    """The contents of a PyTorch file or of a .safetensors file, by its first bytes; tensors on the CPU.

    A file of another kind than `expected` is refused. A .safetensors file comes back as
    {"state_dict": ..., **metadata}. Raises `NeedsCode` for a pickle that wants code, `Damaged` for every other file
    that cannot be read whole.
    """
    head = file.read(HEAD_BYTES)
    size = file.seek(0, os.SEEK_END)
    kind = kind_of(head)
    if kind is None or (expected is not None and kind != expected):
        wanted = "a checkpoint of torch or safetensors" if expected is None else expected
        raise Damaged(f"begins with {head[:16]!r}, which is not {wanted}")
    try:
        if kind == "safetensors":
            file.seek(0)
            return _load_safetensors(file.read())
        available = _require_intact(file) if kind == "zip" else size
        file.seek(0)
        contents = _load_pickle(file)
        _require_backed(contents, available)
        return contents
    except Damaged:
        raise
    except Exception as error:  # damaged files raise anything from MemoryError to zlib.error
        raise Damaged(str(error).split("\n")[0] or type(error).__name__) from None


def digest_of(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of tensors (names, types, shapes, bytes) and of metadata other than the digest itself."""
    digest = hashlib.sha256()
    digest.update(json.dumps(sorted((key, value) for key, value in metadata.items() if key != DIGEST)).encode())
    for name, value in sorted(state.items()):
        digest.update(f"\0{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load_pickle(file: IO[bytes]) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:  # torch's own message would advise to open the file unsafely
            raise Damaged("its pickle is damaged or not torch's") from None
        raise NeedsCode(wanted[1]) from None


def _require_intact(file: IO[bytes]) -> int:
    """The bytes in a zip file's entries, once their checksums were compared."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        inflated = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
        if total > WEIGHTS_BYTES or inflated > INFLATED_BYTES:
            limit = WEIGHTS_BYTES if total > WEIGHTS_BYTES else INFLATED_BYTES
            raise Damaged(f"its entries unpack to {total} bytes, more than the {limit} that are read")
        if len({entry.filename for entry in entries}) < len(entries):
            raise Damaged("two of its entries have one name")
        # After torch.serialization.set_crc32_options(False) torch writes zero for every checksum.
        if any(entry.CRC != 0 for entry in entries if entry.file_size > 0):
            damaged = archive.testzip()
            if damaged is not None:
                raise Damaged(f"the checksum of its entry {damaged} does not match: bytes of it were changed")
    return total


def _require_backed(contents: Any, available: int) -> None:
    """Raises `Damaged` where tensors claim more memory than the file has bytes for (torch would make it up)."""
    stored: dict[int, int] = {}
    for value in tensors_in(contents):
        if value.layout != torch.strided or value.device.type != "cpu":
            continue
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        if value.numel() * value.element_size() > available + INFLATED_BYTES:
            raise Damaged(f"a tensor of shape {tuple(value.shape)} is larger than the file")
    if sum(stored.values()) > available:
        raise Damaged(f"its tensors need {sum(stored.values())} bytes, the file holds {available}")


def tensors_in(contents: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers; a container that is in there many times is entered once."""
    pending, seen = [contents], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | set | argparse.Namespace) and id(value) not in seen:
            seen.add(id(value))
            inner = vars(value) if isinstance(value, argparse.Namespace) else value
            pending += inner.values() if isinstance(inner, dict) else inner


def _load_safetensors(data: bytes) -> dict[str, Any]:
    from safetensors.torch import load as load_tensors

    state = load_tensors(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata: dict[str, str] = header.get("__metadata__") or {}
    own = DIGEST in metadata or metadata.get("format") == json.dumps("slidr")
    if own and not set(metadata) <= _OWN_METADATA:
        raise Damaged(f"its metadata has keys that slidr does not write: {sorted(set(metadata) - _OWN_METADATA)}")
    if DIGEST in metadata and metadata[DIGEST] != digest_of(state, metadata):
        raise Damaged("the digest in its metadata does not match: bytes of it were changed")
    return {**{key: _parsed(value) for key, value in metadata.items() if key != DIGEST}, "state_dict": state}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
    except RecursionError:
        raise Damaged("its metadata is nested too deeply") from None
