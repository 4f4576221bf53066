"""What a pretraining keeps: a result before any picture, and none of a run in which no camera saw a point."""

from __future__ import annotations

import ast
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slidr.cluster import evaluate as evaluating
from slidr.cluster import pretrain as pretraining
from slidr.cluster import tune as tuning
from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import compute_map, folder_of
from slidr.config import (
    AugmentConfig,
    ClusterConfig,
    Config,
    ConfigError,
    DataConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    SuperpixelConfig,
    TeacherConfig,
    VoxelConfig,
)
from slidr.data.frames import FrameTable, write_frames
from slidr.data.loading import LocalLoader, PairSource
from slidr.data.nuscenes import read_frames
from slidr.training.distill import DistillTask
from slidr.training.loop import NothingToLearn
from slidr.types import Frame


@pytest.fixture(scope="module")
def few(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A pretraining of two steps in this process, on maps of two superpixels, with two output channels."""
    folder = tmp_path_factory.mktemp("kept")
    config = Config(
        data=DataConfig(
            root=str(tiny_world),
            frames=str(folder / "frames.parquet"),
            image_size=(56, 104),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
            augment=AugmentConfig(crop=False, drop_cuboid=False),
            max_val_frames=1,
        ),
        superpixels=SuperpixelConfig(folder=str(folder / "superpixels"), segments=2, sigma=1.0),
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=2),
        teacher=TeacherConfig(name="efficientnet_lite0", weights=None),
        optim=OptimConfig(lr=1e-3, batch_size=2, max_steps=2),
        run=RunConfig(folder=str(folder / "runs"), score_frames=1, log_every=1),
        cluster=ClusterConfig(num_workers=0),
    )
    write_frames(read_frames(tiny_world), config.data.frames)
    table = FrameTable.open(config.data.frames).select(("parametrize", "verify"))
    for image in table.images():
        compute_map(image, config.data.root, folder_of(config.superpixels), config.superpixels)
    return config


def named(config: Config, name: str, **changes: Any) -> Config:
    return replace(config, run=replace(config.run, name=name), **changes)


def test_fewer_superpixels_and_channels_than_colours_still_make_a_result_and_a_picture(few: Config) -> None:
    result = pretrain(named(few, "few"), progress=False)
    assert Path(result["picture"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path(few.run.folder, "few", "result.json").read_text())["picture"] == result["picture"]


def test_a_picture_that_cannot_be_drawn_costs_no_result_which_is_there_before_it(
    few: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(few.run.folder, "undrawn")

    def broken(*_: Any) -> bytes:
        assert json.loads((folder / "result.json").read_text())["steps"] == 2
        assert (folder / "student.pt").exists()
        raise ZeroDivisionError("no colours")

    monkeypatch.setattr(pretraining, "method_figure", broken)
    with caplog.at_level(logging.WARNING, "slidr"):
        result = pretrain(named(few, "undrawn"), progress=False)
    assert "picture" not in result
    assert result["steps"] == 2
    [text] = [record.getMessage() for record in caplog.records if "is not drawn" in record.getMessage()]
    assert "method.png" in text
    assert "ZeroDivisionError: no colours" in text


def test_no_command_draws_but_through_the_guard() -> None:
    """A chart is drawn inside of a function that `save_picture` calls, in every file that draws one."""

    charts = {"method_figure", "bar_chart", "confusion_chart", "course_chart", "rates_chart", "fractions_chart"}
    guarded = set()
    for module in (pretraining, evaluating, tuning):
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text())
        inside = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda | ast.FunctionDef)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in charts:
                owner = min(
                    (f for f in inside if any(each is node for each in ast.walk(f))),
                    key=lambda f: sum(1 for _ in ast.walk(f)),
                )
                assert isinstance(owner, ast.Lambda) or owner.name in ("confusion", "course", "_picture"), node.func.id
                guarded.add(node.func.id)
    assert guarded == charts


# ------------------------------------------------------------------------------------------- nothing to learn from


@pytest.fixture
def blind(few: Config, tiny_world: Path, tmp_path: Path) -> Config:
    """The same, with cameras that look up from far below."""
    away = np.eye(4)
    away[2, 3] = -1e6

    def moved(frame: Frame) -> Frame:
        return replace(
            frame,
            cameras=tuple(replace(c, camera_from_lidar=away @ c.camera_from_lidar) for c in frame.cameras),
        )

    path = str(tmp_path / "frames.parquet")
    write_frames([moved(frame) for frame in read_frames(tiny_world)], path)
    return replace(
        few, data=replace(few.data, frames=path), run=replace(few.run, folder=str(tmp_path / "runs"), name="blind")
    )


def test_a_run_in_which_no_camera_sees_a_point_fails_with_frames_and_keeps_no_result(blind: Config) -> None:
    with pytest.raises(NothingToLearn, match=r"steps 1 to 2: no camera sees .*frames .*camera_from_lidar") as caught:
        pretrain(blind, progress=False)
    tokens = FrameTable.open(blind.data.frames).select("parametrize").tokens
    assert any(token in str(caught.value) for token in tokens)
    folder = Path(blind.run.folder, "blind")
    assert not (folder / "result.json").exists()
    assert not (folder / "student.pt").exists()
    assert not list(folder.glob("checkpoints/*"))


def test_superpixels_that_all_have_too_few_points_fail_the_same_way(few: Config) -> None:
    config = named(few, "picky", loss=replace(few.loss, min_points=10**6))
    with pytest.raises(NothingToLearn, match=r"loss\.min_points"):
        pretrain(config, progress=False)


def test_a_validation_without_pairs_is_not_the_best(few: Config, blind: Config, tmp_path: Path) -> None:
    frames = read_frames(few.data.root)
    unseen = {frame.token: frame for frame in FrameTable.open(blind.data.frames)}
    mixed = [unseen[frame.token] if "verify" in frame.splits else frame for frame in frames]
    path = str(tmp_path / "mixed.parquet")
    write_frames(mixed, path)
    config = replace(blind, data=replace(blind.data, frames=path), run=replace(blind.run, name="mixed"))
    with pytest.raises(ConfigError, match=r"data\.val_split: no camera sees points"):
        pretrain(config, progress=False)
    assert not list(Path(config.run.folder, "mixed").glob("checkpoints/*"))


def test_a_batch_without_pairs_does_not_make_a_validation_better(few: Config, blind: Config) -> None:
    task = DistillTask(few)

    def validation(config: Config) -> list[Any]:
        return list(LocalLoader(PairSource(config, folder_of(few.superpixels))).validation())

    seeing, empty = validation(few), validation(blind)
    assert [len(batch.point_index) > 0 for batch in (*seeing, *empty)] == [True] * len(seeing) + [False] * len(empty)
    alone = task.validate(seeing)
    assert alone["val_loss"] > 0
    assert task.validate([*seeing, *empty]) == alone
    assert [task.evidence(batch) for batch in empty] == [0] * len(empty)
    assert torch.isfinite(torch.tensor(alone["val_loss"]))
