"""Whether a job can write what it will, and keep it."""

from __future__ import annotations

import errno
import http.server
import os
import threading
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from preflight_cases import by_name

from slidr.config import Config
from slidr.preflight import outputs
from slidr.preflight.findings import Finding, Stage

Usage = namedtuple("Usage", "total used free")


def test_disk_space_is_compared_with_what_a_job_writes(
    prepared: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for free, status in ((10**9, "ok"), (1500, "warning"), (500, "error")):
        monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path, free=free: Usage(10**12, 0, free))
        assert outputs.space("run.folder", str(tmp_path / "not" / "there" / "yet"), 1000).status == status
    assert outputs.space("superpixels.folder", "s3://bucket/maps", 10**15).status == "ok"
    assert by_name(outputs.disk(prepared, "pretrain")).keys() == {"disk: run.folder"}
    assert by_name(outputs.disk(prepared, "superpixels")).keys() == {"disk: superpixels.folder"}
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda path: Usage(10**12, 0, 10_000))
    assert by_name(outputs.disk(prepared, "pretrain"))["disk: run.folder"].status == "error"


class _Experiments(http.server.BaseHTTPRequestHandler):
    """MLflow's answer for an experiment that no run has made yet."""

    def do_GET(self) -> None:
        known = self.path.startswith("/api/2.0/mlflow/experiments/get-by-name?experiment_name=")
        self.send_response(404)
        self.end_headers()
        self.wfile.write(b'{"error_code": "RESOURCE_DOES_NOT_EXIST"}' if known else b"not found")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Experiments) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_a_tracking_server_is_asked_and_its_password_not_shown(prepared: Config, server: str) -> None:
    def tracked(uri: str | None) -> Finding:
        return outputs.tracking_server(replace(prepared, tracking=replace(prepared.tracking, uri=uri)))

    assert tracked(f"http://{server}").status == "ok"
    with_password = tracked(f"http://someone:secret@{server}")
    assert with_password.status == "ok"
    assert "secret" not in with_password.what
    assert tracked(f"http://{server}/elsewhere").status == "error"
    assert tracked("http://127.0.0.1:1").status == "error"
    assert tracked(None).status == "ok"
    away = replace(prepared, tracking=replace(prepared.tracking, uri="http://127.0.0.1:1"))
    assert outputs.tracking_server(away, "tune").status == "warning"  # a search goes on without


def test_clocks_that_disagree_are_a_warning_then_an_error(prepared: Config, tmp_path: Path) -> None:
    assert [outputs.skew(seconds, "runs").status for seconds in (0.2, -2, 60, -60, 4000)] == [
        "ok", "ok", "warning", "warning", "error",
    ]  # fmt: skip
    assert by_name(outputs.folders(prepared, "pretrain"))["clock"].status == "ok"


WRITTEN: dict[Stage | None, set[str]] = {
    None: {"superpixels.folder", "run.folder", "evaluation.submission", "tracking.uri"},
    "frames": {"data.frames"},
    "superpixels": {"superpixels.folder"},
    "pretrain": {"run.folder", "tracking.uri"},
    "finetune": {"run.folder", "tracking.uri"},
    "tune": {"run.folder", "tune.results", "tracking.uri"},
    "evaluate": {"run.folder", "evaluation.submission", "tracking.uri"},
}


def into(config: Config, folder: str) -> Config:
    """The same with all that is written under one folder."""
    return replace(
        config,
        data=replace(config.data, frames=f"{folder}/frames.parquet"),
        run=replace(config.run, folder=f"{folder}/runs"),
        superpixels=replace(config.superpixels, folder=f"{folder}/superpixels"),
        tune=replace(config.tune, results=f"{folder}/results"),
        evaluation=replace(config.evaluation, submission=f"{folder}/submission"),
        tracking=replace(config.tracking, uri=f"sqlite:///{folder}/mlflow.db"),
    )


@pytest.mark.parametrize("stage", list(WRITTEN), ids=str)
def test_every_folder_that_a_job_writes_must_be_one_that_can_be_written(
    stage: Stage | None, prepared: Config, tmp_path: Path
) -> None:
    good = by_name(outputs.folders(into(prepared, str(tmp_path / "new")), stage))
    assert {name: finding.status for name, finding in good.items()} == dict.fromkeys(WRITTEN[stage] | {"clock"}, "ok")
    (tmp_path / "file").write_text("")
    bad = by_name(outputs.folders(into(prepared, str(tmp_path / "file")), stage))
    expected = dict.fromkeys(WRITTEN[stage], "error")
    if stage is None:  # the maps may have been made by someone else
        expected["superpixels.folder"] = "warning"
    assert {name: finding.status for name, finding in bad.items()} == expected
    for key, finding in bad.items():
        assert "cannot be written" in finding.what
        assert finding.next == f"choose another {key}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]  # no probe is left, no folder made


def test_a_job_that_may_write_but_not_delete_is_let_through(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        left.append(path)
        raise PermissionError("no s3:DeleteObject")

    left: list[str] = []
    monkeypatch.setattr(outputs.storage, "delete", refuse)
    assert {finding.status for finding in outputs.folders(prepared, "pretrain")} == {"ok"}
    (probe,) = left
    Path(probe).unlink()


def test_a_full_disk_is_no_folder_to_give_up(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(outputs.storage, "write_bytes_atomic", full)
    (found,) = outputs.folders(prepared, "pretrain")
    assert (found.status, found.next) == ("error", "free some space, or choose another run.folder")


def test_a_bare_file_name_is_in_the_working_folder(
    prepared: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = replace(prepared, data=replace(prepared.data, frames="frames.parquet"))
    assert by_name(outputs.folders(bare, "frames"))["data.frames"].what == ".: can be written"


def test_a_folder_with_the_frame_tables_name_is_refused(prepared: Config, tmp_path: Path) -> None:
    config = replace(prepared, data=replace(prepared.data, frames=str(tmp_path)))
    (found,) = outputs.table_file(config)
    assert (found.status, found.what) == ("error", f"{tmp_path}: is a folder")
    assert list(outputs.table_file(prepared)) == []


@pytest.mark.parametrize("stage", list(WRITTEN), ids=str)
def test_a_submitted_job_may_not_write_into_the_copy_that_ray_deletes(
    stage: Stage | None, prepared: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "code_of_a_zip"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    refused = by_name(outputs.folders(into(prepared, "here"), stage))
    assert {name: finding.status for name, finding in refused.items()} == dict.fromkeys(WRITTEN[stage], "error")
    for key, finding in refused.items():
        assert f"--{key} an absolute path" in finding.next
    kept = by_name(outputs.folders(into(prepared, str(tmp_path / "shared")), stage))
    assert {finding.status for finding in kept.values()} == {"ok"}
