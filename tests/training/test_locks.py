"""Locks: who is refused, who waits and for how long, and what ends them."""

from __future__ import annotations

import errno
import fcntl
import io
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from slidr.data.processes import boot
from slidr.training import locks
from slidr.training.locks import InUse, await_writer, held, launching, writing
from slidr.training.runs import RunError, RunFolder

_HOLD = """
import fcntl, os, sys, time
with open(sys.argv[1], "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print(sys.argv[2].format(os.getpid()), file=file, flush=True)
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def other_process(path: str, name: str = "process {} on elsewhere (launch-1)") -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock until it is killed, and says in the file that it is `name`."""
    Path(path).parent.mkdir(exist_ok=True)
    process = subprocess.Popen([sys.executable, "-c", _HOLD, path, name], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path / "mine"))


def test_a_second_launch_is_refused_at_once_with_what_where_who_and_what_to_do(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_sleep", lambda seconds: pytest.fail("it waits"))
    path = folder.file("lock")
    with other_process(path, f"process {{}} on {socket.gethostname()}\nboot {boot()}") as other:
        who = rf"the run mine is in use by process {other.pid} on {socket.gethostname()}"
        with (
            pytest.raises(InUse, match=rf"{path}: {who}; .*--run\.resume, or choose another --run\.name"),
            launching(folder),
        ):
            pass


@pytest.mark.parametrize(
    "name",
    [
        "process {} on elsewhere",
        f"process {{}} on {socket.gethostname()}\nboot 0a1b2c3d4e5f",  # a container elsewhere, of the same host name
        f"process {{}} on {socket.gethostname()}",  # an earlier version's
        "",
    ],
)
def test_a_launch_waits_for_a_holder_that_may_be_another_machines_since_that_may_be_gone(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    path = folder.file("lock")
    with other_process(path, name) as other:
        monkeypatch.setattr(locks, "_sleep", lambda seconds: kill(other))
        with launching(folder):
            pass
    holder = name.format(other.pid).partition("\n")[0] or "another process"
    assert caplog.messages == [f"the run mine is in use by {holder}: waiting at most 120 s for it to end"]
    monkeypatch.undo()
    monkeypatch.setattr(locks, "WAIT_S", 0.1)
    with other_process(path, name), pytest.raises(InUse, match="choose another"), launching(folder):
        pass


def test_a_lock_ends_with_its_block_and_with_a_killed_process(folder: RunFolder) -> None:
    with launching(folder), pytest.raises(InUse), launching(folder):
        pass
    with launching(folder):
        pass
    with other_process(folder.file("lock")) as other:
        kill(other)
        with launching(folder):
            assert Path(folder.file("lock")).read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_is_not_inherited_by_programs_that_its_holder_starts_and_that_outlive_it(folder: RunFolder) -> None:
    with launching(folder):
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
    try:
        with launching(folder):
            pass
    finally:
        child.kill()
        child.wait()


def test_a_killed_drivers_worker_is_waited_for_and_told_of_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    naps = 0

    def nap(seconds: float) -> None:
        nonlocal naps
        naps += 1
        if naps == 3:
            kill(other)

    with other_process(folder.file("lock.writer")) as other:
        monkeypatch.setattr(locks, "_sleep", nap)
        await_writer(folder)
    assert naps == 3
    (line,) = caplog.messages
    holder = f"process {other.pid} on elsewhere (launch-1)"
    assert line == f"the run mine is in use by {holder}: waiting at most 120 s for it to end"


def test_a_worker_that_never_ends_is_waited_for_no_longer_and_named(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "WAIT_S", 0.1)
    with other_process(folder.file("lock.writer")) as other:
        stop = rf"process {other.pid} on .*stop it, or, where its machine is gone for good, remove this file"
        with pytest.raises(InUse, match=stop):
            await_writer(folder)
        with pytest.raises(InUse, match=stop), writing(folder, "launch-2"):
            pass


def test_a_restarted_worker_is_not_refused_because_of_its_predecessor(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(locks, "WAIT_S", 0.1)
    with other_process(folder.file("lock.writer")) as other:
        with writing(folder, "launch-1"):
            pass
        waits, goes_on = caplog.messages
        assert "waiting at most 0.1 s" in waits
        holder = f"process {other.pid} on elsewhere (launch-1)"
        assert goes_on == f"{folder.path}: still locked by {holder}, which this launch has lost; going on"


def test_in_an_object_store_nothing_is_held_and_nothing_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    remote = RunFolder("s3://nowhere/runs/mine")
    with launching(remote), launching(remote), writing(remote, "one"), writing(remote, "two"):
        await_writer(remote)
    assert not list(tmp_path.iterdir())


def test_where_the_file_system_has_no_locks_the_block_runs_and_a_warning_says_so(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(number: int) -> None:
        def flock(*arguments: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    for number in (errno.ENOLCK, errno.EINVAL, errno.ENOTSUP, errno.EBADF):
        refuse(number)
        ran = False
        caplog.clear()
        with caplog.at_level(logging.WARNING), launching(folder):
            ran = True
        assert ran
        why = os.strerror(number)
        assert f"cannot be locked ({why}); take care that nothing else uses the run mine" in caplog.text
    refuse(errno.EIO)
    with pytest.raises(RunError, match=r"lock: cannot be locked \(Input/output error"), held(folder.file("lock"), "it"):
        pass


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_lock_that_another_client_of_smb_holds_is_in_use(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """There flock may say EACCES, and so does reading the holder's name."""

    class Unreadable(io.FileIO):
        def read(self, *arguments: object) -> bytes:
            raise OSError(errno.EACCES, "Permission denied")

    def flock(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("builtins.open", lambda file, mode="rb", **options: Unreadable(file, mode))
    with (
        pytest.raises(InUse, match="the run mine is in use by another process"),
        held(folder.file("lock"), "the run mine", 0),
    ):
        pass


def test_a_lock_file_of_another_user_is_held_too_though_it_may_not_be_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with other_process(folder.file("lock")) as other:
        theirs = Path(folder.file("lock")).read_text()
        real = os.open

        def refusing(path: str, flags: int, mode: int = 0o777) -> int:
            if flags & os.O_RDWR:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return real(path, flags, mode)

        monkeypatch.setattr(os, "open", refusing)
        with pytest.raises(InUse, match=f"process {other.pid} "), held(folder.file("lock"), "it", 0):
            pass
        kill(other)
        with launching(folder):
            assert Path(folder.file("lock")).read_text() == theirs
            with pytest.raises(InUse), held(folder.file("lock"), "it", 0):
                pass
    assert not caplog.messages


def test_everybody_may_lock_a_file_where_the_umask_allows_it(folder: RunFolder) -> None:
    before = os.umask(0o002)
    try:
        with launching(folder):
            assert Path(folder.file("lock")).stat().st_mode & 0o777 == 0o664
    finally:
        os.umask(before)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reason = rf"{tmp_path}/file/runs: cannot be made \(Not a directory\)"
    with pytest.raises(RunError, match=reason), held(str(tmp_path / "file" / "runs" / "lock"), "it"):
        pass


def test_a_holders_name_is_on_the_servers_disk_before_its_block_runs(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.pread(descriptor, 99, 0).decode()))
    with launching(folder):
        assert synced == [f"process {os.getpid()} on {socket.gethostname()}\nboot {boot()}"]


def test_a_lock_file_that_is_removed_as_it_is_locked_is_not_taken_for_the_lock(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, removed = fcntl.flock, 0

    def flock(file: io.FileIO, operation: int) -> None:
        nonlocal removed
        if removed < 3:
            os.remove(folder.file("lock"))
            removed += 1
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with launching(folder), pytest.raises(InUse), held(folder.file("lock"), "it", 0):
        pass
    assert removed == 3


def test_who_waits_takes_the_new_file_where_the_old_one_is_removed(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder.file("lock.writer")
    with other_process(path):
        monkeypatch.setattr(locks, "_sleep", lambda seconds: os.remove(path))
        with writing(folder, "launch-2"):
            assert Path(path).read_text().startswith(f"process {os.getpid()} on ")
            with pytest.raises(InUse, match=f"process {os.getpid()} on "), held(path, "it", 0):
                pass


def test_where_files_have_no_lasting_numbers_a_lock_is_taken_all_the_same(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda one, other: False)
    with launching(folder):
        pass
