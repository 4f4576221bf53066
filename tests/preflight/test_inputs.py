"""Whether what a job reads is there and whole."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from preflight_cases import by_name, finetuning

from slidr.cluster.evaluate import evaluation_config
from slidr.cluster.finetune import finetune
from slidr.cluster.superpixels import folder_of
from slidr.config import Config, TuneConfig
from slidr.data.frames import FrameTable, write_frames
from slidr.data.storage import DataError
from slidr.models.download import student_location
from slidr.preflight import checks, inputs
from slidr.preflight.findings import Finding


def test_weights_that_are_not_where_the_config_says_are_an_error_and_a_download_to_come_a_warning(
    prepared: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDR_CACHE", str(tmp_path))

    def found(student: str | None, teacher: str | None, search: bool = False) -> list[str]:
        config = replace(
            prepared,
            student=replace(prepared.student, weights=student),
            teacher=replace(prepared.teacher, name="dilation_resnet50", weights=teacher),
        )
        return [finding.status for finding in inputs.weights(config, search)]

    there, damaged, none = tmp_path / "weights.pt", tmp_path / "damaged.pt", tmp_path / "none.pt"
    state = {"conv0p1s1.kernel": torch.ones(125, 1, 8), "module.encoder_q.conv1.weight": torch.ones(64)}
    torch.save({"state_dict": state}, there)
    whole = there.read_bytes()
    damaged.write_bytes(whole.replace(torch.ones(64).numpy().tobytes(), torch.zeros(64).numpy().tobytes(), 1))
    assert found(None, None) == []
    assert found(str(there), str(there)) == ["ok", "ok"]
    assert found(str(damaged), str(damaged)) == ["error", "error"]
    torch.save({"state_dict": {name: value * torch.nan for name, value in state.items()}}, damaged)
    assert found(str(damaged), str(damaged)) == ["error", "error"]
    os.mkfifo(tmp_path / "fifo")
    for odd in (tmp_path, tmp_path / "fifo", "/dev/zero"):
        assert found(str(odd), str(odd)) == ["error", "error"]
    assert found(str(none), str(none)) == ["error", "error"]
    assert found(None, "moco_v2") == ["warning"]
    assert found(None, "pixpro") == ["error"]  # nobody publishes it
    assert found(None, None, search=True) == ["error"]
    (cached := tmp_path / "weights" / "moco_v2_800ep_pretrain.pth.tar").parent.mkdir()
    cached.write_bytes(whole)
    assert found(None, "moco_v2") == ["ok"]
    assert [finding.name for finding in inputs.weights(finetuning(prepared))] == []  # no teacher


def test_weights_at_a_url_are_a_download_to_come_without_its_secrets_and_ok_once_they_are_there(
    prepared: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDR_CACHE", str(tmp_path))
    url = "https://host.example/folder/s.pt?X-Amz-Signature=hush"
    config = replace(
        prepared,
        student=replace(prepared.student, weights=url),
        teacher=replace(prepared.teacher, name="dilation_resnet50", weights=url),
    )
    findings = list(inputs.weights(config))
    assert [(finding.name, finding.status) for finding in findings] == [("student", "warning"), ("teacher", "warning")]
    text = str(findings)
    assert "https://host.example/folder/s.pt" in text
    assert "each node that trains downloads it into its own cache" in text
    assert "hush" not in text
    path, _ = student_location(url)
    assert path in text
    Path(path).parent.mkdir()
    state = {"conv0p1s1.kernel": torch.ones(125, 1, 8), "encoder_q.conv1.weight": torch.ones(64)}
    torch.save({"state_dict": state}, path)
    assert [finding.status for finding in inputs.weights(config)] == ["ok", "ok"]
    assert "hush" not in str(list(inputs.weights(config)))


def test_a_frame_table_that_is_missing_or_has_no_such_split_is_an_error(spoilable: Config) -> None:
    finding = inputs.frame_table(replace(spoilable, data=replace(spoilable.data, val_split="mini_val")))
    assert finding.status == "error"
    assert "no frame is in split mini_val" in finding.what
    Path(spoilable.data.frames).unlink()
    finding = inputs.frame_table(spoilable)
    assert (finding.status, finding.next) == ("error", "slidr frames CONFIG")
    assert {f.status for f in checks.thorough(spoilable)} == {"ok"}  # nothing more can be said without a table


@pytest.mark.parametrize("damage", ["missing", "truncated sweep", "other size", "no image", "half an image"])
def test_damage_in_the_data_root_is_named(spoilable: Config, damage: str) -> None:
    frame = FrameTable.open(spoilable.data.frames)[0]
    root = Path(spoilable.data.root)
    image, sweep = root / frame.cameras[2].image_path, root / frame.lidar_path
    other = root / frame.cameras[1].image_path
    assert (
        inputs.data_root(spoilable, 2, inputs.PRETRAINING).status
        == inputs.listing(spoilable, inputs.PRETRAINING).status
        == "ok"
    )
    hurt = image
    if damage == "missing":
        image.unlink()
    elif damage == "truncated sweep":
        hurt = sweep
        sweep.write_bytes(sweep.read_bytes()[:-3])
    elif damage == "other size":
        Image.open(other).resize((16, 9)).save(image)
    elif damage == "no image":
        image.write_bytes(b"<html>")
    else:
        image.write_bytes(image.read_bytes()[:600])
    found = inputs.data_root(spoilable, 2, inputs.PRETRAINING)
    assert found.status == "error"
    assert str(hurt) in found.what
    assert inputs.listing(spoilable, inputs.PRETRAINING).status == ("error" if damage == "missing" else "ok")


def test_superpixels_are_cut_without_sweeps_and_of_the_images_that_are_whole(spoilable: Config) -> None:
    table = FrameTable.open(spoilable.data.frames)
    for sweep in table.lidar_paths:
        Path(spoilable.data.root, sweep).unlink()
    assert inputs.data_root(spoilable, 2, inputs.SUPERPIXELS).status == "ok"
    assert inputs.data_root(spoilable, 2, inputs.PRETRAINING).status == "error"
    first = Path(spoilable.data.root, table.select("parametrize")[0].cameras[0].image_path)
    first.write_bytes(b"")
    found = inputs.data_root(spoilable, 2, inputs.SUPERPIXELS)
    assert (found.status, found.what) == (
        "warning",
        f"{first}: is truncated, damaged or not an image (the file is empty); copy the file again",
    )
    for image in Path(spoilable.data.root).rglob("*.jpg"):
        image.unlink()
    assert inputs.data_root(spoilable, 2, inputs.SUPERPIXELS).status == "error"  # another data set's root


def test_a_data_root_that_is_not_there_is_named_itself_with_and_without_a_frame_table(spoilable: Config) -> None:
    nowhere = replace(spoilable, data=replace(spoilable.data, root="/nowhere"))
    for config in (nowhere, replace(nowhere, data=replace(nowhere.data, frames="/nowhere/frames.parquet"))):
        found = by_name(checks.cheap(config))["data root"]
        assert (found.status, found.what) == ("error", "data.root: /nowhere: no such folder, or empty")


def test_several_damaged_files_are_named(spoilable: Config) -> None:
    frame = FrameTable.open(spoilable.data.frames).select("parametrize")[0]
    hurt = [camera.image_path for camera in frame.cameras]
    for image in hurt:
        Path(spoilable.data.root, image).unlink()
    for finding in (
        inputs.data_root(spoilable, 2, inputs.PRETRAINING),
        inputs.listing(spoilable, inputs.PRETRAINING),
    ):
        assert sum(image in finding.what for image in hurt) == 5
        assert "(and 1 more)" in finding.what


def test_only_the_cameras_that_are_asked_for_are_looked_at(spoilable: Config) -> None:
    front, *others = spoilable.data.cameras
    rear = FrameTable.open(spoilable.data.frames).images(tuple(others[-1:]))
    Path(spoilable.data.root, rear[0].path).unlink()
    found = inputs.data_root(spoilable, 2, inputs.SUPERPIXELS)
    assert (found.status, rear[0].path in found.what) == ("warning", True)  # five of six cameras can be done
    for image in FrameTable.open(spoilable.data.frames).images(tuple(others)):
        Path(spoilable.data.root, image.path).unlink(missing_ok=True)
    assert inputs.data_root(spoilable, 2, inputs.PRETRAINING).status == "error"
    alone = replace(spoilable, data=replace(spoilable.data, cameras=(front,)))
    for needs in (inputs.PRETRAINING, inputs.SUPERPIXELS):
        assert inputs.data_root(alone, 2, needs).status == inputs.listing(alone, needs).status == "ok"


def test_fine_tuning_looks_for_labels_and_needs_no_image(spoilable: Config) -> None:
    config = replace(finetuning(spoilable), tune=TuneConfig(methods=("random",)))
    shutil.rmtree(folder_of(config.superpixels))
    for image in Path(config.data.root).rglob("*.jpg"):
        image.unlink()
    for stage in (None, "finetune", "tune"):
        assert {f.name: f.what for f in checks.cheap(config, stage) if f.status != "ok"} == {}
    assert {f.name: f.what for f in checks.thorough(config) if f.status != "ok"} == {}
    assert by_name(checks.cheap(config, "superpixels"))["data root"].status == "error"  # that job cuts images
    table = FrameTable.open(config.data.frames)
    frame = table.select("parametrize")[0]
    labels = Path(config.data.root, str(frame.label_path))
    points = labels.stat().st_size
    labels.write_bytes(b"\x18" * (points - 1))
    found = by_name(checks.cheap(config, "finetune"))["data root"]
    assert found.status == "error"
    assert f"{labels}: holds {points - 1} labels for a sweep of {points} points" in found.what
    labels.unlink()
    assert str(labels) in by_name(checks.cheap(config, "finetune"))["data root"].what
    assert by_name(checks.thorough(config))["files"].status == "error"


def test_a_frame_without_labels_stops_fine_tuning_before_it_starts(spoilable: Config) -> None:
    config = finetuning(spoilable)
    frames = list(FrameTable.open(config.data.frames))
    blind = [replace(f, label_path=None) if {"verify", "test"} & set(f.splits) else f for f in frames]
    write_frames(blind, config.data.frames)
    first = next(frame for frame in blind if frame.label_path is None)
    finding = by_name(checks.cheap(config, "finetune"))["labels"]
    assert finding.status == "error"
    for what in (first.lidar_path, first.token, "2 of 2 frames of verify"):
        assert what in finding.what
    with pytest.raises(DataError, match=r"2 of 2 frames of verify"):
        finetune(config, progress=False)
    assert not Path(config.run.folder).exists()


def test_an_evaluation_looks_for_the_labels_of_its_split_where_it_has_some(spoilable: Config) -> None:
    config = finetuning(spoilable)
    torch.save({"model_points": {}}, str(config.evaluation.checkpoint))
    frames = list(FrameTable.open(config.data.frames))
    val = [frame for frame in frames if "val" in frame.splits]
    blind = [
        replace(f, token=f"blind-{f.token}", scene=f"blind-{f.scene}", label_path=None, splits=("test",)) for f in val
    ]
    write_frames([*frames, *blind], config.data.frames)
    Path(config.data.root, str(val[0].label_path)).unlink()

    def findings(split: Literal["val", "verify", "test"]) -> dict[str, Finding]:
        wanted = replace(config.evaluation, split=split, submission="predictions")
        return by_name(checks.cheap(evaluation_config(replace(config, evaluation=wanted)), "evaluate"))

    assert findings("verify")["data root"].status == "ok"
    assert findings("val")["data root"].status == "error"
    assert findings("test")["data root"].status == "ok"
    assert "labels" not in findings("test")
    assert "disk: run.folder" not in findings("val")


def test_superpixels_that_are_missing_stop_training_and_are_a_warning_before(spoilable: Config) -> None:
    assert inputs.superpixels(spoilable, 2, needed=True).status == "ok"
    shutil.rmtree(folder_of(spoilable.superpixels))
    assert inputs.superpixels(spoilable, 2, needed=True).status == "error"
    early = inputs.superpixels(spoilable, 2, needed=False)
    assert (early.status, early.next) == ("warning", "slidr superpixels CONFIG")
    assert "0 of 36 maps" in inputs.all_superpixels(spoilable).what
