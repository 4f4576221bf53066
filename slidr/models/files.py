"""Reading weights files that strangers wrote, and writing our own so that a reader never sees half a file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from slidr.data import storage
from slidr.models import archive
from slidr.models.archive import Damaged, NeedsCode
from slidr.urls import RedactedError, redact_url

# What the user may run where a file's origin is trusted; a test runs exactly these lines.
_KEEP_TENSORS = """
    import torch

    def plain(value):
        if isinstance(value, torch.nn.Module):
            value = value.state_dict()
        if isinstance(value, dict):
            return {{key: plain(inner) for key, inner in value.items() if type(key) in (str, int)}}
        return value if type(value) in (torch.Tensor, torch.nn.Parameter, bool, int, float, str) else None

    torch.save(plain(torch.load({name!r}, map_location="cpu", weights_only=False)), "tensors-only.pt")
"""


class WeightsError(RedactedError, ValueError):
    """Weights that cannot be had, read or used; the message names the file, what was found and what to do."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a PyTorch checkpoint or a .safetensors file on this machine or in an object store, on the CPU.

    A PyTorch file is opened with `weights_only=True`: no code in it can run. A .safetensors file comes back
    as {"state_dict": ..., **metadata}. Raises `WeightsError` for a file that is absent, not a regular file, larger than
    `storage.WEIGHTS_BYTES`, damaged (its checksums are compared), cut off, or holds objects other than tensors and
    plain values; the message then names the first such object's class.
    """
    name = redact_url(os.fspath(path))
    if not storage.is_remote(path) and not storage.exists(path):
        raise WeightsError(f"{name}: no such file")
    size = 0
    try:
        with open_weights(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            contents = archive.load(file, "safetensors" if name.endswith(".safetensors") else None)
    except storage.DataError as error:
        raise WeightsError(str(error)) from error
    except NeedsCode as error:
        local = os.path.basename(name) if storage.is_remote(path) else name
        raise WeightsError(
            f"{name}: refused: loading it would run {error.wanted}, and a file that runs code can do anything. "
            f"If you trust its origin, keep only its tensors, in an environment that has that class, and use "
            f"tensors-only.pt:\n{_KEEP_TENSORS.format(name=local).rstrip()}"
        ) from None
    except Damaged as error:
        raise WeightsError(
            f"{name}: not a whole checkpoint ({size} bytes): {error}; it is damaged, cut off or of another kind: "
            f"delete it, then copy or download it again"
        ) from None
    if not isinstance(contents, Mapping):
        raise WeightsError(f"{name}: expected a mapping of names, got {type(contents).__name__}")
    return dict(contents)


@contextmanager
def open_weights(path: str | Path) -> Iterator[IO[bytes]]:
    """A file of weights opened for reading at any position.

    Raises `DataError` as `storage.read_bytes` does, also where reading fails in the block, as on a damaged disk.
    """
    if storage.is_remote(path):
        yield io.BytesIO(storage.read_bytes(path, storage.WEIGHTS_BYTES))
        return
    with storage.open_read(path, storage.WEIGHTS_BYTES) as file:
        try:
            yield file
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise storage.DataError(f"{os.fspath(path)}: cannot be read ({reason}); copy the file again") from error


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file of weights. Raises `WeightsError` where it cannot be read."""
    try:
        with open_weights(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except storage.DataError as error:
        raise WeightsError(str(error)) from error


def write_checkpoint(path: str | Path, contents: Mapping[str, Any]) -> str:
    """Saves `contents` with torch.save, here or in an object store; returns the path.

    `path` holds either its old contents or all of the new ones.
    """
    with _written_whole(path) as partial:
        torch.save(dict(contents), partial)
    return os.fspath(path)


def write_safetensors(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Saves tensors as safetensors, as `write_checkpoint` does; metadata as JSON, for `read_checkpoint`.

    A digest of it all is added to the metadata: the format has no checksums.
    """
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    texts[archive.DIGEST] = archive.digest_of(tensors, texts)
    with _written_whole(path) as partial:
        save_file(tensors, str(partial), metadata=texts)
    return os.fspath(path)


@contextmanager
def _written_whole(path: str | Path) -> Iterator[Path]:
    """A file of this machine to write to; when the block ends well it takes `path`'s place, or is uploaded there."""
    if not storage.is_remote(path):
        with replacing(Path(path)) as partial:
            yield partial
        return
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder, "file")
        yield partial
        storage.write_bytes_atomic(path, partial.read_bytes())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes `path`'s place when the block ends well, and goes if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".part")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        # mkstemp makes private files; a result is as readable as any other new file.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
