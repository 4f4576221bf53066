"""Commands on Ray that get a real SIGINT, SIGTERM or SIGHUP: exit status, last line, and what MLflow then says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faults import clean_environment, kill_tree, process_tree, title_of
from training_runs import named
from tune_cases import search_config

from slidr.config import ClusterConfig, Config, EvaluationConfig, LossConfig, dump
from slidr.models.minkunet import MinkUNet14

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds processes in Linux's /proc")
# A private cluster of three CPUs, as on a laptop: one for the worker, one for the loader.
ON_RAY = ClusterConfig(num_workers=1, loader_cpus=1, local_cpus=3)
CAUSES = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "stopped by SIGTERM",
    signal.SIGHUP: "stopped by SIGHUP",
}
# Signals as a login shell leaves them, whatever this test was started by.
_DEFAULTS = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def stopped(
    folder: Path, command: str, config: Config, number: int, ready: Callable[[str], bool], everyone: bool = True
) -> tuple[int, str]:
    """Exit status and output of a command that got a signal once it was `ready`, with nothing left of it.

    `everyone`: so did all processes of its group, as a terminal does it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    log = folder / "output.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", _DEFAULTS, "-m", "slidr.cli", command, str(folder / "config.yaml")],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 240
        while not ready(log.read_text()):
            assert process.poll() is None, f"ended before its signal:\n{log.read_text()}"
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        members = process_tree(process.pid)
        os.killpg(process.pid, number) if everyone else process.send_signal(number)
        status = process.wait(120)
        while any(title_of(pid) for pid in members):
            assert time.monotonic() < deadline, [title_of(pid) for pid in members]
            time.sleep(0.1)
        return status, log.read_text()
    finally:
        kill_tree(process)


