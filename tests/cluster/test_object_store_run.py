"""The whole way with everything in an object store: data root, frame table, superpixels, runs, results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import torch
from training_runs import named

from slidr import stages
from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.config import Config, LossConfig, OptimConfig, StudentConfig, TrackingConfig, TuneConfig
from slidr.data import storage
from slidr.data.loading import PairSource
from slidr.models.files import read_checkpoint
from slidr.preflight import checks, outputs
from slidr.training.checkpoint import CheckpointFolder
from slidr.training.runs import RunFolder

pytestmark = pytest.mark.ray
IMAGES = 3 * 2 * 6  # scenes of parametrize and verify, keyframes, cameras


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are then taken in the same order in every run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def remote(base: Config, bucket: str, tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """`base` with every path in the object store; the data root is there, nothing else yet."""
    house = storage.join(bucket, "house")
    for path in (path for path in tiny_world.rglob("*") if path.is_file()):
        target = storage.join(house, "nuscenes", path.relative_to(tiny_world).as_posix())
        storage.write_bytes_atomic(target, path.read_bytes())
    return replace(
        base,
        data=replace(base.data, root=storage.join(house, "nuscenes"), frames=storage.join(house, "frames.parquet")),
        superpixels=replace(base.superpixels, folder=storage.join(house, "superpixels")),
        run=replace(base.run, folder=storage.join(house, "runs"), name="pretrained", keep_checkpoints=2),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlflow.db"),
    )


@pytest.fixture(scope="module")
def prepared(remote: Config) -> Config:
    """With its frame table and superpixels made there."""
    stages.make_frames(remote)
    assert stages.make_superpixels(remote).computed == IMAGES
    return remote


def newest(config: Config) -> dict[str, Any]:
    state = CheckpointFolder(storage.join(config.run.folder, config.run.name, "checkpoints")).newest()
    assert state is not None
    return state


def keys(uri: str) -> list[str]:
    """Every key below a folder of the store."""
    filesystem, path = storage.filesystem(uri)
    assert filesystem is not None
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    return [info.path.removeprefix(path) for info in found if info.is_file]


def test_superpixels_in_a_store_are_those_of_this_machine_and_made_once(base: Config, prepared: Config) -> None:
    here, there = superpixel_folder(base.superpixels), superpixel_folder(prepared.superpixels)
    names = storage.list_names(there)
    maps = {name for name in names if name.endswith(".png")}
    assert (len(maps), names - maps) == (IMAGES, {"parameters.json", "manifest.json"})
    for name in names - {"manifest.json"}:
        assert storage.read_bytes(storage.join(there, name)) == storage.read_bytes(storage.join(here, name))
    again = stages.make_superpixels(prepared)
    assert (again.computed, again.skipped) == (0, IMAGES)


def test_a_run_that_breaks_off_and_resumes_in_a_store_ends_as_one_undisturbed_on_this_machine(
    base: Config, prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = named(base, "beside-the-store")
    expected = pretrain(undisturbed, progress=False)
    real_sample, made = PairSource.sample, 0

    def dying_sample(self: Any, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 18:  # in step 7; the newest checkpoint is step 6's
            raise KeyboardInterrupt
        return real_sample(self, *arguments)

    monkeypatch.setattr(PairSource, "sample", dying_sample)
    with pytest.raises(KeyboardInterrupt):
        stages.run_pretraining(prepared)
    monkeypatch.undo()
    assert 0 < newest(prepared)["step"] < 10
    result = stages.run_pretraining(replace(prepared, run=replace(prepared.run, resume=True)))
    for name in ("loss", "val_loss", "retrieval", "retrieval_untrained", "steps"):
        assert result.get(name) == expected.get(name), name
    ours, theirs = newest(prepared)["student"], newest(undisturbed)["student"]
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    folder = storage.join(prepared.run.folder, "pretrained")
    assert result["student"] == storage.join(folder, "student.pt")
    assert RunFolder(folder).result() == result
    assert storage.read_bytes(result["picture"])[:4] == b"\x89PNG"
    steps = [name for name in storage.list_names(storage.join(folder, "checkpoints")) if name.startswith("step-")]
    assert len(steps) == 2  # run.keep_checkpoints


def test_fine_tuning_starts_from_a_student_in_a_store_and_is_scored_there(prepared: Config, tmp_path: Path) -> None:
    student = storage.join(prepared.run.folder, "pretrained", "student.pt")
    tuning = replace(
        prepared,
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=17, weights=student),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=OptimConfig(name="adamw", lr=1e-2, epochs=1, batch_size=2),
        run=replace(prepared.run, name="tuned"),
    )
    tuned = stages.run_finetuning(tuning)
    assert tuned["student"].startswith("s3://")
    predictions = storage.join(prepared.run.folder, "predictions")
    evaluated = stages.run_evaluation(
        replace(
            tuning,
            evaluation=replace(
                tuning.evaluation, checkpoint=tuned["student"], split="val", bootstrap=20, submission=predictions
            ),
        )
    )
    assert all(path.startswith("s3://") and storage.exists(path) for path in evaluated["files"])
    assert len([key for key in keys(predictions) if key.endswith("_lidarseg.bin")]) == 2
    copy = tmp_path / "student.pt"
    copy.write_bytes(storage.read_bytes(tuned["student"]))
    local = stages.run_evaluation(
        replace(
            tuning,
            evaluation=replace(tuning.evaluation, checkpoint=str(copy), split="val", bootstrap=20),
            run=replace(tuning.run, folder=str(tmp_path)),
        )
    )
    assert evaluated["evaluation"] == local["evaluation"]


def test_a_search_leaves_its_tables_in_a_store_and_in_mlflow(prepared: Config, tmp_path: Path) -> None:
    from mlflow.artifacts import list_artifacts

    tables = storage.join(prepared.run.folder, "tables")
    searched = replace(
        prepared,
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=17),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=OptimConfig(name="adamw", lr=1e-2, epochs=1, batch_size=2),
        evaluation=replace(prepared.evaluation, bootstrap=20),
        run=replace(prepared.run, folder=str(tmp_path), name="search"),
        tune=TuneConfig(
            fractions=(1.0,),
            methods=("random",),
            trials=1,
            seeds=1,
            results=tables,
            fresh=True,
        ),
    )
    storage.write_bytes_atomic(storage.join(tables, "table.md"), b"an earlier search's")
    result = stages.run_search(searched)
    beside = storage.list_names(prepared.run.folder)
    (aside,) = (storage.join(prepared.run.folder, name) for name in beside if name.startswith("tables.before-"))
    assert storage.read_bytes(storage.join(aside, "table.md")) == b"an earlier search's"
    names = {"table.md", "table.json", "trials.parquet", "rates.png", "fractions.png"}
    assert storage.list_names(tables) == names
    assert {storage.name_of(path) for path in result["files"]} == names
    logged = list_artifacts(run_id=result["mlflow_run_id"], tracking_uri=str(prepared.tracking.uri))
    assert names <= {artifact.path for artifact in logged}


def test_a_student_in_a_store_is_exported_beside_itself(prepared: Config, tmp_path: Path) -> None:
    student = storage.join(prepared.run.folder, "pretrained", "student.pt")
    made = stages.export_student(student, "safetensors")
    assert made == storage.join(prepared.run.folder, "pretrained", "student.safetensors")
    state = read_checkpoint(made)["state_dict"]
    for name, value in read_checkpoint(student)["model_points"].items():
        assert torch.equal(state[name], value)
    elsewhere = tmp_path / "student.safetensors"
    assert stages.export_student(student, "safetensors", elsewhere) == str(elsewhere)
    assert all(torch.equal(value, state[name]) for name, value in read_checkpoint(elsewhere)["state_dict"].items())


def test_the_doctor_finds_everything_in_a_store_and_looks_at_its_clock(prepared: Config) -> None:
    findings = {finding.name: finding for finding in [*checks.cheap(prepared), *checks.thorough(prepared)]}
    assert {name: f.what for name, f in findings.items() if f.status != "ok"} == {}
    assert "off the clock of s3://" in findings["clock"].what
    nowhere = replace(prepared, run=replace(prepared.run, folder=prepared.run.folder.replace("bucket/", "no-bucket/")))
    refused = {finding.name for finding in outputs.folders(nowhere, "pretrain") if finding.status == "error"}
    assert refused == {"run.folder"}


def test_nothing_temporary_is_left_in_the_store_nor_in_this_folder(prepared: Config, bucket: str) -> None:
    house = storage.join(bucket, "house")
    assert len(keys(house)) > IMAGES
    assert [key for key in keys(house) if ".tmp" in key or ".part" in key or "doctor" in key] == []
    assert not Path("s3:").exists()  # a remote path taken for one of this machine would make it
