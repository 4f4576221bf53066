"""All checks together: the doctor's page and exit status, and the look around before a job."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from preflight_cases import by_name, finetuning

from slidr import cli
from slidr.cluster.superpixels import folder_of
from slidr.config import ClusterConfig, Config, TuneConfig, dump
from slidr.data.frames import FrameTable
from slidr.preflight import checks, doctor, inputs, machine
from slidr.preflight.doctor import PreflightError, preflight
from slidr.stages import console


def test_a_world_with_everything_in_place_is_well_in_every_line(prepared: Config) -> None:
    for findings in (checks.cheap(prepared), checks.cheap(prepared, "pretrain"), checks.thorough(prepared)):
        assert {f.name: f.what for f in findings if f.status != "ok"} == {}


def test_a_search_needs_room_for_one_job_which_loads_its_own_samples(prepared: Config) -> None:
    config = finetuning(replace(prepared, cluster=ClusterConfig(num_workers=1, local_cpus=1)))
    refused = {finding.name: finding.status for finding in checks.cheap(config, "finetune")}
    assert refused["cluster"] == "error"
    assert by_name(checks.cheap(config, "tune"))["cluster"].status == "ok"
    searched = replace(config, tune=TuneConfig(trials=3))
    assert by_name(checks.cheap(searched))["cluster"].what == "this machine, as 1 CPUs: holds a job of the search"
    assert by_name(checks.thorough(searched))["cluster"].status == "ok"
    large = replace(searched, cluster=replace(config.cluster, cpus_per_worker=2))
    assert by_name(checks.cheap(large))["cluster"].status == "error"


def test_the_doctors_exit_status_is_for_scripts_and_json_holds_every_line(
    spoilable: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(spoilable))
    assert cli.main(["doctor", str(path)]) == 0
    printed = capsys.readouterr().out
    assert cli.main(["doctor", str(path), "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert {line["status"] for line in lines} == {"ok"}
    for line in lines:
        assert line["name"] in printed
    shutil.rmtree(folder_of(spoilable.superpixels))
    assert cli.main(["doctor", str(path)]) == 0  # a warning
    assert "next: slidr superpixels CONFIG" in capsys.readouterr().out
    assert cli.main(["doctor", str(path), "--data.root", str(tmp_path / "none")]) == 1
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "--data.root", "x"]) == 2


def test_jobs_look_around_first_and_stop_at_errors_without_starting_ray(
    spoilable: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from slidr import stages

    monkeypatch.setattr(machine.session, "start", lambda cluster: pytest.fail("Ray was started"))
    preflight(spoilable, "pretrain", console)
    shutil.rmtree(folder_of(spoilable.superpixels))
    preflight(spoilable, "superpixels", console)
    with pytest.raises(PreflightError, match="slidr superpixels CONFIG"):
        stages.run_pretraining(spoilable)
    image = FrameTable.open(spoilable.data.frames)[0].cameras[0].image_path
    (Path(spoilable.data.root) / image).write_bytes(b"")
    with pytest.raises(PreflightError, match="is truncated, damaged or not an image"):
        preflight(spoilable, "pretrain", console)


def test_maps_that_are_missing_and_cannot_be_written_are_an_error(spoilable: Config, tmp_path: Path) -> None:
    assert by_name(checks.thorough(spoilable))["superpixels"].status == "ok"
    maps = Path(folder_of(spoilable.superpixels))
    next(maps.glob("*.png")).unlink()
    assert by_name(checks.thorough(spoilable))["superpixels"].status == "warning"
    (tmp_path / "file").write_text("")
    blocked = replace(spoilable, superpixels=replace(spoilable.superpixels, folder=str(tmp_path / "file" / "maps")))
    found = by_name(checks.thorough(blocked))["superpixels"]
    assert (found.status, "another superpixels.folder" in found.next) == ("error", True)


def test_tables_are_not_read_for_a_frame_table_that_cannot_be_written(prepared: Config, tmp_path: Path) -> None:
    from slidr import stages

    (tmp_path / "file").write_text("")
    blocked = replace(prepared, data=replace(prepared.data, root="nowhere", frames=f"{tmp_path}/file/frames.parquet"))
    with pytest.raises(PreflightError, match=r"data\.frames: .*file: cannot be written"):
        stages.make_frames(blocked)


def test_superpixels_are_cut_where_nothing_could_be_trained(
    prepared: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a machine of few CPUs without a GPU, by a config for one with many: the published ones are."""
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: False)
    config = replace(
        prepared,
        cluster=ClusterConfig(use_gpu=True, loader_cpus=64, local_cpus=1),
        student=replace(prepared.student, weights=str(tmp_path / "none.pt")),
        tracking=replace(prepared.tracking, uri="http://127.0.0.1:1"),
    )
    with pytest.raises(PreflightError, match="but no GPU"):
        preflight(config, "pretrain", console)
    assert {f.name: f.what for f in checks.cheap(config, "superpixels") if f.status != "ok"} == {}


def test_the_look_around_opens_a_handful_of_files_however_large_the_table(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[object] = set()
    real = inputs.storage.read_bytes
    monkeypatch.setattr(inputs.storage, "read_bytes", lambda path, *limit: opened.add(path) or real(path, *limit))
    checks.cheap(prepared, "pretrain")
    assert 0 < len([path for path in opened if "samples" in str(path)]) <= inputs.FEW * 7
    assert doctor.cheap is checks.cheap
