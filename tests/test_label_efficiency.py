"""The label-efficiency experiment: who chooses, what is read once, and what its sums come to. Nothing is trained."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from slidr import label_efficiency
from slidr.config import Config, DataConfig, OptimConfig, RunConfig, StudentConfig, WorldConfig
from slidr.data.frames import write_frames
from slidr.data.loading import subset_frames
from slidr.label_efficiency import Protocol, Rates, downstream_config, gain, judged
from slidr.training.optim import build_optimizer
from slidr.training.segment import SegmentTask
from slidr.types import Frame

SCENES, FRAMES = 6, 5  # to train on, and keyframes of each
LOW, CHOSEN, HIGH = Rates(0.1, 0.1), Rates(0.1, 0.3), Rates(0.4, 0.4)  # the same backbone rate twice
PROBE = Protocol("probe", steps=40, rates=(LOW, CHOSEN, HIGH), probe=True)
SCENE = Protocol("scene", steps=7, rates=(LOW, CHOSEN, HIGH), probe=False)
VERIFY = {LOW: 0.30, CHOSEN: 0.50, HIGH: 0.40}
VAL = {LOW: 0.90, CHOSEN: 0.60, HIGH: 0.95}  # other rates would look better there


@pytest.fixture
def base(tmp_path: Path) -> Config:
    nowhere = np.eye(4)
    frames = [
        Frame(f"{split}-{s}-{i}", f"{split}-{s}", i, "lidar", "a.bin", "a", nowhere, nowhere, (), None, None, (split,))
        for split, scenes in (("parametrize", SCENES), ("verify", 2), ("val", 2))
        for s in range(scenes)
        for i in range(FRAMES)
    ]
    write_frames(frames, str(tmp_path / "frames.parquet"))
    return Config(
        data=DataConfig(frames=str(tmp_path / "frames.parquet")),
        optim=OptimConfig(batch_size=2),
        run=RunConfig(folder=str(tmp_path / "runs"), name="base"),
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What was trained (rates), and what was scored (rates, split, student), by stand-ins that know every score."""
    seen: dict[str, list[Any]] = {"trained": [], "scored": []}

    def finetune(config: Config, progress: bool = True) -> dict[str, Any]:
        seen["trained"].append(rates_of(config))
        return {"student": f"student-{rates_of(config)}.pt"}

    def evaluate(config: Config) -> dict[str, Any]:
        rates, wanted = rates_of(config), config.evaluation
        seen["scored"].append((rates, wanted.split, wanted.checkpoint))
        miou = {"verify": VERIFY, "val": VAL}[wanted.split][rates]
        return {"evaluation": {"miou": miou, "miou_interval_95": [miou - 0.1, miou + 0.1], "absent": ["bus"]}}

    monkeypatch.setattr(label_efficiency, "finetune", finetune)
    monkeypatch.setattr(label_efficiency, "evaluate", evaluate)
    return seen


def rates_of(config: Config) -> Rates:
    assert config.optim.head_lr is not None
    return Rates(config.optim.lr, config.optim.head_lr)


@pytest.mark.parametrize("protocol", [PROBE, SCENE])
def test_verify_chooses_the_rates_and_val_is_scored_once_with_the_chosen_ones(
    base: Config, calls: dict[str, list[Any]], protocol: Protocol
) -> None:
    row = judged(base, "ImageNet teacher", "pretrained.pt", protocol)
    assert row["rates"] == CHOSEN
    assert row["miou"] == pytest.approx(60.0)
    assert row["interval_95_over_frames"] == pytest.approx([50.0, 70.0])
    assert row["absent"] == ["bus"]
    assert row["verify"] == [(CHOSEN, 50.0), (HIGH, 40.0), (LOW, 30.0)]
    assert calls["trained"] == [LOW, CHOSEN, HIGH]
    assert [entry for entry in calls["scored"] if entry[1] == "val"] == [(CHOSEN, "val", f"student-{CHOSEN}.pt")]
    assert calls["scored"][-1][1] == "val"
    assert calls["scored"][:-1] == [(rates, "verify", f"student-{rates}.pt") for rates in (LOW, CHOSEN, HIGH)]


def test_a_single_offer_is_taken_without_a_choice(base: Config, calls: dict[str, list[Any]]) -> None:
    row = judged(base, "no pretraining", None, replace(SCENE, rates=(HIGH,)))
    assert (row["rates"], row["verify"]) == (HIGH, [])
    assert calls["scored"] == [(HIGH, "val", f"student-{HIGH}.pt")]


def test_the_last_layer_and_the_layers_before_it_train_at_their_own_rates(base: Config) -> None:
    tiny = replace(base, student=StudentConfig(name="minkunet14", width=0.25))
    scene = downstream_config(tiny, "no pretraining", None, SCENE, Rates(backbone=0.002, head=0.06))
    task = SegmentTask(scene)
    optimizer = build_optimizer(task.parameter_groups(), scene.optim)
    name_of = {parameter: name for name, parameter in task.model.student.named_parameters()}
    rate_of = {name_of[p]: group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate_of) == len(name_of)
    assert {name: rate for name, rate in rate_of.items() if rate != 0.002} == {"final.kernel": 0.06, "final.bias": 0.06}


