"""Fine-tuning and probing end to end on a tiny synthetic world, and what bad input is answered with."""

from __future__ import annotations

import runpy
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slidr.cluster.finetune import finetune, labelled_part
from slidr.cluster.train import TrainingFailed
from slidr.config import (
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    SuperpixelConfig,
    VoxelConfig,
    WorldConfig,
    dump,
)
from slidr.data.frames import write_frames
from slidr.data.loading import LocalLoader, ScanSource
from slidr.data.nuscenes import read_frames, scenes_of_splits
from slidr.data.splits import SEMANTIC_KITTI_SEQUENCES
from slidr.data.storage import DataError
from slidr.models.minkunet import MinkUNet14
from slidr.models.weights import WeightsError, load_student
from slidr.tracking import read_journal
from slidr.training.runs import RunError, RunFolder, differences
from slidr.training.segment import SegmentTask
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
    assert RunFolder(str(folder)).result() == result
    assert (folder / "config.yaml").exists()


def test_the_labelled_scenes_are_written_beside_the_run(base: Config, frames: list[Frame]) -> None:
    config = named(base, "half", data=replace(base.data, train_fraction=0.5))
    config = replace(config, optim=replace(config.optim, max_steps=1))
    result = finetune(config, progress=False)
    scenes = list(dict.fromkeys(frame.scene for frame in frames if "parametrize" in frame.splits))
    written = Path(config.run.folder, "half", "labelled.txt").read_text().split()
    assert written == scenes[1::2]
    assert (result["labelled"], result["labelled_as_published"]) == (1, False)


