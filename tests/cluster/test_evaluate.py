"""Evaluation: exact whatever the number of workers, complete, and refused where it would mislead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slidr.cli import main
from slidr.cluster.evaluate import EvaluateStage, evaluate, evaluation_config
from slidr.config import (
    ClusterConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    VoxelConfig,
    dump,
)
from slidr.data.frames import write_frames
from slidr.data.labels import NUSCENES_CLASSES
from slidr.data.loading import train_plan
from slidr.data.nuscenes import read_frames
from slidr.data.samples import scan_sample
from slidr.metrics import ConfusionMatrix
from slidr.models.minkunet import MinkUNet14
from slidr.models.weights import WeightsError
from slidr.sparse import SparseTensor
from slidr.training.locks import launching
from slidr.training.runs import RunError, folder_of
from slidr.types import Frame


@pytest.fixture(scope="module")
def frames(tiny_world: Path) -> list[Frame]:
    """Three frames to evaluate: an odd number."""
    world = read_frames(tiny_world, "v1.0-trainval")
    return [replace(frame, splits=("val",)) for frame in world[1:4]]


@pytest.fixture(scope="module")
def base(tiny_world: Path, frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("evaluate")
    write_frames(frames, str(folder / "frames.parquet"))
    torch.manual_seed(0)
    torch.save({"model_points": MinkUNet14(1, 17, width=0.25).state_dict()}, folder / "student.pt")
    return Config(
        data=DataConfig(
            root=str(tiny_world),
            frames=str(folder / "frames.parquet"),
            voxel=VoxelConfig(size=(0.4, 2.0, 0.4)),
            val_batch_size=2,  # two passes, of two sweeps and of one
        ),
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=17),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=OptimConfig(batch_size=2),
        evaluation=EvaluationConfig(checkpoint=str(folder / "student.pt"), bootstrap=50),
        run=RunConfig(folder=str(folder / "runs"), name="tuned"),
        cluster=ClusterConfig(num_workers=0),
    )


@pytest.fixture(scope="module")
def alone(base: Config) -> dict[str, Any]:
    return evaluate(base)


def predictions(base: Config, frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, label and distance of each point, straight from the network."""
    sample = scan_sample(frame, base.data, student="minkunet14", seed=0, epoch=0, training=False)
    model = MinkUNet14(1, 17, normalize=False, width=0.25)
    model.load_state_dict(torch.load(str(base.evaluation.checkpoint), weights_only=True)["model_points"])
    batched = np.insert(sample.coordinates, 0, 0, axis=1)
    with torch.no_grad():
        x = SparseTensor(torch.from_numpy(sample.features), torch.from_numpy(batched))
        scores = model.eval()(x).features.numpy()
    return 1 + scores[sample.voxel_of_point, 1:].argmax(1), sample.point_labels, sample.distance


def test_scores_are_those_of_all_points_in_memory(base: Config, frames: list[Frame], alone: dict[str, Any]) -> None:
    predicted, truth, distance = (np.concatenate(x) for x in zip(*(predictions(base, f) for f in frames), strict=True))
    scores = alone["evaluation"]
    counted = truth != 0
    assert scores["frames"] == 3
    assert scores["points"] == counted.sum()
    assert scores["accuracy"] == pytest.approx((predicted == truth)[counted].mean())
    absent, weighted, ious = [], 0.0, []
    for cls, name in enumerate(NUSCENES_CLASSES):
        if cls == 0:
            continue
        mine, yours = predicted[counted] == cls, truth[counted] == cls
        if not (mine | yours).any():
            absent.append(name)
            assert scores["iou"][name] is None
            continue
        ious.append((mine & yours).sum() / (mine | yours).sum())
        weighted += ious[-1] * yours.mean()
        assert scores["iou"][name] == pytest.approx(ious[-1])
    assert scores["absent"] == absent
    assert scores["miou"] == pytest.approx(np.mean(ious))
    assert scores["fwiou"] == pytest.approx(weighted)
    near = ConfusionMatrix(17)
    near.update(predicted[distance < 20], truth[distance < 20])
    assert scores["by_distance"]["0-20 m"]["miou"] == pytest.approx(near.miou())
    assert sum(band["points"] for band in scores["by_distance"].values()) == scores["points"]
    assert scores["miou_interval_95"] is None
    assert scores["why_no_interval"] == "3 frames with labelled points; an interval takes at least 10"


@pytest.mark.ray
def test_two_workers_equal_one_on_an_odd_number_of_frames(
    base: Config, alone: dict[str, Any], ray_cluster: None, tmp_path: Path
) -> None:
    config = replace(base, cluster=ClusterConfig(num_workers=2))
    wanted = replace(config.evaluation, submission=str(tmp_path / "predictions"))
    result = evaluate(replace(config, evaluation=wanted))
    assert result["evaluation"] == alone["evaluation"]
    assert len(list((tmp_path / "predictions" / "lidarseg" / "val").glob("*_lidarseg.bin"))) == 3


def test_the_scores_are_written_as_json_a_page_and_a_picture(alone: dict[str, Any]) -> None:
    as_json, page, picture = (Path(path) for path in alone["files"])
    assert json.loads(as_json.read_text()) == alone["evaluation"]
    text = page.read_text()
    for name, value in alone["evaluation"]["iou"].items():
        assert f"| {name} | {'–' if value is None else f'{100 * value:.1f}'} |" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_evaluation_is_done_once_another_checkpoint_has_its_own(
    base: Config, alone: dict[str, Any], tmp_path: Path
) -> None:
    assert evaluate(base) == alone
    torch.manual_seed(1)
    torch.save({"model_points": MinkUNet14(1, 17, width=0.25).state_dict()}, tmp_path / "student.pt")
    other = evaluate(replace(base, evaluation=replace(base.evaluation, checkpoint=str(tmp_path / "student.pt"))))
    assert other["files"] != alone["files"]