def test_a_scene_protocol_has_the_labels_of_one_scene_and_trains_every_layer(base: Config) -> None:
    config = downstream_config(base, "random teacher", "pretrained.pt", SCENE, LOW)
    assert subset_frames(config, "train").scenes == [f"parametrize-{SCENES - 1}"]
    assert len(subset_frames(config, "train")) == FRAMES
    assert not config.student.freeze
    # Five frames in batches of two are two steps an epoch; seven steps are within the fourth epoch.
    assert (config.optim.max_steps, config.optim.epochs) == (7, 4)


def test_a_probe_has_every_label_and_trains_the_last_layer(base: Config) -> None:
    config = downstream_config(base, "random teacher", "pretrained.pt", PROBE, LOW)
    assert len(subset_frames(config, "train").scenes) == SCENES
    assert config.student.freeze
    # Thirty frames in batches of two are fifteen steps an epoch; forty steps are within the third.
    assert (config.optim.max_steps, config.optim.epochs) == (40, 3)


def test_every_arm_and_offer_has_a_run_of_its_own_from_its_own_start(base: Config) -> None:
    configs = [
        downstream_config(base, arm, student, protocol, rates)
        for arm, student in (("ImageNet teacher", "pretrained.pt"), ("no pretraining", None))
        for protocol in (PROBE, SCENE)
        for rates in protocol.rates
    ]
    assert len({config.run.name for config in configs}) == len(configs)
    assert {config.student.weights for config in configs[:6]} == {"pretrained.pt"}
    assert {config.student.weights for config in configs[6:]} == {None}
    for config in configs:
        assert config.student.out_channels == 17
        assert config.loss.names == ("cross_entropy_lovasz",)
        assert config.run.resume


def test_a_gain_is_paired_by_seed_with_students_interval() -> None:
    # Gains 2, 5, 8: mean 5, standard deviation 3; t(0.975, 2) = 4.302653; 4.302653 * 3 / sqrt(3) = 7.452413.
    paired = gain([12.0, 16.0, 20.0], [10.0, 11.0, 12.0])
    assert paired["gain"] == [2.0, 5.0, 8.0]
    assert paired["mean_gain"] == pytest.approx(5.0)
    assert paired["half_width_95"] == pytest.approx(7.452413, abs=1e-6)
    assert gain([3.0], [5.0]) == {"gain": [-2.0], "mean_gain": -2.0, "half_width_95": None}
    with pytest.raises(ValueError, match="zip"):
        gain([1.0, 2.0], [1.0])


# ---------------------------------------------------------------------------------------------- the benchmark


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "label_efficiency.py"
    spec = importlib.util.spec_from_file_location("label_efficiency_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (16, 1), (17, 2), (32, 2), (400, 25)])
def test_pretraining_has_as_many_epochs_as_hold_its_steps(benchmark: ModuleType, steps: int, epochs: int) -> None:
    # 8 scenes of 8 keyframes in batches of 4: sixteen steps an epoch.
    base = Config(world=WorldConfig(parametrize=8, keyframes=8), optim=OptimConfig(batch_size=4))
    assert benchmark.epochs(base, steps) == epochs


def runs(protocol: Protocol, scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [
        {"seed": seed, "arm": arm, "protocol": protocol.name, "miou": miou, "rates": (LOW, CHOSEN, HIGH)[seed]}
        for arm, values in scores.items()
        for seed, miou in enumerate(values)
    ]


def test_a_summary_has_every_arms_mean_and_its_gain_seed_by_seed(benchmark: ModuleType) -> None:
    found = runs(
        PROBE,
        {
            "ImageNet teacher": [30.0, 33.0, 36.0],
            "no pretraining": [10.0, 10.0, 10.0],
            "random teacher": [20.0, 22.0, 24.0],
        },
    )
    found += runs(SCENE, {"ImageNet teacher": [31.0, 30.0, 29.0], "no pretraining": [30.0, 30.0, 30.0]})
    probe, scene = (benchmark.summarised(found, protocol) for protocol in (PROBE, SCENE))
    taught = probe["arms"]["ImageNet teacher"]
    assert (taught["miou"], taught["rates"], taught["mean"]) == ([30.0, 33.0, 36.0], [LOW, CHOSEN, HIGH], 33.0)
    assert (taught["gain"], taught["mean_gain"]) == ([20.0, 23.0, 26.0], 23.0)
    assert taught["half_width_95"] == pytest.approx(7.452413, abs=1e-6)  # deviation 3, as above
    assert probe["arms"]["no pretraining"]["mean_gain"] == 0.0
    assert probe["over_random_teacher"]["gain"] == [10.0, 11.0, 12.0]
    assert list(scene["arms"]) == ["ImageNet teacher", "no pretraining"]  # the control is of the probe alone
    assert scene["arms"]["ImageNet teacher"]["gain"] == [1.0, 0.0, -1.0]
    assert "over_random_teacher" not in scene
    lines = benchmark.table([probe, scene]).splitlines()
    assert (
        "| probe | ImageNet teacher | 0.1 / 0.1, last layer 0.3 / 0.4 | 30.0 / 33.0 / 36.0 | 33.0 | +23.0 ± 7.5"
        in lines[2]
    )
    assert lines[-1].startswith("probe: ImageNet teacher over random teacher +11.0 ± 2.5 (+10.0 / +11.0 / +12.0)")


def test_too_few_frames_leave_a_judged_student_without_an_interval() -> None:
    assert label_efficiency._percent(None) is None
    assert label_efficiency._percent([0.5, 0.75]) == [50.0, 75.0]
