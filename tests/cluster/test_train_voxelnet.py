"""The published VoxelNet row end to end in this process, on a tiny synthetic world and with a small teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import losses, named, weights

from slidr.cli import override
from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import compute_map
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.config import Config, load
from slidr.data.frames import FrameTable, write_frames
from slidr.data.loading import PairSource
from slidr.data.nuscenes import read_frames
from slidr.models.students import build_student
from slidr.models.weights import load_student
from slidr.training.distill import build_distiller

CONFIG = Path(__file__).parents[2] / "configs" / "pretrain" / "slidr_voxelnet.yaml"


@pytest.fixture(scope="module")
def config(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("voxelnet")
    changes = {
        "data.root": tiny_world,
        "data.max_val_frames": 1,
        "data.frames": folder / "frames.parquet",
        "superpixels.folder": folder / "superpixels",
        "teacher.name": "efficientnet_lite0",
        "teacher.weights": "imagenet",
        "optim.max_steps": 2,
        "optim.batch_size": 2,
        "run.folder": folder / "runs",
        "run.checkpoint_every": 1,
        "run.log_every": 1,
        "run.score_frames": 1,
        "cluster.num_workers": 0,
        "cluster.use_gpu": False,
    }
    arguments = [word for key, value in changes.items() for word in (f"--{key}", str(value))]
    arguments += ["--data.image_size", "56", "104", "--data.cameras", "CAM_FRONT", "CAM_BACK"]
    config = override(load(CONFIG), arguments)
    write_frames(read_frames(tiny_world, config.data.version), config.data.frames)
    maps = Path(superpixel_folder(config.superpixels))
    maps.mkdir(parents=True)
    for image in FrameTable.open(config.data.frames).select((config.data.train_split, config.data.val_split)).images():
        compute_map(image, config.data.root, str(maps), config.superpixels)
    return config


def test_a_run_broken_off_within_its_second_step_is_resumed_and_leaves_a_student(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_sample, made = PairSource.sample, 0

    def dying_sample(self: Any, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 3:
            raise KeyboardInterrupt
        return real_sample(self, *arguments)

    monkeypatch.setattr(PairSource, "sample", dying_sample)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, progress=False)
    monkeypatch.undo()
    assert len(losses(config)) == 1
    result = pretrain(named(config, config.run.name, resume=True), progress=False)
    assert result["steps"] == len(losses(config)) == 2
    assert all(math.isfinite(loss) for loss in losses(config))

    student = build_student(config.student)
    assert Path(result["student"]).name == "student.pt"
    assert not load_student(student, result["student"], expect=None).missing
    start = build_distiller(config).student.state_dict()
    for name, value in student.state_dict().items():
        assert value.isfinite().all(), name
        assert torch.equal(value, weights(config)[name]), name
        assert not torch.equal(value, start[name]), name
        if name.endswith("num_batches_tracked"):
            assert value == 2, name