def test_another_frame_table_is_evaluated_anew(
    base: Config, frames: list[Frame], alone: dict[str, Any], tmp_path: Path
) -> None:
    table = str(tmp_path / "frames.parquet")
    write_frames(frames[:2], table)
    other = evaluate(replace(base, data=replace(base.data, frames=table)))
    assert (alone["evaluation"]["frames"], other["evaluation"]["frames"]) == (3, 2)


def test_votes_change_predictions_but_not_what_is_counted(base: Config, alone: dict[str, Any]) -> None:
    voted = evaluate(replace(base, evaluation=replace(base.evaluation, votes=3)))["evaluation"]
    assert voted["points"] == alone["evaluation"]["points"]
    assert voted["frames"] == 3
    assert voted["iou"] != alone["evaluation"]["iou"]


def test_more_votes_than_a_batch_holds_are_taken_of_a_split_smaller_than_they_are(base: Config) -> None:
    five = replace(base, evaluation=replace(base.evaluation, votes=5), cluster=ClusterConfig(num_workers=2))
    config = evaluation_config(five)
    assert config.data.val_batch_size == 5
    train_plan(EvaluateStage().source(config))  # refuses a split that is smaller than a training batch
    alone = evaluate(replace(five, cluster=ClusterConfig(num_workers=0)))
    assert alone["evaluation"]["frames"] == 3


@pytest.mark.parametrize("votes", [1, 2])
def test_how_many_sweeps_share_a_pass_changes_no_score(base: Config, votes: int) -> None:
    voting = replace(base, evaluation=replace(base.evaluation, votes=votes))
    scores = []
    for size, expected in ((1, votes), (5, 5 if votes == 1 else 4)):
        config = replace(voting, data=replace(voting.data, val_batch_size=size))
        assert evaluation_config(config).data.val_batch_size == expected
        scores.append(evaluate(config)["evaluation"])
    assert scores[0] == scores[1]


def test_an_unlabelled_split_gives_a_submission_and_no_scores(
    base: Config, frames: list[Frame], tiny_world: Path, tmp_path: Path
) -> None:
    table = str(tmp_path / "frames.parquet")
    write_frames([replace(frames[0], splits=("test",), label_path=None)], table)
    config = replace(base, data=replace(base.data, frames=table))
    test = replace(base.evaluation, split="test")
    with pytest.raises(ConfigError, match=r"evaluation\.submission"):
        evaluate(replace(config, evaluation=test))
    result = evaluate(replace(config, evaluation=replace(test, submission=str(tmp_path / "out"))))
    assert "evaluation" not in result
    written = np.fromfile(tmp_path / "out/lidarseg/test" / f"{frames[0].lidar_token}_lidarseg.bin", np.uint8)
    assert np.array_equal(written, predictions(base, frames[0])[0])
    assert (tmp_path / "out/test/submission.json").exists()
    assert result["submission_lacks"].startswith("150 of 150 scenes: ")  # the frame is of a scene of val


def test_a_submission_that_lost_a_file_is_written_again_and_a_whole_one_is_not(base: Config, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    config = replace(base, evaluation=replace(base.evaluation, submission=str(folder)))
    first = evaluate(config)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert len(files) == 3 + 1
    for lost in (next(path for path in files if path.suffix == ".bin"), folder / "val" / "submission.json"):
        lost.unlink()
        run = folder_of(evaluation_config(config))
        with launching(run), pytest.raises(RunError, match="in use"):
            evaluate(config)
        assert run.result() is not None  # of whoever is at it
        again = evaluate(config)
        assert again["evaluation"] == first["evaluation"]
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    written = {path: path.stat().st_mtime_ns for path in files}
    assert evaluate(config) == again
    assert {path: path.stat().st_mtime_ns for path in files} == written


def test_a_checkpoint_of_another_number_of_classes_is_refused_by_file_and_numbers(base: Config, tmp_path: Path) -> None:
    path = tmp_path / "kitti.pt"
    torch.save({"model_points": MinkUNet14(1, 20, width=0.25).state_dict()}, path)
    with pytest.raises(WeightsError, match=r"kitti\.pt.*20 outputs \(classes\), the model's has 17"):
        evaluate(replace(base, evaluation=replace(base.evaluation, checkpoint=str(path))))


def test_a_checkpoint_made_with_other_voxels_is_refused_by_file_and_values(base: Config, tmp_path: Path) -> None:
    path = tmp_path / "cartesian.pt"
    state = MinkUNet14(1, 17, width=0.25).state_dict()
    torch.save({"model_points": state, "config": {"voxel_size": 0.1, "cylindrical_coordinates": False}}, path)
    with pytest.raises(WeightsError, match=r"cartesian\.pt.*cylindrical_coordinates False, this run has True"):
        evaluate(replace(base, evaluation=replace(base.evaluation, checkpoint=str(path))))


def test_without_a_checkpoint_there_is_nothing_to_evaluate(base: Config) -> None:
    with pytest.raises(ConfigError, match="--checkpoint PATH"):
        evaluate(replace(base, evaluation=EvaluationConfig()))


def test_the_command_line_takes_the_checkpoint_and_shows_the_page(
    base: Config, alone: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(replace(base, evaluation=replace(base.evaluation, checkpoint=None))))
    assert main(["evaluate", str(path), "--checkpoint", str(base.evaluation.checkpoint)]) == 0
    assert f"| mIoU | {100 * alone['evaluation']['miou']:.1f} |" in capsys.readouterr().err
    assert main(["evaluate", str(path)]) == 1
    assert "--checkpoint PATH" in capsys.readouterr().err
