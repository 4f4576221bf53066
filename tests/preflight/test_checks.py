"""Each line of the doctor: how it is when all is well, and what it says when not."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from slidr import cli
from slidr.cluster.evaluate import evaluation_config
from slidr.cluster.finetune import finetune
from slidr.cluster.session import Node
from slidr.cluster.superpixels import folder_of
from slidr.config import ClusterConfig, Config, EvaluationConfig, LossConfig, TuneConfig, dump
from slidr.data.frames import FrameTable, write_frames
from slidr.data.storage import DataError
from slidr.preflight import checks, doctor
from slidr.preflight.doctor import PreflightError, preflight
from slidr.sparse.cpu_kernels import Obstacle
from slidr.stages import console

Usage = namedtuple("Usage", "total used free")


def by_name(findings: list[checks.Finding]) -> dict[str, checks.Finding]:
    return {finding.name: finding for finding in findings}


def test_a_world_with_everything_in_place_is_well_in_every_line(prepared: Config) -> None:
    for findings in (checks.cheap(prepared), checks.cheap(prepared, "pretrain"), checks.thorough(prepared)):
        assert {f.name: f.what for f in findings if f.status != "ok"} == {}


def test_only_pythons_that_the_lock_file_is_for_are_well() -> None:
    assert [checks.python(version).status for version in ((3, 11), (3, 12), (3, 10), (3, 13))] == [
        "ok", "ok", "error", "error",
    ]  # fmt: skip


def test_a_pinned_package_of_another_version_is_a_warning_and_a_missing_one_an_error() -> None:
    right = by_name(list(checks.packages(checks._installed)))
    assert {"ray", "mlflow"} <= right.keys()
    assert {finding.status for finding in right.values()} == {"ok"}
    wrong = by_name(list(checks.packages(lambda name: None if name == "mlflow" else "0.1")))
    assert (wrong["ray"].status, wrong["mlflow"].status) == ("warning", "error")
    assert "requirements.lock" in wrong["ray"].next


def test_an_engine_that_is_not_installed_is_an_error(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.cpu_kernels, "obstacle", lambda: None)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert checks.engine(prepared).status == "ok"
    config = replace(prepared, student=replace(prepared.student, engine="minkowski"))
    finding = checks.engine(config)
    assert (finding.status, "build_minkowski.sh .venv/bin/python" in finding.next) == ("error", True)


def test_an_engine_that_could_be_faster_is_a_warning_with_what_would_help_on_this_machine(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for obstacle in (Obstacle("llvmlite is not installed", "pip install llvmlite"), Obstacle("no FMA", "another CPU")):
        monkeypatch.setattr(checks.cpu_kernels, "obstacle", lambda found=obstacle: found)
        finding = checks.engine(prepared)
        assert (finding.status, finding.next) == ("warning", obstacle.next)
        assert obstacle.what in finding.what
    on_gpu = replace(prepared, cluster=replace(prepared.cluster, use_gpu=True))
    assert checks.engine(on_gpu).status == "ok"


def test_a_gpu_that_is_asked_for_here_and_missing_is_an_error(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks.torch.cuda, "is_available", lambda: False)
    wants = replace(prepared, cluster=replace(prepared.cluster, use_gpu=True))
    assert checks.gpu(prepared).status == "ok"
    assert checks.gpu(wants).status == "error"
    elsewhere = replace(wants, cluster=replace(wants.cluster, address="192.0.2.1:6379"))
    assert checks.gpu(elsewhere).status == "ok"


def test_a_machine_without_room_for_workers_and_loader_is_an_error_unless_an_autoscaler_may_come(
    prepared: Config,
) -> None:
    def with_workers(workers: int, **more: float) -> Config:
        return replace(prepared, cluster=ClusterConfig(num_workers=workers, local_cpus=2, **more))  # type: ignore[arg-type]

    assert checks.room(with_workers(1)).status == "ok"
    assert checks.room(with_workers(0)).status == "ok"
    refused = checks.room(with_workers(2))
    assert refused.status == "error"
    assert "need 3 CPUs, the cluster has 2" in refused.what
    assert checks.room(with_workers(2, scale_up_s=60)).status == "warning"


def labelled(config: Config) -> Config:
    """The same data for fine-tuning."""
    student = replace(config.student, out_channels=17)
    return replace(config, loss=LossConfig(names=("cross_entropy_lovasz",)), student=student)


def test_a_search_needs_room_for_one_job_which_loads_its_own_samples(prepared: Config) -> None:
    config = labelled(replace(prepared, cluster=ClusterConfig(num_workers=1, local_cpus=1)))
    refused = {finding.name: finding.status for finding in checks.cheap(config, "finetune")}
    assert refused["cluster"] == "error"
    assert by_name(checks.cheap(config, "tune"))["cluster"].status == "ok"
    searched = replace(config, tune=TuneConfig(trials=3))
    assert by_name(checks.cheap(searched))["cluster"].what == "this machine, as 1 CPUs: holds a job of the search"
    assert by_name(checks.thorough(searched))["cluster"].status == "ok"
    large = replace(searched, cluster=replace(config.cluster, cpus_per_worker=2))
    assert by_name(checks.cheap(large))["cluster"].status == "error"


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
        return [finding.status for finding in checks.weights(config, search)]

    there = tmp_path / "weights.pt"
    there.write_bytes(b"")
    assert found(None, None) == []
    assert found(str(there), str(there)) == ["ok", "ok"]
    assert found(str(tmp_path / "none.pt"), str(tmp_path / "none.pt")) == ["error", "error"]
    assert found(None, "moco_v2") == ["warning"]
    assert found(None, "pixpro") == ["error"]  # nobody publishes it
    assert found(None, None, search=True) == ["error"]
    (cached := tmp_path / "weights" / "moco_v2_800ep_pretrain.pth.tar").parent.mkdir()
    cached.write_bytes(b"")
    assert found(None, "moco_v2") == ["ok"]
    assert [finding.name for finding in checks.weights(labelled(prepared))] == []  # no teacher


def test_a_running_cluster_is_asked_what_it_has(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(prepared, cluster=replace(prepared.cluster, address="auto", num_workers=2))
    monkeypatch.setattr(checks.session, "start", lambda cluster: False)
    monkeypatch.setattr(checks.session, "nodes", lambda: [Node(2), Node(1)])
    assert checks.cluster(config).status == "ok"
    assert "2 nodes, 3 CPUs" in checks.cluster(config).what
    monkeypatch.setattr(checks.session, "nodes", lambda: [Node(1)])
    assert checks.cluster(config).status == "error"


def test_a_cluster_that_does_not_answer_is_an_error(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cluster: ClusterConfig) -> bool:
        raise checks.session.ClusterError("no Ray cluster answers")

    monkeypatch.setattr(checks.session, "start", refuse)
    finding = checks.cluster(replace(prepared, cluster=replace(prepared.cluster, address="auto")))
    assert (finding.status, finding.what) == ("error", "no Ray cluster answers")


def test_a_frame_table_that_is_missing_or_has_no_such_split_is_an_error(spoilable: Config) -> None:
    finding = checks.frame_table(replace(spoilable, data=replace(spoilable.data, val_split="mini_val")))
    assert finding.status == "error"
    assert "no frame is in split mini_val" in finding.what
    Path(spoilable.data.frames).unlink()
    finding = checks.frame_table(spoilable)
    assert (finding.status, finding.next) == ("error", "slidr frames CONFIG")
    assert {f.status for f in checks.thorough(spoilable)} == {"ok"}  # nothing more can be said without a table


@pytest.mark.parametrize("damage", ["missing", "truncated sweep", "other size", "no image", "half an image"])
def test_damage_in_the_data_root_is_named(spoilable: Config, damage: str) -> None:
    frame = FrameTable.open(spoilable.data.frames)[0]
    root = Path(spoilable.data.root)
    image, sweep = root / frame.cameras[2].image_path, root / frame.lidar_path
    other = root / frame.cameras[1].image_path
    assert checks.data_root(spoilable, 2).status == checks.listing(spoilable).status == "ok"
    hurt = image
    if damage == "missing":
        image.unlink()
    elif damage == "truncated sweep":
        hurt = sweep
        sweep.write_bytes(sweep.read_bytes()[:-3])
    elif damage == "other size":
        from PIL import Image

        Image.open(other).resize((16, 9)).save(image)
    elif damage == "no image":
        image.write_bytes(b"<html>")
    else:
        image.write_bytes(image.read_bytes()[:600])
    found = checks.data_root(spoilable, 2, whole=damage == "half an image")
    assert found.status == "error"
    assert str(hurt) in found.what
    assert checks.listing(spoilable).status == ("error" if damage == "missing" else "ok")


def finetuning(config: Config) -> Config:
    """A config that learns from the labels of the same frames."""
    return replace(
        config,
        student=replace(config.student, out_channels=17),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        evaluation=EvaluationConfig(checkpoint=str(Path(config.data.root) / "student.pt")),
    )


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
    blind = [replace(f, label_path=None, splits=("test",)) if "val" in f.splits else f for f in frames]
    write_frames([*blind, *(f for f in frames if "val" in f.splits)], config.data.frames)
    val = [frame for frame in frames if "val" in frame.splits]
    Path(config.data.root, str(val[0].label_path)).unlink()

    def findings(split: Literal["val", "verify", "test"]) -> dict[str, checks.Finding]:
        wanted = replace(config.evaluation, split=split, submission="predictions")
        return by_name(checks.cheap(evaluation_config(replace(config, evaluation=wanted)), "evaluate"))

    assert findings("verify")["data root"].status == "ok"
    assert findings("val")["data root"].status == "error"
    assert findings("test")["data root"].status == "ok"
    assert "labels" not in findings("test")
    assert "disk: run.folder" not in findings("val")


def test_superpixels_that_are_missing_stop_training_and_are_a_warning_before(spoilable: Config) -> None:
    assert checks.superpixels(spoilable, 2, needed=True).status == "ok"
    shutil.rmtree(folder_of(spoilable.superpixels))
    assert checks.superpixels(spoilable, 2, needed=True).status == "error"
    early = checks.superpixels(spoilable, 2, needed=False)
    assert (early.status, early.next) == ("warning", "slidr superpixels CONFIG")
    assert "0 of 36 maps" in checks.all_superpixels(spoilable).what


def test_disk_space_is_compared_with_what_a_job_writes(
    prepared: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for free, status in ((10**9, "ok"), (1500, "warning"), (500, "error")):
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path, free=free: Usage(10**12, 0, free))
        assert checks.space("run.folder", str(tmp_path / "not" / "there" / "yet"), 1000).status == status
    assert checks.space("superpixels.folder", "s3://bucket/maps", 10**15).status == "ok"
    assert by_name(checks.disk(prepared, "pretrain")).keys() == {"disk: run.folder"}
    assert by_name(checks.disk(prepared, "superpixels")).keys() == {"disk: superpixels.folder"}
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: Usage(10**12, 0, 10_000))
    assert by_name(checks.disk(prepared, "pretrain"))["disk: run.folder"].status == "error"


class _Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Health) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_a_tracking_server_is_asked_and_its_password_not_shown(prepared: Config, server: str) -> None:
    def tracked(uri: str | None) -> checks.Finding:
        return checks.tracking_server(replace(prepared, tracking=replace(prepared.tracking, uri=uri)))

    assert tracked(f"http://{server}").status == "ok"
    with_password = tracked(f"http://someone:secret@{server}")
    assert with_password.status == "ok"
    assert "secret" not in with_password.what
    assert tracked(f"http://{server}/elsewhere").status == "error"
    assert tracked("http://127.0.0.1:1").status == "error"
    assert tracked(None).status == "ok"
    away = replace(prepared, tracking=replace(prepared.tracking, uri="http://127.0.0.1:1"))
    assert checks.tracking_server(away, "tune").status == "warning"  # a search goes on without


def test_clocks_that_disagree_are_a_warning_then_an_error(prepared: Config, tmp_path: Path) -> None:
    assert [checks.skew(seconds).status for seconds in (0.2, -2, 60, -60, 4000)] == [
        "ok", "ok", "warning", "warning", "error",
    ]  # fmt: skip
    (tmp_path / "file").write_text("")
    blocked = replace(prepared, run=replace(prepared.run, folder=str(tmp_path / "file" / "runs")))
    assert checks.clock(prepared).status == "ok"
    assert checks.clock(blocked).status == "error"


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

    monkeypatch.setattr(checks.session, "start", lambda cluster: pytest.fail("Ray was started"))
    preflight(spoilable, "pretrain", console)
    shutil.rmtree(folder_of(spoilable.superpixels))
    preflight(spoilable, "superpixels", console)
    with pytest.raises(PreflightError, match="slidr superpixels CONFIG"):
        stages.run_pretraining(spoilable)
    image = FrameTable.open(spoilable.data.frames)[0].cameras[0].image_path
    (Path(spoilable.data.root) / image).write_bytes(b"")
    with pytest.raises(PreflightError, match="is no image"):
        preflight(spoilable, "pretrain", console)


def test_the_look_around_opens_a_handful_of_files_however_large_the_table(
    prepared: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[object] = []
    real = checks.storage.read_bytes
    monkeypatch.setattr(checks.storage, "read_bytes", lambda path: opened.append(path) or real(path))
    checks.cheap(prepared, "pretrain")
    assert 0 < len([path for path in opened if "samples" in str(path)]) <= checks._FEW * 7
    assert doctor.cheap is checks.cheap
