"""Fine-tuning and probing end to end on a tiny synthetic world, and what bad input is answered with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slidr.cluster.finetune import finetune, labelled_part
from slidr.cluster.train import TrainingFailed
from slidr.config import (
    ClusterConfig,
    Config,
    DataConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    VoxelConfig,
)
from slidr.data.frames import write_frames
from slidr.data.nuscenes import read_frames
from slidr.data.splits import published_fraction
from slidr.data.storage import DataError
from slidr.models.minkunet import MinkUNet14
from slidr.models.weights import WeightsError, load_student
from slidr.tracking import read_journal
from slidr.types import Frame


@pytest.fixture(scope="module")
def frames(tiny_world: Path) -> list[Frame]:
    return read_frames(tiny_world, "v1.0-trainval")


@pytest.fixture(scope="module")
def base(tiny_world: Path, frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("finetune")
    write_frames(frames, str(folder / "frames.parquet"))
    return Config(
        data=DataConfig(
            root=str(tiny_world),
            frames=str(folder / "frames.parquet"),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
        ),
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=17),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=OptimConfig(name="adamw", lr=1e-2, epochs=2, batch_size=2),
        run=RunConfig(folder=str(folder / "runs"), log_every=1),
        cluster=ClusterConfig(num_workers=0),
    )


def named(config: Config, name: str, **changes: Any) -> Config:
    return replace(config, run=replace(config.run, name=name), **changes)


def validations(config: Config) -> list[dict[str, float]]:
    journal = read_journal(Path(config.run.folder, config.run.name, "metrics.jsonl"))
    return [metrics for _, metrics in sorted(journal.items()) if "val_miou" in metrics]


@pytest.fixture(scope="module")
def tuned(base: Config) -> tuple[Config, dict[str, Any]]:
    config = named(base, "tuned")
    return config, finetune(config, progress=False)


def test_every_epoch_reports_early_and_the_best_is_kept(tuned: tuple[Config, dict[str, Any]]) -> None:
    config, result = tuned
    seen = [metrics["val_miou"] for metrics in validations(config)]
    assert len(seen) == config.optim.epochs
    assert result["val_miou"] == seen[-1]
    assert result["best_val_miou"] == max(seen)
    assert result["best_epoch"] == seen.index(max(seen)) + 1


def test_the_student_is_left_in_slidrs_downstream_layout(tuned: tuple[Config, dict[str, Any]]) -> None:
    config, result = tuned
    for key in ("student", "best_student"):
        contents = torch.load(result[key], weights_only=True)
        assert {"model_points", "config"} <= contents.keys()
        assert contents["config"]["cylindrical_coordinates"] is True
        load_student(MinkUNet14(1, 17, width=0.25), result[key], head="strict")
    folder = Path(config.run.folder, config.run.name)
    assert json.loads((folder / "result.json").read_text()) == result
    assert (folder / "config.yaml").exists()


def test_the_labelled_scenes_are_written_beside_the_run(base: Config, frames: list[Frame]) -> None:
    config = named(base, "half", data=replace(base.data, train_fraction=0.5))
    config = replace(config, optim=replace(config.optim, max_steps=1))
    result = finetune(config, progress=False)
    scenes = list(dict.fromkeys(frame.scene for frame in frames if "parametrize" in frame.splits))
    written = Path(config.run.folder, "half", "labelled.txt").read_text().split()
    assert written == scenes[1::2]
    assert (result["labelled"], result["labelled_as_published"]) == (1, False)


def test_a_complete_semantic_kitti_table_is_recognised_as_the_published_fraction(
    frames: list[Frame], base: Config, tmp_path: Path
) -> None:
    # The fraction of a whole split is the frozen list; of a few sequences it is the rule's.
    names = sorted(published_fraction("semantic_kitti", 0.25))
    table = [replace(frames[0], token=name, scene=name[:2], cameras=(), splits=("train",)) for name in names]
    path = str(tmp_path / "quarter.parquet")
    write_frames(table, path, "semantic_kitti")
    config = replace(base, data=replace(base.data, dataset="semantic_kitti", frames=path, train_split="train"))
    scans, published = labelled_part(replace(config, data=replace(config.data, train_fraction=0.25)))
    assert scans == names[::4]
    assert not published


@pytest.mark.ray
def test_a_probe_on_two_ray_workers_trains_the_head_only_and_starts_from_the_checkpoint(
    base: Config, tmp_path: Path, ray_cluster: None
) -> None:
    source = MinkUNet14(1, 64, width=0.25)
    path = tmp_path / "pretrained.pt"
    torch.save({"model_points": source.state_dict()}, path)
    config = named(
        base,
        "probe",
        student=replace(base.student, weights=str(path), freeze=True),
        cluster=ClusterConfig(num_workers=2),
        optim=replace(base.optim, max_steps=2),
    )
    result = finetune(config, progress=False)
    trained = torch.load(result["student"], weights_only=True)["model_points"]
    for name, value in source.state_dict().items():
        assert name.startswith("final.") or torch.equal(trained[name], value), name
    assert result["weights"].startswith("loaded")
    assert result["val_miou"] > 0


# ---------------------------------------------------------------------------------------------- bad input


def spoiled(base: Config, tiny_world: Path, frames: list[Frame], folder: Path, kind: str, data: bytes | None) -> Config:
    """The config of a data root in which the first training frame's sweep or labels are other bytes, or not there."""
    first = next(frame for frame in frames if "parametrize" in frame.splits)
    relative = first.lidar_path if kind == "sweep" else first.label_path
    assert relative is not None
    changed = []
    for frame in frames:
        if "parametrize" in frame.splits:
            for path in (frame.lidar_path, frame.label_path):
                assert path is not None
                copy = folder / path
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((tiny_world / path).read_bytes())
        changed.append(frame)
    if data is None:
        changed = [replace(f, label_path=None) if f.token == first.token else f for f in frames]
    else:
        (folder / relative).write_bytes(data)
    table = str(folder / "frames.parquet")
    write_frames(changed, table)
    return named(base, folder.name, data=replace(base.data, root=str(folder), frames=table))


