"""What the tests of searches share: a small search, and what of its trials must agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slidr.config import (
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SpaceConfig,
    StudentConfig,
    TuneConfig,
    VoxelConfig,
)
from slidr.data.frames import write_frames
from slidr.data.nuscenes import read_frames
from slidr.models.minkunet import MinkUNet14

COMPARED = ("fraction", "method", "kind", "index", "round", "seed", "status", "score", "lr", "head_lr", "weight_decay")
COMPARED += ("batch_size", "epochs", "curve")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as a trial of one CPU has: sums are then taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def search_config(world: Path, folder: Path) -> Config:
    """A search of the tiny world: two fractions, both methods, two rounds of one trial, one seed."""
    frames = folder / "frames.parquet"
    write_frames(read_frames(world, "v1.0-trainval"), str(frames))
    student = folder / "pretrained.pt"
    torch.manual_seed(0)
    torch.save({"model_points": MinkUNet14(1, 64, width=0.25).state_dict()}, student)
    space = SpaceConfig(lr=(1e-3, 1e-1))
    return Config(
        data=DataConfig(root=str(world), frames=str(frames), voxel=VoxelConfig(size=(0.4, 2.0, 0.4))),
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=17, weights=str(student)),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=OptimConfig(name="adamw", lr=1e-2, epochs=2, batch_size=2),
        evaluation=EvaluationConfig(bootstrap=20),
        run=RunConfig(folder=str(folder / "runs"), name="search", log_every=1),
        cluster=ClusterConfig(num_workers=0),
        tune=TuneConfig(
            fractions=(0.5, 1.0),
            trials=2,
            round_size=1,
            seeds=1,
            pretrained=replace(space, head_lr=(1e-3, 1.0)),
            random=space,
            results=str(folder / "results"),
        ),
    )
