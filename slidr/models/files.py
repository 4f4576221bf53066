"""Reading weights files that strangers wrote, and writing our own so that a reader never sees half a file."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slidr.data import storage

# What published checkpoints hold besides tensors and plain values; none of it can run code when loaded.
_scalar: Any = np.float64(0).__reduce__()[0]  # how numpy pickles its numbers; its module differs between numpy 1 and 2
_HARMLESS: list[Any] = [
    argparse.Namespace,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "float32", "float64")),
]


class WeightsError(ValueError):
    """Weights that cannot be had, read or used; the message names the file, what was found and what to do."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a PyTorch checkpoint or a .safetensors file on this machine or in an object store, on the CPU.

    A PyTorch file is opened with `weights_only=True`: no code in it can run. A .safetensors file comes back
    as {"state_dict": ..., **metadata}. Raises `WeightsError` for a file that is absent, cut off, or holds
    objects other than tensors and plain values; the message then names the first such object's class.
    """
    if storage.is_remote(path):
        return _read_remote(os.fspath(path))
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:  # torch's own message would advise to open the file unsafely
            raise _unreadable(path, "is no checkpoint of torch") from None
        raise WeightsError(
            f"{path}: refused: loading it would run {wanted[1]}, and a file that runs code can do anything. "
            f"If you trust its origin, keep only its tensors, in an environment that has that class:\n"
            f'    c = torch.load("{path.name}", weights_only=False)\n'
            f'    torch.save(c.get("state_dict", c), "tensors-only.pt")'
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise _unreadable(path, str(error).split("\n")[0] or type(error).__name__) from None
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{path}: expected a mapping of names, got {type(checkpoint).__name__}")
    return dict(checkpoint)


def _read_remote(uri: str) -> dict[str, Any]:
    """Reads a copy on this machine, which is gone afterwards; errors name the original."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, Path(uri.partition("?")[0]).name)
        try:
            copy.write_bytes(storage.read_bytes(uri, storage.WEIGHTS_BYTES))
            return read_checkpoint(copy)
        except storage.DataError as error:
            raise WeightsError(str(error)) from error
        except WeightsError as error:
            raise WeightsError(str(error).replace(str(copy), uri)) from None


def write_checkpoint(path: str | Path, contents: Mapping[str, Any]) -> str:
    """Saves `contents` with torch.save, here or in an object store; returns the path.

    `path` holds either its old contents or all of the new ones.
    """
    with _written_whole(path) as partial:
        torch.save(dict(contents), partial)
    return os.fspath(path)


def write_safetensors(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Saves tensors as safetensors, as `write_checkpoint` does; metadata as JSON, for `read_checkpoint`."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    with _written_whole(path) as partial:
        save_file(tensors, str(partial), metadata={key: json.dumps(value) for key, value in metadata.items()})
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


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = {key: _parsed(value) for key, value in (file.metadata() or {}).items()}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, str(error).split("\n")[0] or type(error).__name__) from None
    return {**metadata, "state_dict": state}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _unreadable(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        f"{path}: not a whole checkpoint ({path.stat().st_size} bytes): {reason}; it may be cut off or of "
        f"another kind: fetch it again"
    )
