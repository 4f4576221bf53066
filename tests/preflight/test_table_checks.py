"""What the first look of every job, and the doctor, say of the frame table, its cameras and its sweeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from preflight_cases import by_name, finetuning

from slidr.config import Config
from slidr.data.frames import FrameTable, write_frames
from slidr.data.loading import PairSource, subset_frames
from slidr.data.storage import DataError
from slidr.preflight import checks, inputs
from slidr.preflight.findings import Stage
from slidr.stages import make_frames, make_superpixels, run_pretraining


def _kitti(config: Config) -> Config:
    return replace(config, data=replace(config.data, dataset="semantic_kitti"))


def _with_cameras(config: Config, channels: tuple[str, ...]) -> Config:
    return replace(config, data=replace(config.data, cameras=channels))


@pytest.mark.parametrize("stage", [None, *(stage for stage in get_args(Stage) if stage != "frames")])
def test_another_data_set_is_an_error_of_every_first_look(prepared: Config, stage: Stage | None) -> None:
    found = by_name(checks.cheap(_kitti(prepared), stage))["frames"]
    assert found.status == "error"
    assert "holds frames of nuscenes, but data.dataset is semantic_kitti" in found.what


def test_a_job_that_skips_its_first_look_refuses_it_too(prepared: Config) -> None:
    with pytest.raises(DataError, match=r"holds frames of nuscenes, but data\.dataset is semantic_kitti"):
        subset_frames(_kitti(prepared), "train")


def test_damage_in_columns_that_no_job_has_read_yet_is_an_error_of_the_first_look(spoilable: Config) -> None:
    path = Path(spoilable.data.frames)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    found = by_name(checks.cheap(spoilable, "pretrain"))["frames"]
    assert (found.status, found.next) == ("error", "slidr frames CONFIG")
    assert f"{path}: is not a readable frame table" in found.what


def test_cameras_that_frames_lack_are_an_error_before_any_worker_starts(
    spoilable: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = list(FrameTable.open(spoilable.data.frames))
    first = replace(frames[0], cameras=frames[0].cameras[1:])  # no CAM_FRONT
    write_frames([first, *(replace(f, cameras=f.cameras[:4]) for f in frames[1:])], spoilable.data.frames)
    monkeypatch.setattr("slidr.cluster.session.start", lambda *a, **k: pytest.fail("Ray was started"))
    for job in (run_pretraining, make_superpixels):
        with pytest.raises(RuntimeError, match=r"cameras: .*1 of 6 frames have no CAM_FRONT; 5 of 6 .* CAM_BACK_LEFT"):
            job(spoilable)
    found = inputs.cameras(spoilable)
    assert (found.status, found.next) == ("error", "set data.cameras to those that every frame has")
    assert by_name(checks.cheap(spoilable))["cameras"].status == "error"
    there = _with_cameras(spoilable, ("CAM_FRONT_RIGHT", "CAM_BACK"))
    assert inputs.cameras(there).status == "ok"


def test_frames_without_any_camera_are_an_error_whatever_the_table_allows(spoilable: Config) -> None:
    frames = list(FrameTable.open(spoilable.data.frames))
    write_frames([replace(frame, cameras=()) for frame in frames], spoilable.data.frames, allow_missing="cameras")
    found = inputs.cameras(spoilable)
    assert found.status == "error"
    assert "no frame of these splits has an image of CAM_FRONT, " in found.what
    write_frames([replace(frames[0], cameras=()), *frames[1:]], spoilable.data.frames, allow_missing="cameras")
    found = inputs.cameras(spoilable)
    assert (found.status, "; 1 have none of data.cameras" in found.what) == ("error", True)
    assert "cameras" not in by_name(checks.cheap(finetuning(spoilable), "finetune"))  # it reads no image


def test_a_table_of_a_download_that_is_not_whole_says_so_and_trains_with_the_cameras_there(spoilable: Config) -> None:
    frames = list(FrameTable.open(spoilable.data.frames))
    first = replace(frames[0], cameras=frames[0].cameras[1:4])
    write_frames([first, *frames[1:]], spoilable.data.frames, allow_missing="cameras", left_out="3 images are missing")
    found = by_name(checks.cheap(spoilable, "pretrain"))
    assert (found["frames"].status, found["cameras"].status) == ("warning", "warning")
    assert "of a download that is not whole (cameras): 3 images are missing" in found["frames"].what
    assert "1 of 6 frames have no CAM_FRONT;" in found["cameras"].what
    assert {f.name for f in checks.cheap(spoilable, "pretrain") if f.status == "error"} == set()
    source = PairSource(spoilable, inputs.superpixel_folder(spoilable.superpixels))
    batch = source.collate([source.sample("train", i, 0) for i in (0, 1)])
    assert len(batch.images) == 3 + 6
    assert batch.pixel_index[:, 0].max() < 9


@pytest.mark.parametrize("value", [np.nan, 1e30])
def test_the_doctor_reads_sweeps_as_training_does(spoilable: Config, value: float) -> None:
    path = Path(spoilable.data.root, FrameTable.open(spoilable.data.frames).select("parametrize")[0].lidar_path)
    sweep = np.fromfile(path, np.float32)
    sweep[5 * 17] = value
    path.write_bytes(sweep.tobytes())
    for config in (spoilable, finetuning(spoilable)):
        found = by_name(checks.thorough(config))["data root"]
        assert found.status == "error"
        assert f"{path}: 1 of {len(sweep) // 5} points are" in found.what


def test_a_file_of_both_splits_is_named_once(spoilable: Config) -> None:
    both = replace(spoilable, data=replace(spoilable.data, val_split="parametrize"))
    sweep = FrameTable.open(both.data.frames).select("parametrize")[0].lidar_path
    Path(both.data.root, sweep).write_bytes(b"")
    for config in (both, finetuning(both)):
        needs = inputs.needs_of(config)
        assert inputs.data_root(config, inputs.MANY, needs).what.count(sweep) == 1


def _kitti_world(config: Config, folder: Path, scans: range) -> Config:
    """Sequence 04 with these of its 271 scans, labelled, as the config's data."""
    rng = np.random.default_rng(0)
    for kind in ("velodyne", "labels"):
        (folder / "sequences" / "04" / kind).mkdir(parents=True)
    for scan in scans:
        sweep = np.column_stack([rng.normal(0, 10, (20, 3)), rng.uniform(0, 1, 20)]).astype(np.float32)
        (folder / f"sequences/04/velodyne/{scan:06d}.bin").write_bytes(sweep.tobytes())
        (folder / f"sequences/04/labels/{scan:06d}.label").write_bytes(np.full(20, 40, np.uint32).tobytes())
    data = replace(
        config.data,
        dataset="semantic_kitti",
        root=str(folder),
        frames=str(folder / "frames.parquet"),
        train_split="parametrize",
        val_split="train",
    )
    return replace(finetuning(config), data=data)


def test_scans_that_a_sequence_lacks_are_printed_by_frames_and_a_warning_of_the_doctor(
    prepared: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _kitti_world(prepared, tmp_path / "part", range(270))
    make_frames(config)
    assert "frames: sequence 04 lacks 1 of 271 scans: 000270" in capfd.readouterr().err
    found = by_name(checks.cheap(config))["scans"]
    assert (found.status, found.what) == ("warning", "sequence 04 lacks 1 of 271 scans: 000270")
    whole = _kitti_world(prepared, tmp_path / "whole", range(271))
    make_frames(whole)
    assert "lacks" not in capfd.readouterr().err
    assert by_name(checks.cheap(whole))["scans"].status == "ok"


def test_a_submission_of_a_split_that_is_not_whole_is_a_warning(prepared: Config) -> None:
    config = finetuning(prepared)
    for split, status in (("val", "warning"), ("verify", "ok")):
        wanted = replace(config.evaluation, split=split, submission="predictions")
        found = by_name(inputs.submission(replace(config, evaluation=wanted)))["submission"]
        assert found.status == status
        assert ("it lacks 149 of 150 scenes: " in found.what) == (split == "val")
    assert list(inputs.submission(config)) == []
