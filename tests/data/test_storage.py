"""Files on this machine and in an object store behave alike; nothing half-written is ever seen."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from slidr.data import storage
from slidr.data.processes import own_mark
from slidr.data.storage import DataError


def _check_store(root: str) -> None:
    """What every store must do."""
    path = storage.join(root, "maps", "a.png")
    assert not storage.exists(path)
    assert storage.list_names(storage.join(root, "maps")) == set()
    storage.write_bytes_atomic(path, b"first")
    storage.write_bytes_atomic(path, b"second one")
    assert storage.exists(path)
    assert storage.read_bytes(path) == b"second one"
    with storage.open_read(path) as file:
        file.seek(7)
        assert file.read(3) == b"one"
    assert abs(storage.modified(path) - time.time()) < 60
    assert storage.list_names(storage.join(root, "maps")) == {"a.png"}
    assert "maps" in storage.list_names(root)
    storage.delete(path)
    storage.delete(path)
    assert not storage.exists(path)
    with pytest.raises(FileNotFoundError):
        storage.modified(path)
    with pytest.raises(DataError, match=r"a\.png.*: cannot be read"):
        storage.read_bytes(path)


def test_a_local_folder_is_a_store(tmp_path: Path) -> None:
    _check_store(str(tmp_path))


def test_an_s3_bucket_is_a_store(bucket: str) -> None:
    _check_store(storage.join(bucket, "store"))


def test_a_file_uri_is_a_local_path(tmp_path: Path) -> None:
    storage.write_bytes_atomic(f"file://{tmp_path}/x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    storage.write_bytes_atomic(path, b"old")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_sweeping_takes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine, host = own_mark(), socket.gethostname()
    assert mine is not None
    swept = {
        f"{mine._replace(pid=gone.pid)}-0a1b2c3d": None,
        f"{mine._replace(start=mine.start - 1)}-0a1b2c3d": None,  # its process number has been given again
        f"{mine._replace(place='0a1b2c3d4e5f', pid=gone.pid)}-0a1b2c3e": 0.0,  # of another container, and old
        f"{host}-{gone.pid}-0a1b2c3d": 0.0,  # an earlier version's, and old
        "another-machine-2-0a1b2c3d": 0.0,
        "unknown-0a1b2c3d": 0.0,
    }
    kept = {
        f"{mine}-0a1b2c3d": None,
        f"{mine._replace(place='0a1b2c3d4e5f', pid=gone.pid)}-0a1b2c3d": None,  # runs, it may be, in another container
        f"{host}-{gone.pid}-0a1b2c3e": None,  # the same of an earlier version, whose files name no more than the host
        "another-machine-1-0a1b2c3d": None,
        "unknown-0a1b2c3e": None,
    }
    for name, when in {**swept, **kept}.items():
        (tmp_path / f".tmp-{name}").write_bytes(b"")
        if when is not None:
            os.utime(tmp_path / f".tmp-{name}", (when, when))
    (tmp_path / "map.png").write_bytes(b"")
    assert storage.sweep_temporary(tmp_path) == len(swept)
    assert {file.name for file in tmp_path.iterdir()} == {"map.png", *(f".tmp-{name}" for name in kept)}


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a\\..\\x", "", "s3://other/x"])
def test_a_path_that_leads_out_of_the_root_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match="leaves the data root"):
        storage.safe_join(tmp_path, path)


def test_a_link_that_leads_out_of_the_root_is_refused_and_one_inside_is_not(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (root / "out").symlink_to(tmp_path / "secret")
    (root / "in").symlink_to(root / "real")
    (tmp_path / "link-to-root").symlink_to(root)
    with pytest.raises(DataError, match="outside the data root"):
        storage.safe_join(root, "out/file")
    assert storage.safe_join(root, "in/file") == str(root / "in/file")
    assert storage.safe_join(tmp_path / "link-to-root", "real/file").endswith("link-to-root/real/file")


def test_a_remote_path_keeps_its_query_at_the_end() -> None:
    assert storage.join("s3://b/root?scheme=http", "a", "b") == "s3://b/root/a/b?scheme=http"
    assert storage.safe_join("s3://b/root", "a/b") == "s3://b/root/a/b"
    assert storage.name_of("s3://b/root/a.md?scheme=http") == storage.name_of("/root/a.md") == "a.md"


class _Flaky:
    """A file system whose first calls fail."""

    def __init__(self, errors: list[OSError]) -> None:
        self.errors = errors
        self.calls = 0

    def get_file_info(self, key: str) -> pyarrow.fs.FileInfo:
        self.calls += 1
        if self.errors:
            raise self.errors.pop()
        return pyarrow.fs.FileInfo(key, type=pyarrow.fs.FileType.File)


def test_a_passing_failure_of_a_store_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    flaky = _Flaky([OSError("slow down"), OSError("timeout")])
    monkeypatch.setattr(storage, "_filesystem", lambda path: flaky)
    assert storage.exists("s3://bucket/x")
    assert flaky.calls == 3
    assert len(pauses) == 2
    assert pauses[1] > pauses[0] / 1.5


def test_a_lasting_failure_of_a_store_is_raised_and_a_missing_file_is_not_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    lasting = _Flaky([OSError("down")] * 99)
    monkeypatch.setattr(storage, "_filesystem", lambda path: lasting)
    with pytest.raises(OSError, match="down"):
        storage.exists("s3://bucket/x")
    assert lasting.calls == storage.ATTEMPTS
    missing = _Flaky([FileNotFoundError("no")])
    monkeypatch.setattr(storage, "_filesystem", lambda path: missing)
    with pytest.raises(FileNotFoundError):
        storage.exists("s3://bucket/x")
    assert missing.calls == 1


@pytest.mark.parametrize("read", [storage.read_bytes, storage.open_read])
def test_only_regular_files_are_read_and_a_fifo_is_refused_at_once(tmp_path: Path, read: Callable[[str], Any]) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, what in ((tmp_path / "fifo", "a FIFO"), (tmp_path, "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(DataError, match=rf"^{path}: is {what}; expected a file$"):
            read(str(path))


@pytest.mark.parametrize("read", [storage.read_bytes, storage.open_read])
def test_a_file_above_its_limit_is_refused_before_it_is_read(tmp_path: Path, read: Callable[[str], Any]) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(DataError, match=rf"^{path}: holds {10 * 2**30} bytes, more than the "):
        read(str(path))


def test_a_limit_holds_in_an_object_store_too(bucket: str) -> None:
    path = storage.join(bucket, "limited")
    storage.write_bytes_atomic(path, bytes(100))
    assert len(storage.read_bytes(path, 100)) == 100
    for read in (storage.read_bytes, storage.open_read):
        with pytest.raises(DataError, match=r"^s3://bucket/data/limited: holds 100 bytes, more than the 99"):
            read(path, 99)


def test_reading_a_small_file_needs_no_more_memory_than_it_holds_whatever_its_limit(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"content")
    code = (
        "import resource, sys; from slidr.data import storage\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9,) * 2)\n"
        "sys.stdout.buffer.write(storage.read_bytes(sys.argv[1], storage.WEIGHTS_BYTES))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "small")], capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"content"), done.stderr.decode()


def test_a_file_that_hides_its_size_is_read_whole_up_to_its_limit() -> None:
    assert storage.read_bytes("/proc/self/status").startswith(b"Name:")
    with pytest.raises(DataError, match=r"more than the 10 that"):
        storage.read_bytes("/proc/self/status", 10)


@pytest.mark.parametrize("path", ["a\0b", "s3:///key", "s3://"])
def test_a_path_that_cannot_be_one_is_refused_by_name(path: str) -> None:
    for read in (storage.read_bytes, storage.open_read):
        with pytest.raises(DataError, match=r"^(a\0b: cannot be read|s3://(/key)?: names no bucket)"):
            read(path)


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_broken_link_exists_and_cannot_be_read(tmp_path: Path, target: str) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    assert storage.exists(link)
    with pytest.raises(DataError, match=r"link: cannot be read"):
        storage.read_bytes(link)
