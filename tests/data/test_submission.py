"""Predictions in the benchmarks' formats, read back by the benchmarks' own rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidr.data.images import read_point_labels
from slidr.data.labels import NUSCENES_CLASSES, SEMANTIC_KITTI_CLASSES, classes_of
from slidr.data.nuscenes import read_frames as read_nuscenes
from slidr.data.semantic_kitti import read_frames as read_kitti
from slidr.data.storage import DataError
from slidr.data.submission import Submission
from slidr.types import Frame

KITTI = len(SEMANTIC_KITTI_CLASSES)


def test_nuscenes_submission_passes_the_devkits_validator_and_a_short_file_does_not(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nuscenes import NuScenes
    from nuscenes.eval.lidarseg import utils
    from nuscenes.eval.lidarseg.validate_submission import validate_submission

    devkit = NuScenes(version="v1.0-trainval", dataroot=str(tiny_world), verbose=False)
    # The validator asks for every scene of the split; the world has a few of them.
    official, own = utils.create_splits_scenes(), {scene["name"] for scene in devkit.scene}
    splits = {name: [scene for scene in scenes if scene in own] for name, scenes in official.items()}
    monkeypatch.setattr(utils, "create_splits_scenes", lambda verbose=False: splits)
    submission = Submission("nuscenes", str(tmp_path), "val")
    rng = np.random.default_rng(0)
    for frame in read_nuscenes(tiny_world, "v1.0-trainval"):
        if "val" in frame.splits:
            points = (tiny_world / frame.lidar_path).stat().st_size // 20
            path = submission.write(frame, rng.integers(1, len(NUSCENES_CLASSES), points))
    with pytest.raises(AssertionError, match=r"folder containing the submission\.json"):
        validate_submission(devkit, str(tmp_path), "val")
    submission.close()
    validate_submission(devkit, str(tmp_path), "val")
    Path(path).write_bytes(Path(path).read_bytes()[:-1])
    with pytest.raises(AssertionError, match="predictions"):
        validate_submission(devkit, str(tmp_path), "val")


def test_semantic_kitti_predictions_have_the_benchmarks_place_and_size_and_read_back_as_classes(
    real_semantic_kitti: Path, tmp_path: Path
) -> None:
    submission = Submission("semantic_kitti", str(tmp_path), "train")
    frames = read_kitti(str(real_semantic_kitti))
    for frame in frames:
        points = (real_semantic_kitti / frame.lidar_path).stat().st_size // 16
        assert frame.label_path is not None
        truth = real_semantic_kitti / frame.label_path
        classes = classes_of(read_point_labels(truth, np.uint32, points), "semantic_kitti")
        known = np.where(classes > 0, classes, 1)  # a prediction is never the ignored class
        path = Path(submission.write(frame, known))
        assert path == tmp_path / "sequences/00/predictions" / f"{truth.stem}.label"
        assert path.stat().st_size == truth.stat().st_size
        back = classes_of(read_point_labels(path, np.uint32, points), "semantic_kitti")
        assert np.array_equal(back, known)
    submission.close()
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".label"}
    assert submission.missing(frames) == []
    path.unlink()
    assert submission.missing(frames) == [str(path)]


def test_every_class_of_semantic_kitti_survives_the_round_trip(real_semantic_kitti: Path, tmp_path: Path) -> None:
    frame = read_kitti(str(real_semantic_kitti))[0]
    classes = np.arange(1, KITTI)
    raw = np.fromfile(Submission("semantic_kitti", str(tmp_path), "test").write(frame, classes), np.uint32)
    assert np.array_equal(classes_of(raw, "semantic_kitti"), classes)
    # Every one as the benchmark's own inverse map has it: never a moving object's label.
    assert raw.max() < 252


@pytest.mark.parametrize("wrong", [0, KITTI])
def test_classes_that_the_benchmark_does_not_take_are_refused(
    wrong: int, real_semantic_kitti: Path, tmp_path: Path
) -> None:
    frame = read_kitti(str(real_semantic_kitti))[0]
    submission = Submission("semantic_kitti", str(tmp_path), "test")
    with pytest.raises(ValueError, match=rf"000000\.label.*{wrong}.*takes 1 to 19"):
        submission.write(frame, np.array([1, wrong, 1]))
    assert not list(tmp_path.rglob("*.label"))


def test_nuscenes_declares_that_only_the_lidar_was_used(tmp_path: Path) -> None:
    Submission("nuscenes", str(tmp_path), "test").close()
    declared = json.loads((tmp_path / "test/submission.json").read_text())["meta"]
    assert [name for name, used in declared.items() if used] == ["use_lidar"]


def test_a_token_that_names_no_scan_has_no_place_in_a_submission(world_frames: list[Frame], tmp_path: Path) -> None:
    submission = Submission("semantic_kitti", str(tmp_path), "val")
    for token in ("000123", "08/000123/x"):
        with pytest.raises(DataError, match=rf"frame '{token}': expected a token as 08/000123"):
            submission.path_of(replace(world_frames[0], token=token))


@pytest.mark.parametrize("token", ["", "log/7", "../7", ".7"])
def test_a_sweep_token_that_names_no_file_has_no_place_in_a_submission(
    world_frames: list[Frame], tmp_path: Path, token: str
) -> None:
    submission = Submission("nuscenes", str(tmp_path), "val")
    with pytest.raises(DataError, match=rf"lidar_token '{token}' (is empty|cannot name a file)"):
        submission.write(replace(world_frames[0], lidar_token=token), np.array([1]))
    assert not list(tmp_path.rglob("*.bin"))
