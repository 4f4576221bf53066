"""A damaged frame table is an error or gives the frames that were written; tables of earlier versions still open."""

from __future__ import annotations

import dataclasses
import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slidr.data.frames import FrameTable, open_table, read_frames, write_frames
from slidr.data.storage import DataError
from slidr.types import Camera, Frame

MakeFrames = Callable[..., list[Frame]]
KEYS = ("layout", "dataset", "fingerprint")  # all the metadata that earlier versions wrote


def _content(frames: list[Frame]) -> list[bytes]:
    return [pickle.dumps(dataclasses.astuple(frame)) for frame in frames]


def _plain_frames() -> list[Frame]:
    """Frames whose fingerprint was recorded with the first version."""
    frames = []
    for i in range(5):
        pose = np.eye(4)
        pose[0, 3] = i
        intrinsics = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])
        cameras = tuple(
            Camera(
                *(name, f"{name}-{i}", f"samples/{name}/{i}.jpg", 640, 480, 10 * i),
                *(intrinsics, np.eye(4), pose, np.eye(4)),
            )
            for name in ("CAM_FRONT", "CAM_BACK")
        )
        label = f"lidarseg/{i}.bin" if i % 2 else None
        before, after = None if i % 2 == 0 else f"frame-{i - 1}", f"frame-{i + 1}" if i in (0, 2) else None
        splits = ("train", "parametrize") if i < 4 else ("val",)
        lidar = (f"lidar-{i}", f"samples/LIDAR_TOP/{i}.bin")
        frames.append(
            Frame(
                f"frame-{i}", f"scene-{i // 2}", 10 * i, *lidar, label, np.eye(4), pose, cameras, before, after, splits
            )
        )
    return frames


RECORDED = "3fbcc1d5a1203dbaad0eb7168eabdf58150ad46b0fbb44021e74e3f67d887b0e"


def _as_before(path: Path, out: Path, change: Callable[[pa.Table], pa.Table] = lambda table: table) -> Path:
    """The table as earlier versions wrote it: without checksums and digests; its rows changed."""
    table = pq.ParquetFile(path)
    metadata = {f"slidr.{key}".encode(): table.metadata.metadata[f"slidr.{key}".encode()] for key in KEYS}
    rows = change(table.read())
    with pq.ParquetWriter(out, rows.schema.remove_metadata(), compression="zstd") as writer:
        writer.write_table(rows, row_group_size=256)
        writer.add_key_value_metadata(metadata)
    return out


def _set_metadata(path: Path, **changes: str | None) -> None:
    """Writes the file again with other metadata."""
    table = pq.ParquetFile(path)
    metadata = {**table.metadata.metadata}
    for key, value in changes.items():
        metadata.pop(f"slidr.{key}".encode(), None)
        if value is not None:
            metadata[f"slidr.{key}".encode()] = value.encode()
    rows = table.read()
    with pq.ParquetWriter(path, rows.schema.remove_metadata(), compression="zstd") as writer:
        writer.write_table(rows, row_group_size=256)
        writer.add_key_value_metadata(metadata)


