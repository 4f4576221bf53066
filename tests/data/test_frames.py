"""The frame table gives back what was written, whole or in part, and opens quickly."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from slidr.data.frames import FrameTable, ImageRef, read_frames, write_frames
from slidr.data.storage import DataError
from slidr.types import CAMERA_CHANNELS, Camera, Frame

MakeFrames = Callable[..., list[Frame]]


def assert_same(one: Frame | Camera, other: Frame | Camera) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if isinstance(a, np.ndarray):
            assert b.dtype == np.float64
            np.testing.assert_array_equal(a, b)
        elif field.name == "cameras":
            assert len(a) == len(b)
            for camera, twin in zip(a, b, strict=True):
                assert_same(camera, twin)
        else:
            assert a == b
            assert type(a) is type(b)


@pytest.fixture(scope="module")
def frames(make_frames: MakeFrames) -> list[Frame]:
    return make_frames(250)


@pytest.fixture(scope="module")
def path(frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("frames") / "frames.parquet")
    write_frames(frames, path)
    return path


def test_frames_come_back_as_they_were_in_any_order(frames: list[Frame], path: str) -> None:
    table = FrameTable.open(path)
    assert len(table) == len(frames) == 750
    for i in (0, 749, 255, 256, 1, 512, -1):
        assert_same(table[i], frames[i])
    with pytest.raises(IndexError):
        table[750]


def test_frames_without_cameras_or_with_some_come_back(
    make_frames: MakeFrames, without_cameras: list[Frame], tmp_path: Path
) -> None:
    mixed = [*without_cameras, *make_frames(3, cameras=2)[6:], *make_frames(4, cameras=6)[9:]]
    write_frames(mixed, str(tmp_path / "f.parquet"))
    for one, other in zip(mixed, read_frames(str(tmp_path / "f.parquet")), strict=True):
        assert_same(one, other)


def test_an_empty_table_is_empty(tmp_path: Path) -> None:
    write_frames([], str(tmp_path / "f.parquet"))
    table = FrameTable.open(tmp_path / "f.parquet")
    assert (len(table), table.tokens, table.scenes, table.images()) == (0, [], [], [])
    with pytest.raises(DataError, match="no frame is in split train; the table has no frames at all"):
        table.select("train")


@pytest.mark.parametrize(("fraction", "step"), [(1.0, 1), (0.25, 4), (0.1, 10), (0.05, 20), (0.01, 100), (0.33, 3)])
def test_a_fraction_takes_every_kth_scene_of_the_split(
    frames: list[Frame], path: str, fraction: float, step: int
) -> None:
    scenes: list[str] = []
    for frame in frames:
        if "train" in frame.splits and frame.scene not in scenes:
            scenes.append(frame.scene)
    chosen = [scene for number, scene in enumerate(scenes, start=1) if number % step == 0]
    expected = [f.token for f in frames if f.scene in chosen]
    if not chosen:
        with pytest.raises(DataError, match=rf"takes every {step}th scene, and split train has {len(scenes)}"):
            FrameTable.open(path).select("train", fraction)
        return
    assert FrameTable.open(path).select("train", fraction).tokens == expected


def test_a_fraction_of_semantic_kitti_takes_every_kth_scan_in_order_of_name(
    without_cameras: list[Frame], tmp_path: Path
) -> None:
    backwards = without_cameras[::-1]
    write_frames(backwards, str(tmp_path / "f.parquet"), dataset="semantic_kitti")
    table = FrameTable.open(tmp_path / "f.parquet")
    names = sorted(frame.token for frame in backwards)
    assert set(table.select("train", 0.5).tokens) == set(names[::2])
    assert table.dataset == "semantic_kitti"


def test_several_splits_are_joined_and_all_is_everything(frames: list[Frame], path: str) -> None:
    table = FrameTable.open(path)
    assert table.select(("val", "train")).tokens == [f.token for f in frames]
    assert table.select("all").tokens == [f.token for f in frames]
    assert table.select("val").scenes == list(dict.fromkeys(f.scene for f in frames if "val" in f.splits))


def test_a_split_that_the_table_lacks_is_refused_with_those_it_has(path: str) -> None:
    with pytest.raises(DataError, match=r"split verify; the table has train \(600 frames\), parametrize \(600"):
        FrameTable.open(path).select("verify")


def test_frames_of_scenes_in_no_official_split_are_counted_named_and_taken_by_all(
    frames: list[Frame], tmp_path: Path
) -> None:
    own = [replace(frame, scene=f"fleet-{number // 4}", splits=()) for number, frame in enumerate(frames[:8])]
    write_frames(own, str(tmp_path / "own.parquet"))
    table = FrameTable.open(str(tmp_path / "own.parquet"))
    with pytest.raises(
        DataError,
        match=r"the table has 8 frames of scenes that are in no official split \(fleet-0, fleet-1\); .* or all for",
    ):
        table.select("train")
    assert table.select("all").tokens == [frame.token for frame in own]
    write_frames([*own, *(frame for frame in frames[8:] if "val" in frame.splits)], str(tmp_path / "both.parquet"))
    with pytest.raises(DataError, match=r"val \(\d+ frames\), 8 frames of scenes that are in no official split"):
        FrameTable.open(str(tmp_path / "both.parquet")).select("mini_train")


def test_a_part_of_a_table_survives_pickling_and_parts_of_parts_add_up(frames: list[Frame], path: str) -> None:
    part = FrameTable.open(path).select("val").take(np.array([5, 2]))
    twin = pickle.loads(pickle.dumps(part))
    val = [f for f in frames if "val" in f.splits]
    assert twin.tokens == [val[5].token, val[2].token]
    assert_same(twin[1], val[2])
    assert [f.token for f in twin[1:]] == [val[2].token]


def test_images_are_those_of_the_frames_cameras(frames: list[Frame], path: str) -> None:
    channels = CAMERA_CHANNELS[1:3]
    part = FrameTable.open(path).take(np.array([700, 3]))
    expected = [
        ImageRef(camera.token, camera.image_path, 1600, 900)
        for frame in (frames[700], frames[3])
        for camera in frame.cameras
        if camera.channel in channels
    ]
    assert part.images(channels) == expected
    assert len(part.images()) == 12


def test_equal_frames_have_equal_fingerprints_and_a_moved_camera_another(
    make_frames: MakeFrames, tmp_path: Path
) -> None:
    one = make_frames(2)
    moved = dataclasses.replace(one[0].cameras[0], intrinsics=one[0].cameras[0].intrinsics + 1e-9)
    other = [dataclasses.replace(one[0], cameras=(moved, *one[0].cameras[1:])), *one[1:]]
    prints = [write_frames(frames, str(tmp_path / "f.parquet")) for frames in (one, one, other)]
    assert prints[0] == prints[1] != prints[2]
    assert FrameTable.open(tmp_path / "f.parquet").fingerprint == prints[2]


def test_what_is_no_frame_table_is_refused_by_name(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet: there is no frame table"):
        FrameTable.open(tmp_path / "gone.parquet")
    cut = tmp_path / "cut.parquet"
    cut.write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.parquet: is not a readable frame table"):
        FrameTable.open(cut)
    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pq.read_table(path, columns=["token"]).replace_schema_metadata(None), foreign)
    with pytest.raises(DataError, match=r"expected a frame table of layout 1, got none"):
        FrameTable.open(foreign)


def test_opening_and_splitting_do_not_decode_the_frames(path: str) -> None:
    table = FrameTable.open(path)
    began = time.process_time()
    for _ in range(10):
        FrameTable.open(path).select("train", 0.1)
    light = time.process_time() - began
    began = time.process_time()
    for _ in range(10):
        list(FrameTable.open(path))
    assert light < time.process_time() - began
    assert not table._groups
