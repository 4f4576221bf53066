"""Files, wherever they are: paths on this machine (or NFS) and URIs that pyarrow understands
(s3://bucket/key).

An S3 endpoint other than Amazon's is named by the environment's AWS_ENDPOINT_URL or in the URI itself:
``s3://bucket/folder?endpoint_override=127.0.0.1:9000&scheme=http``. Remote calls are tried again after a
pause.
"""

from __future__ import annotations

import errno
import os
import posixpath
import random
import stat
import time
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from slidr.config.paths import from_file_uri
from slidr.data.processes import has_ended, own_mark, parse_mark
from slidr.urls import RedactedError, redact_url

if TYPE_CHECKING:  # loaded for object stores only: paths on this machine need no pyarrow
    from pyarrow import fs

T = TypeVar("T")

# The largest file of each kind that is read: far above any real one, and small enough not to fill memory.
RECORD_BYTES = 64 * 2**20  # a JSON or YAML record, a note, a calibration
SENSOR_BYTES = 256 * 2**20  # an image, a sweep, its labels, a superpixel map
TABLE_BYTES = 4 * 2**30  # a table of nuScenes (sample_data.json of trainval: about 1.2 GB), a frame table, a journal
WEIGHTS_BYTES = 8 * 2**30  # a checkpoint or weights

ATTEMPTS = 5  # of a remote call
PAUSE_S = 0.2  # before the second attempt; it doubles from one to the next
_TEMPORARY = ".tmp-"
_STALE_S = 600.0  # a temporary file that is older than this has no writer any more


class DataError(RedactedError, ValueError):
    """Data that cannot be used: missing, damaged, or not what the tables say. The message names the file."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URI of another file system (s3://...)."""
    return "://" in os.fspath(path) and not os.fspath(path).startswith("file://")


def join(root: str | os.PathLike[str], *parts: str) -> str:
    """`root` and then `parts`, with the root's query string, if it has one, kept at the end."""
    base = os.fspath(root)
    if not is_remote(base):
        return os.path.join(from_file_uri(base) if base.startswith("file://") else base, *parts)
    base, mark, query = base.partition("?")
    return posixpath.join(base, *parts) + mark + query


def split(path: str | os.PathLike[str]) -> tuple[str, str]:
    """A file's folder, with the query string if there is one, and its name: `join` puts them together again."""
    if not is_remote(path):
        return os.path.split(join(path))
    base, mark, query = os.fspath(path).partition("?")
    folder, name = posixpath.split(base)
    return folder + mark + query, name


def sibling(path: str | os.PathLike[str], ending: str) -> str:
    """The path of the file beside `path` whose name has `ending` added."""
    base, mark, query = os.fspath(path).partition("?") if is_remote(path) else (join(path), "", "")
    return base + ending + mark + query


def name_of(path: str | os.PathLike[str]) -> str:
    """The last part of a path, without the query of a URI."""
    return posixpath.basename(_key(path)) if is_remote(path) else os.path.basename(join(path))


def safe_join(root: str | os.PathLike[str], relative: str) -> str:
    """The path of a file that lies inside `root`.

    Raises `DataError` for what leads out of it: an absolute path, "..", or (on this machine) a symbolic link
    that ends elsewhere. The root itself may be a link.
    """
    parts = relative.replace("\\", "/").split("/")
    if not relative or os.path.isabs(relative) or parts[0] == "" or ".." in parts or "://" in relative:
        raise DataError(f"{relative!r}: leaves the data root {os.fspath(root)}; expected a relative path without '..'")
    path = join(root, relative)
    if not is_remote(root):
        inside = os.path.realpath(join(root))
        target = os.path.realpath(path)
        if os.path.commonpath([inside, target]) != inside:
            raise DataError(
                f"{path}: is a link to {target}, outside the data root {inside}; "
                "move the file into the data root or mount its folder there"
            )
    return path