@pytest.mark.parametrize("how", ["probe", "head-rate"])
def test_an_interrupted_run_says_what_is_labelled_and_ends_in_the_same_weights(
    base: Config, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    torch.save({"model_points": MinkUNet14(1, 64, width=0.125).state_dict()}, tmp_path / "student.pt")
    student = replace(base.student, width=0.125, weights=str(tmp_path / "student.pt"), freeze=how == "probe")
    config = replace(
        base,
        data=replace(base.data, voxel=VoxelConfig(size=(0.8, 4.0, 0.8))),
        student=student,
        optim=OptimConfig(lr=0.05, head_lr=None if student.freeze else 0.5, epochs=2, batch_size=2),
        run=replace(base.run, checkpoint_every=1),
    )
    monkeypatch.setattr(SegmentTask, "objective", ("val_loss", 1))  # the first epoch is the best one
    whole = finetune(named(config, f"{how}-whole"), progress=False)
    assert whole["best_epoch"] == 1

    interrupted, steps = named(config, f"{how}-interrupted"), 0
    loss = SegmentTask.loss

    def dying(self: SegmentTask, *arguments: Any) -> Any:
        nonlocal steps
        steps += self.model.training
        if steps == 4:  # the second step of the second epoch
            raise KeyboardInterrupt
        return loss(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(SegmentTask, "loss", dying)
        with pytest.raises(KeyboardInterrupt):
            finetune(interrupted, progress=False)
    left, complete = (Path(base.run.folder, f"{how}-{name}") for name in ("interrupted", "whole"))
    assert not (left / "result.json").exists()
    assert (left / "labelled.txt").read_text() == (complete / "labelled.txt").read_text()
    resumed = finetune(replace(interrupted, run=replace(interrupted.run, resume=True)), progress=False)
    for one, other in zip(validations(named(config, f"{how}-whole")), validations(interrupted), strict=True):
        assert all(other[name] == value for name, value in one.items() if name in ("loss", "lr") or "val_" in name)
    for key in ("student", "best_student"):
        one, other = (torch.load(result[key], weights_only=True)["model_points"] for result in (whole, resumed))
        assert one.keys() == other.keys()
        assert all(torch.equal(other[name], value) for name, value in one.items()), key
    for key in ("best_val_miou", "best_epoch", "val_miou", "labelled"):
        assert resumed[key] == whole[key]


def test_the_job_script_fine_tunes_in_this_process_and_says_where_the_student_is(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump(named(base, "job")))
    job = Path(__file__).parents[2] / "jobs" / "finetune.py"
    words = ["--optim.max_steps", "1", "--data.max_val_frames", "1", "--data.voxel.size", "0.8", "4", "0.8"]
    monkeypatch.setattr("sys.argv", [str(job), str(tmp_path / "config.yaml"), *words])
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(job), run_name="__main__")
    finally:  # a script ends its process; this one goes on
        for number, handler in before.items():
            signal.signal(number, handler)
    assert ended.value.code == 0
    student = Path(base.run.folder, "job", "student.pt")
    assert f"student -> {student}" in capsys.readouterr().err
    load_student(MinkUNet14(1, 17, width=0.25), student)


def test_a_run_is_not_resumed_with_other_weights_of_the_same_name(base: Config, tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    torch.save({"model_points": MinkUNet14(1, 64, width=0.25).state_dict()}, path)
    config = replace(
        base,
        student=replace(base.student, weights=str(path)),
        optim=replace(base.optim, max_steps=1),
        run=replace(base.run, folder=str(tmp_path / "runs"), name="weights", resume=True),
    )
    result = finetune(config, progress=False)
    assert finetune(config, progress=False) == result
    torch.save({"model_points": MinkUNet14(1, 64, width=0.25).state_dict()}, path)
    with pytest.raises(RunError, match=r"student\.weights: .*student\.pt: it is another file since"):
        finetune(config, progress=False)


def test_what_shapes_no_result_is_not_blamed_for_a_refusal(base: Config) -> None:
    other = replace(
        base,
        data=replace(base.data, root="elsewhere", frames="elsewhere.parquet", val_batch_size=3),
        superpixels=SuperpixelConfig(folder="elsewhere"),
        evaluation=EvaluationConfig(votes=5),
        world=WorldConfig(seed=5),
        run=replace(base.run, seed=7, log_every=3),
        cluster=ClusterConfig(num_workers=0, loader_cpus=5),
    )
    assert differences(base, other) == "data.val_batch_size was 4, now 3, run.seed was 0, now 7"
    assert differences(base, replace(other, data=base.data, run=base.run)) == ""


def published_names(dataset: str) -> list[str]:
    """The training scenes of nuScenes in order of name; the training scans of SemanticKITTI."""
    if dataset == "nuscenes":
        return sorted(scenes_of_splits()["train"])
    lengths = SEMANTIC_KITTI_SEQUENCES["train"]
    return [f"{sequence}/{scan:06d}" for sequence, scans in lengths.items() for scan in range(scans)]


def table_of(names: list[str], dataset: Any, path: Path) -> str:
    """A frame table of one frame a name."""
    nowhere = np.eye(4)
    blank = Frame("", "", 0, "lidar", "a.bin", None, nowhere, nowhere, (), None, None, ("train",))
    write_frames((replace(blank, token=name, scene=name) for name in names), str(path), dataset)
    return str(path)


@pytest.mark.parametrize("dataset", ["nuscenes", "semantic_kitti"])
def test_a_complete_official_split_and_no_other_gives_the_published_lists(dataset: Any, tmp_path: Path) -> None:
    names = published_names(dataset)
    whole = table_of(names, dataset, tmp_path / "whole.parquet")
    one_less = table_of(names[:50] + names[51:], dataset, tmp_path / "less.parquet")

    def part(table: str, fraction: float, split: Any = "train") -> tuple[list[str], bool]:
        data = DataConfig(dataset=dataset, frames=table, train_split=split, train_fraction=fraction)
        return labelled_part(Config(data=data))

    for fraction, step in ((0.01, 100), (0.05, 20), (0.1, 10), (0.25, 4), (1.0, 1)):
        expected = names[step - 1 :: step] if dataset == "nuscenes" else names[::step]
        assert part(whole, fraction) == (expected, True)
        assert not part(one_less, fraction)[1]
    assert not part(whole, 0.5)[1]  # nobody publishes halves
    assert not part(whole, 1.0, "all")[1]


@pytest.mark.ray
def test_a_probe_on_two_ray_workers_trains_the_head_only_and_is_scored_as_by_one(
    base: Config, tmp_path: Path, ray_cluster: None
) -> None:
    source = MinkUNet14(1, 64, width=0.25)
    path = tmp_path / "pretrained.pt"
    torch.save({"model_points": source.state_dict()}, path)
    config = named(
        base,
        "probe",
        data=replace(base.data, val_split="all", val_batch_size=3),  # three batches for two workers, of 3, 3 and 2
        student=replace(base.student, weights=str(path), freeze=True),
        cluster=ClusterConfig(num_workers=2),
        optim=replace(base.optim, max_steps=2),
    )
    result = finetune(config, progress=False)
    trained = torch.load(result["student"], weights_only=True)["model_points"]
    for name, value in source.state_dict().items():
        assert name.startswith("final.") or torch.equal(trained[name], value), name
    assert result["weights"].startswith("loaded")
    alone = SegmentTask(config)
    alone.load_state({"student": trained})
    metrics = alone.validate(LocalLoader(ScanSource(config)).validation())
    assert {"val_miou", "val_accuracy", "val_loss", "val_iou_car"} <= metrics.keys()
    for name, value in metrics.items():
        assert result[name] == (pytest.approx(value, rel=1e-5) if name == "val_loss" else value), name


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