@pytest.fixture(scope="module")
def path(make_frames: MakeFrames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two row groups."""
    path = tmp_path_factory.mktemp("frames") / "frames.parquet"
    write_frames(make_frames(90), str(path))
    return path


def test_fingerprints_are_those_that_runs_recorded(tmp_path: Path) -> None:
    assert write_frames(_plain_frames(), str(tmp_path / "f.parquet")) == RECORDED


@pytest.mark.parametrize(("part", "count", "most"), [("anywhere", 200, 190), ("metadata", 100, 60)])
def test_300_damaged_tables_are_refused_or_give_the_same_frames(
    path: Path, tmp_path: Path, part: str, count: int, most: int
) -> None:
    rng = random.Random(part)
    whole, damaged = path.read_bytes(), tmp_path / "damaged.parquet"
    expected = _content(read_frames(str(path)))
    first = 0 if part == "anywhere" else len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for number in range(count):
        data = bytearray(whole)
        if number % 3:
            data[rng.randrange(first, len(data))] ^= 1 << rng.randrange(8)
        else:
            place = rng.randrange(first, len(data) - 64)
            data[place : place + 64] = rng.randbytes(64)
        damaged.write_bytes(data)
        try:
            assert _content(read_frames(str(damaged))) == expected
        except DataError as error:
            assert str(damaged) in str(error)  # noqa: PT017
            refused += 1
    assert refused > most


def test_values_changed_behind_the_checksums_are_refused(path: Path, tmp_path: Path) -> None:
    for name, values in {
        "timestamp": pa.array(range(270), pa.int64()),
        "scene": pa.array([f"other-{i // 3}" for i in range(270)]),
        "previous": pa.array(["x"] * 270),
        "splits": pa.array([["val"]] * 270),
    }.items():
        other = tmp_path / f"{name}.parquet"
        table = pq.ParquetFile(path)
        rows = table.read()
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
        with pq.ParquetWriter(other, rows.schema.remove_metadata()) as writer:
            writer.write_table(rows, row_group_size=256)
            writer.add_key_value_metadata(table.metadata.metadata)
        with pytest.raises(
            DataError, match=rf"{name}\.parquet: is not a readable frame table \(column {name} of frames"
        ):
            read_frames(str(other))
        with pytest.raises(DataError, match=rf"column {name} of frames"):
            FrameTable.open(other).verify()


def test_tables_of_earlier_versions_open_and_give_their_frames(path: Path, tmp_path: Path) -> None:
    old = _as_before(path, tmp_path / "old.parquet")
    assert not pq.ParquetFile(old).metadata.metadata.keys() & {b"slidr.digest", b"slidr.columns"}
    assert _content(read_frames(str(old))) == _content(read_frames(str(path)))
    table = FrameTable.open(old)
    table.verify()
    assert (table.fingerprint, table.allow_missing) == (FrameTable.open(path).fingerprint, None)


def test_an_earlier_table_whose_rows_do_not_have_its_fingerprint_is_refused(path: Path, tmp_path: Path) -> None:
    def moved(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[7]["cameras"][2]["intrinsics"][0] *= 2
        return pa.Table.from_pylist(rows, schema=table.schema)

    old = _as_before(path, tmp_path / "old.parquet", moved)
    with pytest.raises(DataError, match=r"old\.parquet: .*its rows do not have the fingerprint"):
        FrameTable.open(old)


def test_the_rules_for_frames_hold_for_tables_of_others(path: Path, tmp_path: Path) -> None:
    def mirrored(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[7]["ego_from_lidar"] = np.diag([1.0, -1, 1, 1]).ravel().tolist()
        return pa.Table.from_pylist(rows, schema=table.schema)

    with pytest.raises(DataError, match=r"o\.parquet: frame 'frame-00007' of 'scene-0002': ego_from_lidar is mirrored"):
        FrameTable.open(_as_before(path, tmp_path / "o.parquet", mirrored))

    def without_place(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[7]["lidar_path"] = None
        return pa.Table.from_pylist(rows, schema=table.schema)

    with pytest.raises(DataError, match=r"n\.parquet: column lidar_path has rows without a value"):
        FrameTable.open(_as_before(path, tmp_path / "n.parquet", without_place))


def test_earlier_tables_of_logs_in_order_of_time_still_open(path: Path, tmp_path: Path) -> None:
    """Their scenes alternate and may have no name; the fingerprint does not cover scenes."""

    def interleaved(table: pa.Table) -> pa.Table:
        scenes = pa.array(["", "night"] * (len(table) // 2))
        return table.set_column(table.schema.get_field_index("scene"), "scene", scenes)

    table = FrameTable.open(_as_before(path, tmp_path / "fleet.parquet", interleaved))
    assert (table.scenes, [frame.scene for frame in table[:3]]) == (["", "night"], ["", "night", ""])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["lidar_path"]), "column lidar_path is missing; it has token, scene"),
        (lambda t: t.drop_columns(["cameras"]), "column cameras is missing"),
        (
            lambda t: t.set_column(2, "timestamp", t["timestamp"].cast(pa.string())),
            "column timestamp: expected int64, got string",
        ),
    ],
)
def test_columns_that_are_missing_or_of_another_type_are_named_on_opening(
    path: Path, tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    with pytest.raises(DataError, match=rf"old\.parquet: is not a readable frame table \({message}"):
        FrameTable.open(_as_before(path, tmp_path / "old.parquet", change))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nuscene"}, r"data set nuscene; expected one of \['nuscenes', 'semantic_kitti'\]"),
        ({"dataset": None}, "data set none; expected one of"),
        ({"fingerprint": None}, "fingerprint none; expected 64 hexadecimal digits"),
        ({"fingerprint": "0" * 64}, "fingerprint 0+; expected 64"),
        ({"fingerprint": "xyz"}, "fingerprint xyz; expected 64"),
        ({"fingerprint": "1" * 64}, "its metadata do not have the digest that they were written with"),
        ({"dataset": "semantic_kitti"}, "its metadata do not have the digest that they were written with"),
        ({"allow_missing": "scenes"}, "its metadata do not have the digest that they were written with"),
        ({"digest": None}, "its metadata do not have the digest that they were written with"),
        ({"digest": None, "columns": None, "fingerprint": "1" * 64}, "its rows do not have the fingerprint"),
        ({"digest": None, "columns": None, "dataset": "semantic_kitti"}, "its rows do not have the fingerprint"),
    ],
)
def test_metadata_that_are_not_those_written_are_refused(
    path: Path, tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    other = tmp_path / "other.parquet"
    other.write_bytes(path.read_bytes())
    _set_metadata(other, **changes)
    with pytest.raises(DataError, match=rf"other\.parquet: is not a readable frame table \({message}"):
        FrameTable.open(other)


def test_pages_have_checksums(path: Path, tmp_path: Path) -> None:
    """Without the digests of this project parquet's own checksums find a flipped bit in a page."""
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    (tmp_path / "flipped.parquet").write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.ParquetFile(tmp_path / "flipped.parquet", page_checksum_verification=True).read()


def test_another_data_set_than_the_configs_is_refused_where_every_job_opens_its_table(path: Path) -> None:
    assert len(open_table(str(path), "nuscenes")) == 270
    with pytest.raises(
        DataError, match=r"frames\.parquet: holds frames of nuscenes, but data\.dataset is semantic_kitti"
    ):
        open_table(str(path), "semantic_kitti")


def test_no_job_opens_its_table_past_that_comparison() -> None:
    root = Path(__file__).parents[2]
    files = [*root.glob("slidr/**/*.py"), *root.glob("jobs/*.py")]
    assert [f.name for f in files if "FrameTable.open(" in f.read_text()] == ["frames.py"]


def test_what_a_download_lacked_is_recorded(tmp_path: Path) -> None:
    out = str(tmp_path / "f.parquet")
    write_frames(_plain_frames(), out, allow_missing="cameras", left_out="2 images of 10")
    table = FrameTable.open(out)
    assert (table.allow_missing, table.left_out, table.fingerprint) == ("cameras", "2 images of 10", RECORDED)
    assert table.lacking(["CAM_FRONT", "CAM_FRONT_LEFT"]) == {"CAM_FRONT_LEFT": 5}
    assert (table.blind(["CAM_FRONT"]), table.blind(["CAM_FRONT_LEFT"])) == (0, 5)
    assert table.take(np.array([1, 3])).lacking(["CAM_BACK_LEFT"]) == {"CAM_BACK_LEFT": 2}
    columns = json.loads(pq.ParquetFile(out).metadata.metadata[b"slidr.columns"])
    assert columns["rows"] == [5]