def test_labels_of_another_length_are_refused_by_file_and_numbers(
    base: Config, tiny_world: Path, frames: list[Frame], tmp_path: Path
) -> None:
    config = spoiled(base, tiny_world, frames, tmp_path, "labels", bytes(7))
    first = next(frame for frame in frames if "parametrize" in frame.splits)
    points = (tiny_world / first.lidar_path).stat().st_size // 20
    with pytest.raises(DataError, match=rf"lidarseg.*holds 7 labels for a sweep of {points} points"):
        finetune(config, progress=False)


def test_a_truncated_sweep_is_refused_by_file_and_bytes(
    base: Config, tiny_world: Path, frames: list[Frame], tmp_path: Path
) -> None:
    config = spoiled(base, tiny_world, frames, tmp_path, "sweep", bytes(20 * 9 + 3))
    with pytest.raises(DataError, match=r"LIDAR_TOP.*truncated: 183 bytes"):
        finetune(config, progress=False)


def test_a_frame_without_labels_is_refused_by_file_and_token(
    base: Config, tiny_world: Path, frames: list[Frame], tmp_path: Path
) -> None:
    config = spoiled(base, tiny_world, frames, tmp_path, "labels", None)
    first = next(frame for frame in frames if "parametrize" in frame.splits)
    with pytest.raises(DataError, match=rf"LIDAR_TOP.*frame {first.token} of {first.scene} has no point labels"):
        finetune(config, progress=False)


def test_a_checkpoint_with_other_voxels_is_refused_by_file_and_values(base: Config, tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    voxels = {"voxel_size": 0.1, "cylindrical_coordinates": True}
    torch.save({"model_points": MinkUNet14(1, 64, width=0.25).state_dict(), "config": voxels}, path)
    config = named(base, "other", student=replace(base.student, weights=str(path)))
    with pytest.raises(WeightsError, match=r"other\.pt.*voxel_size 0\.1.*\(0\.4, 2\.0, 0\.4\)"):
        finetune(config, progress=False)


@pytest.mark.ray
def test_through_ray_too_the_damaged_file_is_what_the_error_names(
    base: Config, tiny_world: Path, frames: list[Frame], tmp_path: Path, ray_cluster: None
) -> None:
    config = spoiled(base, tiny_world, frames, tmp_path, "sweep", bytes(20 * 9 + 3))
    with pytest.raises(TrainingFailed, match=r"worker 0: .*LIDAR_TOP.*truncated: 183 bytes"):
        finetune(replace(config, cluster=ClusterConfig(num_workers=1)), progress=False)
