"""Who wrote a file: processes that end, numbers that come again, containers that share a host name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slidr.data import processes, storage
from slidr.data.processes import Mark, boot, has_ended, own_mark, parse_mark

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
_MARK = "from slidr.data.processes import own_mark; print(own_mark(), flush=True)"
# Writes a file and stops in the middle of it.
_WRITE = """
import os, sys, time
from slidr.data import storage
def stop(*arguments):
    print("writes", flush=True)
    time.sleep(600)
os.replace = stop
storage.write_bytes_atomic(sys.argv[1], b"half")
"""
_SWEEP = """
import sys
from slidr.data import storage
print(storage.sweep_temporary(sys.argv[1]), flush=True)
"""
# A process namespace and a host name of its own, as a container has; the same host name as outside.
_CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]


def python(script: str, *arguments: str, inside: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*(_CONTAINER if inside else []), sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_process_has_ended_once_it_has_and_not_before() -> None:
    process = python(f"{_MARK}; input()")
    assert process.stdout is not None
    assert process.stdin is not None
    mark = parse_mark(process.stdout.readline().strip())
    assert mark is not None
    assert mark.pid == process.pid
    assert has_ended(mark) is False
    process.stdin.close()
    process.stdout.read()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert has_ended(mark) is True, "its parent has not taken note of its end"
    process.wait()
    assert has_ended(mark) is True


def test_a_later_process_of_the_same_number_is_another_one() -> None:
    mine = own_mark()
    assert mine is not None
    assert has_ended(mine) is False
    assert has_ended(mine._replace(start=mine.start - 1)) is True


def test_of_another_container_nothing_is_concluded() -> None:
    mine = own_mark()
    assert mine is not None
    assert has_ended(mine._replace(place="0a1b2c3d4e5f", pid=999_999_999)) is None


def test_a_mark_comes_back_from_its_text_and_other_texts_are_none() -> None:
    mark = Mark("0a1b2c3d4e5f", 12, 345)
    assert parse_mark(str(mark)) == mark
    for text in ("", "unknown", "host-12", "my-host-name-12", "0a1b2c3d4e5f-12-x", "-12-345", "a-1-²"):
        assert parse_mark(text) is None, text


def test_a_proc_of_another_namespace_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "self").symlink_to("1")
    monkeypatch.setattr(processes, "_PROC", tmp_path)
    processes._place_of.cache_clear()
    try:
        assert own_mark() is None
    finally:
        processes._place_of.cache_clear()


def test_containers_that_share_a_host_name_do_not_sweep_each_others_files(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*_CONTAINER, "true"], capture_output=True).returncode != 0:
        pytest.skip("this machine allows no process namespaces")
    writers = [python(_WRITE, str(tmp_path / name), inside=name == "inside") for name in ("inside", "outside")]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writes\n"
        assert len(list(tmp_path.glob(".tmp-*"))) == 2
        # Each side sees one of the two writers' process numbers only.
        assert storage.sweep_temporary(tmp_path) == 0
        assert python(_SWEEP, str(tmp_path), inside=True).communicate(timeout=60)[0] == "0\n"
        marks = [parse_mark(file.name[5:].rpartition("-")[0]) for file in tmp_path.glob(".tmp-*")]
        assert {has_ended(mark) for mark in marks if mark is not None} == {None, False}
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    assert storage.sweep_temporary(tmp_path) == 1  # the one of whose end it can know
    assert python("from slidr.data.processes import boot; print(boot())", inside=True).communicate()[0] == f"{boot()}\n"
