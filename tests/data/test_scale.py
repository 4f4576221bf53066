"""Small versions of benchmarks/scale.py: facts that do not change with the size, counted and not timed."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

from slidr.data.frames import FrameTable, write_frames

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table(scale: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> FrameTable:
    path = str(tmp_path_factory.mktemp("scale") / "frames.parquet")
    write_frames(scale.made_up_frames(3415, 85), path)
    return FrameTable.open(path)


def test_the_made_up_table_has_nuscenes_proportions(table: FrameTable) -> None:
    assert len(table) == 3415
    train = table.select("train")
    assert len(train) == round(3415 * 28_130 / 34_149)
    assert len(train.scenes) == 70
    assert len(table.images()) == 3415 * 6


def test_every_frame_of_an_epoch_goes_to_one_of_64_workers(scale: ModuleType, table: FrameTable) -> None:
    found = scale.hand_out(table.path)  # asserts that no frame comes twice, and that all steps are full
    assert (found["keyframes"], found["images"]) == (3415, 3415 * 6)


def test_a_shard_travels_as_a_path_and_row_numbers(table: FrameTable) -> None:
    shard = table.take(np.arange(0, len(table), 64))
    assert len(pickle.dumps(shard)) < 8 * len(shard) + 1000
    assert pickle.loads(pickle.dumps(shard)).tokens == shard.tokens


def test_opening_and_splitting_read_no_matrices(table: FrameTable, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = pq.ParquetFile.read

    def spy(self: pq.ParquetFile, columns: list[str], **more: object) -> object:
        read.extend(columns)
        return real(self, columns=columns, **more)

    monkeypatch.setattr(pq.ParquetFile, "read", spy)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", lambda *a: pytest.fail("rows were decoded"))
    FrameTable.open(table.path).select("train", 0.1)
    assert set(read) == {"token", "scene", "splits.list.element"}