def read_bytes(path: str | os.PathLike[str], limit: int = SENSOR_BYTES) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises `DataError` where there is none, it cannot be read, it is larger, or it is not a regular file (reading a
    FIFO or a device could wait forever).
    """

    def read() -> bytes:
        if is_remote(path):
            with _filesystem(path).open_input_file(_key(path)) as file:
                _require_size(path, file.size(), limit)
                return file.read()
        with _open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            _require_size(path, size, limit)
            data = file.read(size + 1)  # read(limit) would reserve that much memory at once
            while len(data) > size:  # it has grown, or hides its size as /proc does
                _require_size(path, len(data), limit)
                size = len(data)
                data += file.read(2**20)
            return data

    return _reading(path, read)


def open_read(path: str | os.PathLike[str], limit: int = TABLE_BYTES) -> IO[bytes]:
    """A file opened for reading at any position. Raises `DataError` as `read_bytes` does."""

    def opened() -> IO[bytes]:
        file: Any = _filesystem(path).open_input_file(_key(path)) if is_remote(path) else _open_regular(path)
        try:
            _require_size(path, file.size() if is_remote(path) else os.fstat(file.fileno()).st_size, limit)
        except DataError:
            file.close()
            raise
        return file

    return _reading(path, opened)


def require_regular(path: str | os.PathLike[str], limit: int) -> None:
    """Raises `DataError` unless `path` is a regular file of this machine that holds at most `limit` bytes.

    For libraries that open a file by its name.
    """
    open_read(path, limit).close()


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that others see whole or not at all; its folders are made.

    On this machine through a temporary file beside it and a rename, in an object store by one upload. Raises
    `OSError` (a full disk, a forbidden folder); no temporary file stays behind.
    """
    if is_remote(path):
        filesystem, key = _filesystem(path), _key(path)

        def put() -> None:
            with filesystem.open_output_stream(key) as stream:
                stream.write(data)

        _retrying(put)
        return
    target = Path(join(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / temporary_name()
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with nothing in it
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_name() -> str:
    """A new name for a file that is written and then renamed; `sweep_temporary` deletes it once its writer is gone."""
    return f"{_TEMPORARY}{own_mark() or 'unknown'}-{uuid.uuid4().hex[:8]}"


def sweep_temporary(folder: str | os.PathLike[str]) -> int:
    """Deletes what writers that were killed left in a folder; returns how many files that were.

    A writer of this machine and process namespace is known to be gone by its mark (`slidr.data.processes`). Any other
    one, as of another container, and one of an earlier version, is taken for gone once its file is old.
    """
    if is_remote(folder):
        return 0  # an upload that does not finish leaves no file (docs/cluster.md: what it may leave)
    swept = 0
    for file in Path(join(folder)).glob(f"{_TEMPORARY}*"):
        writer = parse_mark(file.name.removeprefix(_TEMPORARY).rpartition("-")[0])
        try:
            gone = writer is not None and has_ended(writer)
            if gone or time.time() - file.stat().st_mtime > _STALE_S:
                file.unlink()
                swept += 1
        except FileNotFoundError:
            continue  # its writer was quicker
    return swept


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file, a folder or a link of that name.

    A broken link counts: reading it is an error, and no caller takes it for a file that was never written.
    """
    if not is_remote(path):
        return os.path.lexists(join(path))
    from pyarrow import fs

    return _retrying(lambda: _filesystem(path).get_file_info(_key(path)).type != fs.FileType.NotFound)


def modified(path: str | os.PathLike[str]) -> float:
    """When a file was last written, in seconds since 1970, by the clock of the storage. Raises `OSError`."""
    if not is_remote(path):
        return os.stat(join(path)).st_mtime
    info = _retrying(lambda: _filesystem(path).get_file_info(_key(path)))
    if info.mtime_ns is None:
        raise FileNotFoundError(errno.ENOENT, "no such file", os.fspath(path))
    return info.mtime_ns / 1e9


def list_names(folder: str | os.PathLike[str]) -> set[str]:
    """The names right inside a folder, of files and folders; none where there is no such folder."""
    if not is_remote(folder):
        try:
            return set(os.listdir(join(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return set()
    from pyarrow import fs

    selector = fs.FileSelector(_key(folder), allow_not_found=True)
    return {info.base_name for info in _retrying(lambda: _filesystem(folder).get_file_info(selector))}


def delete(path: str | os.PathLike[str]) -> None:
    """Deletes a file; nothing happens where there is none."""
    if not is_remote(path):
        Path(join(path)).unlink(missing_ok=True)
    elif exists(path):
        _retrying(lambda: _filesystem(path).delete_file(_key(path)))


def filesystem(path: str | os.PathLike[str]) -> tuple[fs.FileSystem | None, str]:
    """pyarrow's file system of a URI and the path inside it; for a path of this machine, None and itself."""
    return (_filesystem(path), _key(path)) if is_remote(path) else (None, join(path))


def _reading(path: str | os.PathLike[str], read: Callable[[], T]) -> T:
    try:
        return _retrying(read) if is_remote(path) else read()
    except DataError:
        raise
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: a NUL in a path; or pyarrow's, for a URI
        if getattr(error, "errno", None) == errno.EMFILE:
            raise  # this process's own fault, not the file's
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(
            f"{redact_url(os.fspath(path))}: cannot be read ({redact_url(reason)}); check the path "
            "(of data: data.root, too)"
        ) from error


def _open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(join(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            raise DataError(f"{os.fspath(path)}: is {_KINDS.get(stat.S_IFMT(mode), 'not a file')}; expected a file")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _require_size(path: str | os.PathLike[str], size: int, limit: int) -> None:
    if size > limit:
        raise DataError(
            f"{redact_url(os.fspath(path))}: holds {size} bytes, more than the {limit} that such a file may have; is "
            "it the right file?"
        )


_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def _retrying(call: Callable[[], T]) -> T:
    """The call's result; after a passing failure of the store it is made again, `ATTEMPTS` times in all."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
    raise AssertionError("unreachable")


@lru_cache(maxsize=32)
def _filesystem_of(base: str) -> fs.FileSystem:
    import pyarrow as pa
    from pyarrow import fs

    try:
        return fs.FileSystem.from_uri(base)[0]
    except pa.ArrowInvalid:
        scheme = base.partition("://")[0]
        raise DataError(
            f"{redact_url(base)}: {scheme}:// is not a storage that can be read here; use s3:// or a path"
        ) from None


def _filesystem(path: str | os.PathLike[str]) -> Any:
    scheme, _, rest = os.fspath(path).partition("://")
    location, mark, query = rest.partition("?")
    if scheme == "s3" and not location.split("/")[0]:
        raise DataError(f"{redact_url(os.fspath(path))}: names no bucket; expected s3://BUCKET/PATH")
    return _filesystem_of(f"{scheme}://{location.split('/')[0]}{mark}{query}")


def _key(path: str | os.PathLike[str]) -> str:
    """The path inside its file system: bucket/key."""
    host, slash, rest = os.fspath(path).partition("://")[2].partition("?")[0].partition("/")
    return f"{host.rpartition('@')[2]}{slash}{rest}".rstrip("/")  # without the user and password of the URI