def mlflow_statuses(config: Config) -> set[str]:
    """How the store says that each of its runs is."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{config.run.folder}/mlflow.db")
    return {run.info.status for run in client.search_runs([client.get_experiment_by_name("slidr").experiment_id])}


def trained(config: Config, steps: int = 1) -> Callable[[str], bool]:
    """Whether the run has logged that many steps."""
    journal = Path(config.run.folder, config.run.name, "metrics.jsonl")
    return lambda output: journal.exists() and journal.read_text().count('"loss"') >= steps


def endless(base: Config, folder: Path, number: signal.Signals) -> Config:
    """A run on Ray that does not end by itself soon, with an MLflow store of its own."""
    config = named(base, f"stopped-{number}", folder=str(folder / "runs"))
    return replace(config, cluster=ON_RAY, optim=replace(config.optim, max_steps=None, epochs=10_000))


@pytest.fixture
def segmenter(base: Config, tmp_path: Path) -> Config:
    """A fine-tuning of the tiny world on Ray, with a student to evaluate."""
    torch.manual_seed(0)
    student = tmp_path / "student.pt"
    torch.save({"model_points": MinkUNet14(1, 17, width=0.25).state_dict()}, student)
    return replace(
        base,
        student=replace(base.student, out_channels=17),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        evaluation=EvaluationConfig(checkpoint=str(student), bootstrap=20, votes=1),
        run=replace(base.run, folder=str(tmp_path / "runs")),
    )


def test_ctrl_c_ends_a_pretraining_on_ray_as_killed_and_says_how_to_go_on(base: Config, tmp_path: Path) -> None:
    config = endless(base, tmp_path, signal.SIGINT)
    status, output = stopped(tmp_path, "pretrain", config, signal.SIGINT, trained(config))
    assert status == 130, output
    assert "slidr: interrupted; the same command with --run.resume goes on" in output.splitlines()
    assert "Traceback" not in output
    assert mlflow_statuses(config) == {"KILLED"}


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("everyone", [True, False], ids=["group", "driver"])
def test_a_signal_ends_a_pretraining_on_ray_as_killed(
    base: Config, tmp_path: Path, number: signal.Signals, everyone: bool
) -> None:
    config = endless(base, tmp_path, number)
    status, output = stopped(tmp_path, "pretrain", config, number, trained(config), everyone)
    assert status == 128 + number, output
    assert f"slidr: stopped by {number.name}; the same command with --run.resume goes on" in output.splitlines()
    assert mlflow_statuses(config) == {"KILLED"}


@pytest.mark.chaos
def test_a_run_that_ctrl_c_ended_goes_on_from_its_checkpoint(base: Config, tmp_path: Path) -> None:
    config = endless(base, tmp_path, signal.SIGINT)
    status, output = stopped(tmp_path, "pretrain", config, signal.SIGINT, trained(config, 4))
    assert status == 130, output
    again = replace(config, run=replace(config.run, resume=True))
    status, output = stopped(tmp_path, "pretrain", again, signal.SIGTERM, lambda text: "going on from" in text)
    assert status == 143, output
    assert re.search(r"going on from step [3-9]", output)
    assert mlflow_statuses(config) == {"KILLED"}


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_fine_tuning_on_ray_as_killed(
    segmenter: Config, tmp_path: Path, number: signal.Signals
) -> None:
    config = endless(segmenter, tmp_path, number)
    status, output = stopped(tmp_path, "finetune", config, number, trained(config))
    assert status == 128 + number, output
    assert f"slidr: {CAUSES[number]}; the same command with --run.resume goes on" in output.splitlines()
    assert "Traceback" not in output
    assert mlflow_statuses(config) == {"KILLED"}


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_evaluation_on_ray_as_killed(
    segmenter: Config, tmp_path: Path, number: signal.Signals
) -> None:
    config = replace(segmenter, cluster=ON_RAY)
    runs = Path(config.run.folder)

    def begun(output: str) -> bool:
        """Its MLflow run is noted: what follows is Ray's start of workers."""
        return len(list(runs.glob("*/mlflow_run_id"))) > 0

    status, output = stopped(tmp_path, "evaluate", config, number, begun)
    assert status == 128 + number, output
    assert f"slidr: {CAUSES[number]}; the same command goes on" in output.splitlines()
    assert "Traceback" not in output
    assert mlflow_statuses(config) == {"KILLED"}
    assert not list(runs.glob("*/result.json"))


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_search_on_ray_which_then_goes_on(
    tiny_world: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = search_config(tiny_world, tmp_path)
    config = replace(config, cluster=ON_RAY, tune=replace(config.tune, methods=("random",), fractions=(1.0,)))
    folder = Path(config.run.folder, config.run.name)

    def one_ended(output: str) -> bool:
        return len(list(folder.glob("*/*/trial-*/end.json"))) == 1

    status, output = stopped(tmp_path, "tune", config, number, one_ended)
    assert status == 128 + number, output
    assert f"slidr: {CAUSES[number]}; the same command goes on" in output.splitlines()
    assert "Traceback" not in output
    kept = {path: path.read_bytes() for path in folder.glob("*/*/trial-*/end.json")}
    assert len(kept) >= 1
    # The driver may be stopped before it records that a trial has ended; the same command then does.
    assert mlflow_statuses(config) <= {"KILLED", "FINISHED"}, "nothing is left running"
    done = subprocess.run(
        [sys.executable, "-m", "slidr.cli", "tune", str(tmp_path / "config.yaml")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in kept} == kept
    assert mlflow_statuses(config) == {"FINISHED"}


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_superpixels_which_then_do_the_rest(base: Config, tmp_path: Path, number: signal.Signals) -> None:
    superpixels = replace(base.superpixels, folder=str(tmp_path / "superpixels"))
    config = replace(base, superpixels=superpixels, cluster=ON_RAY)
    status, output = stopped(
        tmp_path, "superpixels", config, number, lambda text: len(list(tmp_path.glob("superpixels/*/*.png"))) > 0
    )
    assert status == 128 + number, output
    assert f"slidr: {CAUSES[number]}; the same command goes on" in output.splitlines()
    assert "Traceback" not in output
    (folder,) = tmp_path.glob("superpixels/*")
    assert not (folder / "manifest.json").exists()
    done = subprocess.run(
        [sys.executable, "-m", "slidr.cli", "superpixels", str(tmp_path / "config.yaml")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "manifest.json").read_text())["maps"] == len(list(folder.glob("*.png")))
