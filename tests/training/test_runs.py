"""Taking up a run again: with which values."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidr.config import Config, ConfigError, LossConfig, RunConfig
from slidr.data import storage
from slidr.data.storage import DataError
from slidr.models.download import student_location
from slidr.models.weights import weights_digest
from slidr.training.locks import launching
from slidr.training.runs import RunError, RunFolder, claim, folder_of, of_the_workers, require_same_weights


def test_a_run_is_resumed_with_another_number_of_workers_but_with_no_other_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def of(workers: int | tuple[int, int], lr: float = 0.5) -> Config:
        config = Config(run=RunConfig(folder=str(tmp_path), name="run", resume=True))
        cluster = replace(config.cluster, num_workers=workers)
        return replace(config, cluster=cluster, optim=replace(config.optim, lr=lr))

    claim(of(2)).checkpoints.save({"step": 3})
    claim(of(2))
    assert not caplog.messages
    for workers in (1, (1, 2)):
        assert claim(of(workers)).checkpoints.steps() == [3]
        assert f"was started with cluster.num_workers 2 and is resumed with {workers}: " in caplog.messages[-1]
        assert "the loss is another one" in caplog.messages[-1]
    with pytest.raises(RunError, match=r"other values: optim\.lr was 0\.5, now 0\.25; resume .*config\.yaml, or"):
        claim(of(1, lr=0.25))


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (LossConfig(gather_negatives=True), "rounded in another order"),
        (LossConfig(gather_negatives=False), "negatives are those of its worker's frames"),
        (LossConfig(names=("point_pixel_info_nce",), gather_negatives=True), "draws its own pairs"),
        (LossConfig(names=("cross_entropy_lovasz",)), "mean of each worker's own"),
    ],
)
def test_what_another_number_of_workers_changes_is_said(loss: LossConfig, said: str) -> None:
    assert said in of_the_workers(Config(loss=loss))


def test_a_run_without_a_checkpoint_that_is_started_with_other_values_leaves_its_mlflow_run_and_metrics_behind(
    tmp_path: Path,
) -> None:
    def start(lr: float, resume: bool = False) -> list[str]:
        config = Config(run=RunConfig(folder=str(tmp_path), name="run", resume=resume))
        folder = claim(replace(config, optim=replace(config.optim, lr=lr)))
        return [name for name in left if storage.exists(folder.file(name))]

    left = ["mlflow_run_id", "metrics.jsonl", "metrics.jsonl.sent"]
    assert start(0.5) == []
    for name in left:
        (tmp_path / "run" / name).write_text("")
    assert start(0.5) == start(0.5, resume=True) == left  # the same run again
    assert start(0.25) == []
    for name in left:
        (tmp_path / "run" / name).write_text("")
    assert start(0.125, resume=True) == []
    (tmp_path / "run" / "mlflow_run_id").write_text("")
    (tmp_path / "run" / "config.yaml").write_text("optim: {a_key_of_another_version: 1}")
    assert start(0.125) == []


RESULT = {"steps": 10, "epochs": 2, "val_loss": 1.25, "retrieval": 0.5, "student": "run/student.pt", "labelled": None}


def test_a_result_is_read_back_and_a_changed_one_is_refused_with_its_name(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    assert folder.result() is None
    folder.finish(RESULT)
    assert folder.result() == RESULT
    whole = (tmp_path / "result.json").read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(len(whole), size=60):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        (tmp_path / "result.json").write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert folder.result() == RESULT, "white space"
            continue
        with pytest.raises(DataError, match=r"/result\.json: .*--run\.resume"):
            folder.result()


def test_a_result_of_an_earlier_version_has_no_digest_and_is_read(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert RunFolder(str(tmp_path)).result() == RESULT


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b'{"steps": 1}', b'{"steps": true, "epochs": 1}', b"\xff", b"[" * 10**5]
)
def test_a_result_that_is_not_one_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(DataError, match=r"result\.json: "):
        RunFolder(str(tmp_path)).result()


def test_a_damaged_config_of_a_run_is_named(tmp_path: Path) -> None:
    config = Config(run=RunConfig(folder=str(tmp_path), name="run", resume=True))
    claim(config).checkpoints.save({"step": 1})
    for content in (b"\xff\xfe", b"- 1", b"optim: {lr: [}"):
        (tmp_path / "run" / "config.yaml").write_bytes(content)
        with pytest.raises((DataError, ConfigError), match=r"run/config\.yaml: "):
            claim(config)


def test_a_note_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mlflow_run_id").write_bytes(b"\xf1\x80")
    with pytest.raises(DataError, match=r"mlflow_run_id: is damaged"):
        RunFolder(str(tmp_path)).note("mlflow_run_id")


@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.symlink(path, path)], ids=["folder", "link to itself"])
def test_a_lock_that_cannot_be_opened_is_named(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "lock")
    with pytest.raises(RunError, match=r"/lock: cannot be locked"), launching(RunFolder(str(tmp_path))):
        pass


def test_a_run_whose_name_no_folder_can_have_is_refused(tmp_path: Path) -> None:
    folder = folder_of(Config(run=RunConfig(folder=str(tmp_path), name="a" * 300)))
    with pytest.raises(RunError, match="File name too long"), launching(folder):
        pass


def test_a_worker_whose_download_is_not_the_file_that_the_run_began_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLIDR_CACHE", str(tmp_path / "cache"))
    url = "https://host.example/s.pt?token=hush"
    config = Config(run=RunConfig(folder=str(tmp_path), name="run"))
    config = replace(config, student=replace(config.student, weights=url))
    folder = claim(config)
    copy = Path(student_location(url)[0])
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"as on the driver")
    folder.note("data.json", json.dumps({"weights": weights_digest(url)}))
    require_same_weights(config, folder)
    copy.write_bytes(b"an older file")
    with pytest.raises(RunError, match=r"https://host\.example/s\.pt: the copy on .*s\.pt, is not the file") as refused:
        require_same_weights(config, folder)
    assert "hush" not in str(refused.value)
