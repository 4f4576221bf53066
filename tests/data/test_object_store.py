"""A dataroot, its frame table and its superpixels in an object store serve as well as on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from slidr.cli import main
from slidr.cluster.superpixels import compute_map, folder_of, missing_maps
from slidr.config import DataConfig, SuperpixelConfig
from slidr.data import storage
from slidr.data.frames import FrameTable, write_frames
from slidr.data.nuscenes import read_frames
from slidr.data.samples import pair_sample
from slidr.data.storage import DataError
from slidr.models.files import WeightsError, read_checkpoint, write_checkpoint
from slidr.models.minkunet import MinkUNet14
from slidr.models.weights import load_student
from slidr.types import Frame


class Line:
    """A line to the S3 server that a test may cut: every connection, after so many bytes from the client."""

    def __init__(self, port: int) -> None:
        self.cut_after: int | None = None  # None: never; 0: at once
        self.cuts = 0
        self._server_port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._server_port))
                threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, upwards: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += len(data)
                if upwards and self.cut_after is not None and passed > self.cut_after:
                    self.cuts += 1
                    # Closed at once, with a reset: a silent end would be waited out.
                    source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    source.close()
                    break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def line(bucket: str) -> Iterator[Line]:
    (port,) = re.findall(r"endpoint_override=[\d.]+:(\d+)", bucket)
    made = Line(int(port))
    yield made
    made.close()


def through(line: Line, bucket: str) -> str:
    """The bucket by that line."""
    return re.sub(r"(endpoint_override=[\d.]+:)\d+", rf"\g<1>{line.port}", bucket)


def test_a_store_that_is_away_for_a_moment_is_waited_for(line: Line, bucket: str) -> None:
    path = storage.join(through(line, bucket), "away", "a.bin")
    line.cut_after = 0
    timer = threading.Timer(1.0, lambda: setattr(line, "cut_after", None))
    timer.start()
    storage.write_bytes_atomic(path, b"whole")
    timer.join()
    assert line.cuts >= 2
    assert storage.read_bytes(storage.join(bucket, "away", "a.bin")) == b"whole"


def test_an_upload_that_breaks_off_leaves_the_old_file(
    line: Line, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)  # pyarrow alone tries for some seconds
    folder = storage.join(bucket, "torn")
    storage.write_bytes_atomic(storage.join(folder, "a.bin"), b"old")
    line.cut_after = 1 << 20
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        storage.write_bytes_atomic(storage.join(through(line, folder), "a.bin"), b"x" * (12 << 20))  # two parts
    assert line.cuts >= 2
    assert storage.read_bytes(storage.join(folder, "a.bin")) == b"old"
    assert storage.list_names(folder) == {"a.bin"}


@pytest.fixture(scope="module")
def remote_root(tiny_world: Path, bucket: str) -> str:
    """The tiny world, uploaded."""
    root = storage.join(bucket, "nuscenes")
    for path in tiny_world.rglob("*"):
        if path.is_file():
            storage.write_bytes_atomic(storage.join(root, path.relative_to(tiny_world).as_posix()), path.read_bytes())
    return root


def test_frames_superpixels_and_samples_are_the_same_from_an_object_store(
    tiny_world: Path, world_frames: list[Frame], remote_root: str, bucket: str, tmp_path: Path
) -> None:
    frames = read_frames(remote_root)
    assert [f.token for f in frames] == [f.token for f in world_frames]
    table_path = storage.join(bucket, "frames.parquet")
    assert write_frames(frames, table_path) == write_frames(world_frames, str(tmp_path / "frames.parquet"))
    table = FrameTable.open(table_path).select("verify")
    local = DataConfig(root=str(tiny_world), image_size=(56, 104))
    remote = dataclasses.replace(local, root=remote_root)
    folders = {}
    for data, where in ((local, str(tmp_path / "maps")), (remote, storage.join(bucket, "maps"))):
        config = SuperpixelConfig(folder=where, segments=30, sigma=1.0)
        folders[data.root] = folder_of(config)
        images = table[:1].images()
        assert missing_maps(folder_of(config), images) == images
        for image in images:
            compute_map(image, data.root, folder_of(config), config)
        assert missing_maps(folder_of(config), images) == []
    one, other = (
        pair_sample(table[0], data, folders[data.root], student="minkunet34c", seed=0, epoch=0, training=True)
        for data in (local, remote)
    )
    for name, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, name))


def test_a_file_missing_from_an_object_store_is_named(remote_root: str, world_frames: list[Frame]) -> None:
    sweep = storage.join(remote_root, world_frames[0].lidar_path)
    data = storage.read_bytes(sweep)
    storage.delete(sweep)
    with pytest.raises(DataError, match=r"LIDAR_TOP/.*named by the tables but missing"):
        read_frames(remote_root)
    storage.write_bytes_atomic(sweep, data)


def test_a_checkpoint_in_an_object_store_is_read_and_named_like_one_here(bucket: str, tmp_path: Path) -> None:
    local, remote = tmp_path / "student.pt", storage.join(bucket, "student.pt")
    write_checkpoint(local, {"student": {"w": torch.arange(3.0)}})
    storage.write_bytes_atomic(remote, local.read_bytes())
    assert torch.equal(read_checkpoint(remote)["student"]["w"], read_checkpoint(local)["student"]["w"])
    storage.write_bytes_atomic(remote, local.read_bytes()[:100])
    with pytest.raises(WeightsError, match=r"s3://bucket/data/student\.pt.*not a whole checkpoint"):
        read_checkpoint(remote)
    with pytest.raises(WeightsError, match=r"s3://bucket/data/absent\.pt.*cannot be read"):
        read_checkpoint(storage.join(bucket, "absent.pt"))


@pytest.mark.parametrize(("form", "name"), [("slidr", "run-slidr.pt"), ("safetensors", "run.safetensors")])
def test_a_student_in_an_object_store_is_exported_beside_itself(bucket: str, form: str, name: str) -> None:
    source = MinkUNet14(1, 64, width=0.25)
    run = storage.join(bucket, "runs", "run.pt")
    write_checkpoint(run, {"student": source.state_dict(), "epoch": 1})
    assert main(["export", run, "--format", form]) == 0
    back = MinkUNet14(1, 64, width=0.25)
    load_student(back, storage.join(bucket, "runs", name))
    assert all(torch.equal(back.state_dict()[n], value) for n, value in source.state_dict().items())
