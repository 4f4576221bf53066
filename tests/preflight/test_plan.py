"""`slidr plan`: counts from the table, sizes from the networks, costs measured here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slidr import cli
from slidr.config import Config, LossConfig, OptimConfig, TuneConfig, dump
from slidr.data.frames import FrameTable
from slidr.planning.costs import read_costs
from slidr.preflight.plan import images_to_cut, state_bytes
from slidr.training.checkpoint import CheckpointFolder
from slidr.training.distill import DistillTask
from slidr.training.optim import build_optimizer
from slidr.training.segment import SegmentTask


def test_images_are_counted_once_and_maps_that_are_there_are_seen(prepared: Config, tmp_path: Path) -> None:
    pixels, there = images_to_cut(prepared)
    assert pixels == [160 * 90] * 36
    assert there == 36
    elsewhere = replace(prepared, superpixels=replace(prepared.superpixels, folder=str(tmp_path)))
    assert images_to_cut(elsewhere)[1] == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("job", ["pretrain", "finetune", "probe"])
def test_a_checkpoints_size_is_foreseen_from_the_shapes(
    prepared: Config, tmp_path: Path, job: str, optimizer: str
) -> None:
    config = replace(prepared, optim=OptimConfig(name=optimizer, lr=1e-3))  # type: ignore[arg-type]
    if job != "pretrain":
        student = replace(config.student, out_channels=17, freeze=job == "probe")
        config = replace(config, loss=LossConfig(names=("cross_entropy_lovasz",)), student=student)
    task = DistillTask(config) if job == "pretrain" else SegmentTask(config)
    optimizer_state = build_optimizer(task.parameter_groups(), config.optim)
    for group in optimizer_state.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer_state.step()
    path = CheckpointFolder(str(tmp_path)).save({**task.state(), "optimizer": optimizer_state.state_dict(), "step": 1})
    foreseen, _ = state_bytes(config, "pretrain" if job == "pretrain" else "finetune")
    # The file adds names and alignment, some hundred bytes a tensor.
    tensors = sum(len(state) for state in task.state().values()) * 3
    assert foreseen <= Path(path).stat().st_size <= foreseen + 1500 * tensors + 20_000


def test_costs_are_measured_kept_and_used(prepared: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, costs = tmp_path / "config.yaml", tmp_path / "costs.json"
    path.write_text(dump(prepared))
    assert cli.main(["plan", str(path), "--measure", "--costs", str(costs)]) == 0
    capsys.readouterr()
    measured = {cost.name: cost for cost in read_costs(costs)}
    assert measured.keys() == {"slic", "label_map", "sample", "train_frame", "validate_frame", "worker_memory"}
    assert measured["slic"].setting == {"pixels": 160 * 90, "segments": 40}
    assert all(cost.value > 0 and "--measure" in cost.command for cost in measured.values())

    options = ["--costs", str(costs), "--nodes", "3", "--cpus", "4", "--json"]
    assert cli.main(["plan", str(path), *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["cluster"] == {"cpus": 12, "gpus": 0, "name": "3 nodes of 4 CPUs and 0 GPUs"}
    cut, train = printed["jobs"]
    assert (cut["job"], cut["work"], cut["hours"]) == ("superpixels", "36 images, 36 done already", 0)
    assert train["work"] == "8 steps of 1 keyframes, 2 epochs, 6 validated"
    load = measured["sample"].value
    seconds = 8 * max(measured["train_frame"].value, load) + 6 * max(measured["validate_frame"].value, load)
    assert train["hours"] == pytest.approx(seconds / 3600)


def test_a_file_of_costs_that_is_not_there_is_refused(
    prepared: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(prepared))
    assert cli.main(["plan", str(path), "--costs", str(tmp_path / "misspelt.json")]) == 1
    assert "misspelt.json: cannot be read (No such file" in capsys.readouterr().err


def test_a_config_with_a_search_is_planned_as_one(
    prepared: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        prepared,
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        student=replace(prepared.student, out_channels=17),
        tune=TuneConfig(fractions=(0.5, 1.0), trials=3, round_size=3, seeds=2),
    )
    path, costs = tmp_path / "config.yaml", tmp_path / "costs.json"
    path.write_text(dump(config))
    assert cli.main(["plan", str(path), "--measure", "--costs", str(costs), "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)["jobs"]
    measured = {cost.name: cost.value for cost in read_costs(costs)}
    assert measured.keys() == {"sample", "train_frame", "validate_frame", "worker_memory"}
    assert planned["work"] == "12 trials, 8 finals (2 fractions x 2 methods)"
    # 2 keyframes of verify to choose on, 2 of val to score; 2 epochs.
    table = FrameTable.open(config.data.frames)
    counts = {split: [len(table.select(split, f)) for f in (0.5, 1.0)] for split in ("parametrize", "train")}
    assert counts["parametrize"] == [2, 4]
    train, look = (measured[name] + measured["sample"] for name in ("train_frame", "validate_frame"))
    trials = sum(2 * frames * train + 2 * 2 * look for frames in counts["parametrize"])
    finals = sum(2 * frames * train + (2 + 2) * look for frames in counts["train"])
    assert planned["cpu_hours"] == pytest.approx((6 * trials + 4 * finals) / 3600)
    assert planned["notes"][0] == f"50 % of the labels: at most 4 steps a trial, {2 * counts['train'][0]} a final"


@pytest.mark.parametrize(("option", "value"), [("nodes", "0"), ("cpus", "0"), ("gpus", "-1")])
def test_a_cluster_of_nothing_is_refused(
    option: str, value: str, prepared: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(prepared))
    assert cli.main(["plan", str(path), "--nodes", "2", f"--{option}", value]) == 1
    assert f"--{option}: got {value}, expected at least" in capsys.readouterr().err


def test_what_nobody_measured_is_said_so(prepared: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(prepared))
    assert cli.main(["plan", str(path), "--nodes", "1", "--gpus", "1", "--cluster.use_gpu", "true"]) == 0
    printed = capsys.readouterr().out
    assert "not measured, by anyone" in printed
    assert "device cuda" in printed.split("not measured, by anyone")[1]
    assert cli.main(["plan"]) == 2
    assert cli.main(["plan", "--help"]) == 0
    assert "--nodes N" in capsys.readouterr().out
