"""Distillation end to end on a tiny synthetic world: in this process, on one Ray worker, on two."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_jobs import Job
from training_runs import losses, named, weights

from slidr.cluster import session, train
from slidr.cluster.pretrain import pretrain
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.cluster.train import TrainingFailed
from slidr.config import ClusterConfig, Config, TrackingConfig
from slidr.data import storage
from slidr.data.frames import read_frames, write_frames
from slidr.data.loading import PairSource
from slidr.models.minkunet import MinkUNet14
from slidr.models.weights import load_student
from slidr.tracking import RunHandle, tracking_uri
from slidr.training import locks
from slidr.training.locks import InUse, held, launching
from slidr.training.runs import RunError, RunFolder, folder_of

pytestmark = pytest.mark.ray

_WORKER = """
import sys, time
from slidr.training.locks import held
with held(sys.argv[1], "it"):
    print("writes", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many threads as a worker of one CPU has: sums are then taken in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(base: Config) -> tuple[Config, dict[str, Any]]:
    """An undisturbed run in this process, and its scores."""
    config = named(base, "alone")
    return config, pretrain(config, progress=False)


def test_a_run_leaves_scores_checkpoints_a_student_and_an_mlflow_run(alone: tuple[Config, dict[str, Any]]) -> None:
    from mlflow import MlflowClient

    config, result = alone
    folder = Path(config.run.folder, config.run.name)
    assert RunFolder(str(folder)).result() == result
    assert result["steps"] == 10
    assert 0 <= result["retrieval_untrained"] <= 1
    assert losses(config)[-1] < losses(config)[0]
    run = MlflowClient(tracking_uri=tracking_uri(config)).get_run((folder / "mlflow_run_id").read_text())
    assert run.info.status == "FINISHED"
    assert run.data.metrics["retrieval"] == pytest.approx(result["retrieval"])
    assert run.data.params["student.name"] == "minkunet14"


def test_the_student_that_is_left_loads_strictly(alone: tuple[Config, dict[str, Any]]) -> None:
    config, result = alone
    student = MinkUNet14(in_channels=1, out_channels=64, width=0.25)
    report = load_student(student, result["student"], expect=None)
    assert not report.missing
    for name, value in weights(config).items():
        if not name.startswith("head."):
            assert torch.equal(student.state_dict()[name], value)


def test_an_interrupted_run_ends_in_the_same_weights(
    base: Config,
    alone: tuple[Config, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = named(base, "interrupted")
    real_sample = PairSource.sample
    made = 0

    def dying_sample(self: Any, *arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 10:  # within step 4; the last checkpoint is step 3's, in the middle of the second epoch
            raise KeyboardInterrupt
        return real_sample(self, *arguments)

    monkeypatch.setattr(PairSource, "sample", dying_sample)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, progress=False)
    monkeypatch.undo()
    with pytest.raises(RunError, match=r"--run\.resume"):
        pretrain(config, progress=False)
    assert "going on" not in capfd.readouterr().err
    result = pretrain(named(config, "interrupted", resume=True))
    assert re.findall(r"going on from step \d+", capfd.readouterr().err) == ["going on from step 3"]
    for name, value in weights(alone[0]).items():
        assert torch.equal(weights(config)[name], value), name
    assert losses(config) == losses(alone[0])
    assert result["retrieval"] == alone[1]["retrieval"]


def test_resuming_with_other_values_is_refused_by_key(base: Config, alone: tuple[Config, dict[str, Any]]) -> None:
    config = named(base, "alone", resume=True)
    other = replace(config, optim=replace(config.optim, lr=0.1))
    with pytest.raises(RunError, match=r"optim\.lr was 0\.0005, now 0\.1"):
        pretrain(other, progress=False)


def test_resuming_on_other_data_is_refused(
    base: Config, alone: tuple[Config, dict[str, Any]], tiny_world: Path, tmp_path: Path
) -> None:
    config = named(base, "alone", resume=True)
    moved = tmp_path / "moved"
    shutil.copytree(tiny_world, moved)
    elsewhere = replace(config, data=replace(config.data, root=str(moved)))
    assert pretrain(elsewhere, progress=False) == alone[1]
    for sweep in moved.glob("samples/LIDAR_TOP/*"):
        sweep.write_bytes(sweep.read_bytes()[20:])
    with pytest.raises(RunError, match=r"data\.root: .*moved: it holds other files"):
        pretrain(elsewhere, progress=False)
    frames = read_frames(config.data.frames)
    turned = [replace(frame, cameras=frame.cameras[::-1]) for frame in frames]
    write_frames(turned, str(tmp_path / "other.parquet"))
    rebuilt = replace(config, data=replace(config.data, frames=str(tmp_path / "other.parquet")))
    with pytest.raises(RunError, match=r"data\.frames: .*other\.parquet: the frame table was written again"):
        pretrain(rebuilt, progress=False)


def test_resuming_a_finished_run_returns_its_scores(alone: tuple[Config, dict[str, Any]]) -> None:
    config, result = alone
    assert pretrain(named(config, "alone", resume=True), progress=False) == result


def test_a_second_launch_on_a_live_run_is_refused_before_it_asks_for_a_cluster_or_writes_anything(
    base: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "start", lambda *arguments: pytest.fail("it asks for a cluster"))
    config = named(base, "twice", workers=1, resume=True)
    with (
        launching(folder_of(config)),
        pytest.raises(RunError, match=r"the run twice is in use by process \d+ on .*--run\.resume"),
    ):
        pretrain(config, progress=False)
    assert os.listdir(folder_of(config).path) == ["lock"]


def test_a_resumed_run_waits_for_its_killed_drivers_worker_and_sees_what_that_still_wrote(
    base: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = named(base, "orphaned", resume=True)
    folder = folder_of(config)
    monkeypatch.setattr(locks, "WAIT_S", 0.1)
    with held(folder.file("lock.writer"), "it"):
        with pytest.raises(RunError, match="a worker of an earlier launch should have ended with its driver"):
            pretrain(config, progress=False)
        assert sorted(os.listdir(folder.path)) == ["lock", "lock.writer"]

    worker = held(folder.file("lock.writer"), "it")
    worker.__enter__()

    def ends(seconds: float) -> None:
        folder.finish({"steps": 10, "epochs": 5})
        worker.__exit__(None, None, None)

    monkeypatch.setattr(locks, "WAIT_S", 120.0)
    monkeypatch.setattr(locks, "_sleep", ends)
    assert pretrain(config, progress=False) == {"steps": 10, "epochs": 5}


def test_of_two_processes_that_launch_a_run_one_is_refused_and_the_other_awaits_the_worker_of_a_dead_driver(
    base: Config,
) -> None:
    config = named(replace(base, optim=replace(base.optim, max_steps=2)), "contended", resume=True)
    folder = folder_of(config)
    worker = subprocess.Popen([sys.executable, "-c", _WORKER, folder.file("lock.writer")], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"writes\n"
        worker.send_signal(signal.SIGSTOP)  # it hangs, and holds its lock all the same
        host = socket.gethostname()
        waits = f"the run contended is in use by process {worker.pid} on {host}: waiting at most 120 s"
        with Job("pretrain", config) as job:
            job.until("it waits for the worker", lambda: waits in job.output)
            with pytest.raises(InUse, match=rf"contended is in use by process {job.process.pid} on {host}; let it end"):
                pretrain(config, progress=False)
            assert sorted(os.listdir(folder.path)) == ["lock", "lock.writer"]
            worker.kill()
            assert job.wait(60) == 0, job.output
    finally:
        worker.kill()
        worker.communicate()
    assert folder.result() == {**pretrain(config, progress=False), "steps": 2}
    assert len(losses(config)) == 2


def test_the_worker_that_writes_holds_the_run_and_lets_go_of_it(on_ray: dict[int, Config]) -> None:
    lock = folder_of(on_ray[2]).file("lock.writer")
    holder = Path(lock).read_text().splitlines()[0]
    process, host, launch = re.fullmatch(r"process (\d+) on (\S+) \((\w+-\d+)\)", holder).groups()  # type: ignore[union-attr]
    assert (int(process) != os.getpid(), host) == (True, socket.gethostname())
    assert launch in os.listdir(folder_of(on_ray[2]).file("ray"))
    with held(lock, "it"):
        pass


def test_one_ray_worker_equals_the_calling_process(
    on_ray: dict[int, Config], alone: tuple[Config, dict[str, Any]]
) -> None:
    assert losses(on_ray[1]) == pytest.approx(losses(alone[0]), rel=1e-5)


def test_two_workers_agree_with_one_over_the_first_ten_steps(on_ray: dict[int, Config]) -> None:
    assert len(losses(on_ray[1])) == 10
    assert losses(on_ray[2]) == pytest.approx(losses(on_ray[1]), abs=1e-4)


def test_a_damaged_superpixel_map_is_named_to_the_user(base: Config, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder = Path(superpixel_folder(base.superpixels))
    copy = replace(base.superpixels, folder=str(tmp_path))
    shutil.copytree(folder, superpixel_folder(copy))
    for path in Path(superpixel_folder(copy)).glob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    config = named(replace(base, superpixels=copy), "damaged", workers=1)
    with pytest.raises(TrainingFailed, match=rf"{tmp_path}.*\.png"):
        pretrain(config, progress=False)
    # Nothing was trained: the name is free again, mended or with other values, which another MLflow run has.
    other = replace(named(base, "damaged"), optim=replace(base.optim, max_steps=1))
    assert pretrain(other, progress=False)["steps"] == 1
    run = MlflowClient(tracking_uri=tracking_uri(other)).get_run(str(folder_of(other).note("mlflow_run_id")))
    assert run.data.params["optim.max_steps"] == "1"


def test_a_split_without_frames_is_refused_before_anything_starts(base: Config) -> None:
    config = named(replace(base, data=replace(base.data, val_split="mini_val")), "unvalidated")
    with pytest.raises(ValueError, match="mini_val"):
        pretrain(config, progress=False)
    assert not Path(config.run.folder, "unvalidated").exists()


def test_a_failing_worker_ends_the_run_with_its_reason(base: Config) -> None:
    """At once: another try would end the same way, however many are left."""
    from ray.train import ControllerError

    config = named(replace(base, optim=replace(base.optim, lr=1e30)), "diverging", workers=1)
    config = replace(config, cluster=replace(config.cluster, max_failures=3))
    with pytest.raises(TrainingFailed, match=r"worker 0: step .*optim\.lr") as caught:
        pretrain(config, progress=False)
    assert isinstance(caught.value.__cause__, ControllerError)  # Ray's for restarts used up is WorkerGroupError


def test_a_full_disk_ends_a_run_in_one_process_with_the_error_it_ends_with_on_ray(
    base: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = storage.write_bytes_atomic

    def full(path: str, data: bytes) -> None:
        if path.endswith(".pt"):
            raise OSError(28, "No space left on device")
        whole(path, data)

    monkeypatch.setattr("slidr.training.checkpoint.storage.write_bytes_atomic", full)
    reason = r"training broke off: .*best\.pt: cannot be written \(No space left on device\)"
    with pytest.raises(TrainingFailed, match=reason):
        pretrain(named(base, "full-in-one-process"), progress=False)


def test_where_workers_may_run_on_other_machines_a_tracking_file_is_left_to_this_process(
    base: Config, on_ray: dict[int, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    config = named(base, "machines", 1)
    client = MlflowClient(tracking_uri=tracking_uri(config))
    real, sent_before_the_end = train._run_to_result, []

    def watched(config: Config, stage: Any, folder: RunFolder, run: RunHandle | None) -> dict[str, Any]:
        assert run is None
        result = real(config, stage, folder, run)
        run_id, waited = folder.note("mlflow_run_id"), time.monotonic()
        while not sent_before_the_end and time.monotonic() < waited + 20:
            time.sleep(0.1)
            sent_before_the_end.extend(client.get_metric_history(run_id, "retrieval"))
        return result

    monkeypatch.setattr(session, "machines", lambda: ["one", "two"])
    monkeypatch.setattr(train, "_SEND_SECONDS", 0.2)
    monkeypatch.setattr(train, "_run_to_result", watched)
    pretrain(config, progress=False)
    assert len(sent_before_the_end) == 1
    run_id = Path(config.run.folder, "machines", "mlflow_run_id").read_text()
    history = sorted(client.get_metric_history(run_id, "loss"), key=lambda metric: metric.step)
    assert [metric.value for metric in history] == losses(config)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_workers_send_metrics_themselves_to_a_server_and_on_one_machine(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = RunHandle("anywhere", "0")
    server = Config(tracking=TrackingConfig(uri="http://one:5000"))
    assert train.workers_run(Config(), handle) is handle
    monkeypatch.setattr(session, "machines", lambda: ["one", "two"])
    assert train.workers_run(Config(), handle) is None
    assert train.workers_run(server, handle) is handle
    assert train.workers_run(Config(cluster=ClusterConfig(num_workers=0)), handle) is handle
