"""Distillation end to end on a tiny synthetic world: in this process, on one Ray worker, on two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import compute_superpixels
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.cluster.train import TrainingFailed
from slidr.config import (
    AugmentConfig,
    ClusterConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    SuperpixelConfig,
    TeacherConfig,
    VoxelConfig,
)
from slidr.data.frames import write_frames
from slidr.data.loading import PairSource
from slidr.data.nuscenes import read_frames
from slidr.models.minkunet import MinkUNet14
from slidr.models.weights import load_student
from slidr.tracking import read_journal, tracking_uri
from slidr.training.checkpoint import CheckpointFolder
from slidr.training.runs import RunError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def base(tiny_world: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A config whose frame table and superpixels exist, and whose networks are small."""
    folder = tmp_path_factory.mktemp("train")
    config = Config(
        data=DataConfig(
            root=str(tiny_world),
            frames=str(folder / "frames.parquet"),
            max_val_frames=2,
            image_size=(56, 104),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
            augment=AugmentConfig(crop=False, drop_cuboid=False),
        ),
        superpixels=SuperpixelConfig(folder=str(folder / "superpixels"), segments=40, sigma=1.0),
        student=StudentConfig(name="minkunet14", width=0.25),
        teacher=TeacherConfig(name="efficientnet_lite0", weights="imagenet"),
        loss=LossConfig(gather_negatives=True),
        # Gently: large steps, and Adam's division by tiny gradients, blow float32's rounding up within ten steps.
        optim=OptimConfig(lr=1e-3, epochs=10, max_steps=10, batch_size=2),
        run=RunConfig(folder=str(folder / "runs"), log_every=1, checkpoint_every=4, score_frames=2),
        cluster=ClusterConfig(num_workers=0),
    )
    frames = read_frames(tiny_world, "v1.0-trainval")
    write_frames(frames, config.data.frames)
    report = compute_superpixels(frames, config.data, config.superpixels, config.cluster, progress=False)
    assert not report.failed
    return config


def named(config: Config, name: str, workers: int = 0, **run: Any) -> Config:
    return replace(
        config,
        run=replace(config.run, name=name, **run),
        cluster=replace(config.cluster, num_workers=workers),
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as a worker of one CPU has: sums are then taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(base: Config) -> tuple[Config, dict[str, Any]]:
    """An undisturbed run in this process, and its scores."""
    config = named(base, "alone")
    return config, pretrain(config, progress=False)


def losses(config: Config) -> list[float]:
    journal = read_journal(Path(config.run.folder, config.run.name, "metrics.jsonl"))
    return [metrics["loss"] for _, metrics in sorted(journal.items()) if "loss" in metrics]


def weights(config: Config) -> dict[str, torch.Tensor]:
    state = CheckpointFolder(str(Path(config.run.folder, config.run.name, "checkpoints"))).newest()
    assert state is not None
    return {**state["student"], **{f"head.{name}": value for name, value in state["head"].items()}}


def test_a_run_leaves_scores_checkpoints_a_student_and_an_mlflow_run(alone: tuple[Config, dict[str, Any]]) -> None:
    from mlflow import MlflowClient

    config, result = alone
    folder = Path(config.run.folder, config.run.name)
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["steps"] == 10
    assert 0 <= result["retrieval_untrained"] <= 1
    assert losses(config)[-1] < losses(config)[0]
    run = MlflowClient(tracking_uri=tracking_uri(config)).get_run((folder / "mlflow_run_id").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.metrics["retrieval"] == pytest.approx(result["retrieval"])
    assert run.data.params["student.name"] == "minkunet14"


def test_the_student_that_is_left_loads_strictly(alone: tuple[Config, dict[str, Any]]) -> None:
    config, result = alone
    student = MinkUNet14(in_channels=1, out_channels=64, width=0.25)
    report = load_student(student, result["student"], expect=None)
    assert not report.missing
    for name, value in weights(config).items():
        if not name.startswith("head."):
            assert torch.equal(student.state_dict()[name], value)


def test_an_interrupted_run_ends_in_the_same_weights(
    base: Config, alone: tuple[Config, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = named(base, "interrupted")
    real_sample = PairSource.sample
    made = 0

    def dying_sample(self: Any, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 13:  # within step 7; the last checkpoint is from step 4
            raise KeyboardInterrupt
        return real_sample(self, *arguments)

    monkeypatch.setattr(PairSource, "sample", dying_sample)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, progress=False)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"--run\.resume"):
        pretrain(config, progress=False)
    result = pretrain(named(config, "interrupted", resume=True), progress=False)
    for name, value in weights(alone[0]).items():
        assert torch.equal(weights(config)[name], value), name
    assert losses(config) == losses(alone[0])
    assert result["retrieval"] == alone[1]["retrieval"]


def test_resuming_with_other_values_is_refused_by_key(base: Config, alone: tuple[Config, dict[str, Any]]) -> None:
    config = named(base, "alone", resume=True)
    other = replace(config, optim=replace(config.optim, lr=0.1))
    with pytest.raises(RunError, match=r"optim\.lr was 0\.001, now 0\.1"):
        pretrain(other, progress=False)


def test_resuming_a_finished_run_returns_its_scores(alone: tuple[Config, dict[str, Any]]) -> None:
    config, result = alone
    assert pretrain(named(config, "alone", resume=True), progress=False) == result


@pytest.fixture(scope="module")
def on_ray(base: Config) -> dict[int, Config]:
    """The same run on one and on two Ray workers."""
    configs = {workers: named(base, f"ray-{workers}", workers) for workers in (1, 2)}
    for config in configs.values():
        pretrain(config, progress=False)
    return configs


def test_one_ray_worker_equals_the_calling_process(
    on_ray: dict[int, Config], alone: tuple[Config, dict[str, Any]]
) -> None:
    assert losses(on_ray[1]) == pytest.approx(losses(alone[0]), rel=1e-5)


def test_two_workers_agree_with_one_over_the_first_ten_steps(on_ray: dict[int, Config]) -> None:
    assert len(losses(on_ray[1])) == 10
    assert losses(on_ray[2]) == pytest.approx(losses(on_ray[1]), abs=1e-4)


def test_a_damaged_superpixel_map_is_named_to_the_user(base: Config, tmp_path: Path) -> None:
    folder = Path(superpixel_folder(base.superpixels))
    copy = replace(base.superpixels, folder=str(tmp_path))
    shutil.copytree(folder, superpixel_folder(copy))
    for path in Path(superpixel_folder(copy)).glob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    config = named(replace(base, superpixels=copy), "damaged", workers=1)
    with pytest.raises(TrainingFailed, match=rf"{tmp_path}.*\.png"):
        pretrain(config, progress=False)
    # Nothing was trained: the name is free again, mended or with other values.
    other = replace(named(base, "damaged"), optim=replace(base.optim, max_steps=1))
    assert pretrain(other, progress=False)["steps"] == 1


def test_a_split_without_frames_is_refused_before_anything_starts(base: Config) -> None:
    config = named(replace(base, data=replace(base.data, val_split="mini_val")), "unvalidated")
    with pytest.raises(ValueError, match="mini_val"):
        pretrain(config, progress=False)
    assert not Path(config.run.folder, "unvalidated").exists()


def test_a_failing_worker_ends_the_run_with_its_reason(base: Config) -> None:
    config = named(replace(base, optim=replace(base.optim, lr=1e30)), "diverging", workers=1)
    with pytest.raises(TrainingFailed, match=r"optim\.lr"):
        pretrain(config, progress=False)
