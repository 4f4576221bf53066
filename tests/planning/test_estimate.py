"""Plans: arithmetic over counts and unit costs, and nothing where nobody measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.config import ClusterConfig, Config, LossConfig, OptimConfig, RunConfig
from slidr.planning.costs import PACKAGED, CostError, Costs, UnitCost, read_costs, write_costs
from slidr.planning.estimate import Machines, plan_superpixels, plan_training, train_setting

CONFIG = Config(
    cluster=ClusterConfig(num_workers=2, cpus_per_worker=1, loader_cpus=4), run=RunConfig(keep_checkpoints=3)
)
COUNTS = {"train": 100, "val": 10, "score": 5}
CLUSTER = Machines(cpus=8, gpus=0, name="eight CPUs")


def cost(name: str, value: float, **setting: object) -> UnitCost:
    return UnitCost(name, value, setting, "a machine", "2026-01-01", "a command")  # type: ignore[arg-type]


def training_costs(config: Config, train: float, validate: float, sample: float) -> Costs:
    setting = train_setting("pretrain", config)
    return Costs(
        [
            cost("sample", sample, job="pretrain", pixels=99),
            cost("train_frame", train, **setting),
            cost("validate_frame", validate, **setting),
            cost("worker_memory", 2e9, **setting),
        ]
    )


def test_superpixels_take_their_images_pixels_over_the_cpus() -> None:
    costs = Costs([cost("slic", 2.0, pixels=100, segments=150), cost("label_map", 50.0, pixels=100, segments=150)])
    plan = plan_superpixels([100] * 3000 + [50] * 1200, 0, CONFIG, costs, CLUSTER, bytes_per_pixel=7)
    seconds = sum([2.0] * 3000 + [1.0] * 1200)
    assert plan.cpu_hours == pytest.approx(seconds / 3600)
    assert plan.hours == pytest.approx(seconds / 3600 / 8)
    assert plan.storage_bytes == pytest.approx(50.0 * 3000 + 25.0 * 1200)
    assert plan.memory_bytes == 700
    assert plan.missing == ("superpixel_job",)


def test_images_that_have_a_map_cost_nothing_and_a_limit_of_cpus_counts() -> None:
    costs = Costs([cost("slic", 3.6, pixels=10, segments=150)])
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, superpixel_cpus=2))
    plan = plan_superpixels([10] * 4000, 1000, config, costs, CLUSTER, 1)
    assert plan.hours == pytest.approx(3000 * 3.6 / 3600 / 2)
    assert plan_superpixels([10] * 10, 10, config, costs, CLUSTER, 1).hours == 0


def test_with_very_many_cpus_the_driver_sets_the_pace() -> None:
    costs = Costs([cost("slic", 2.0, pixels=10, segments=150), cost("superpixel_job", 0.001)])
    plan = plan_superpixels([10] * 36_000, 0, CONFIG, costs, replace(CLUSTER, cpus=100_000), 1)
    assert plan.hours == pytest.approx(36_000 * 0.001 / 3600)
    assert plan.limit == "the driver"


@given(
    train=st.floats(0.01, 10), validate=st.floats(0.01, 10), sample=st.floats(0.01, 10), epochs=st.integers(1, 4),
    workers=st.sampled_from([1, 2, 4]), loaders=st.integers(1, 9),
)  # fmt: skip
def test_training_takes_the_sum_over_steps_of_the_slower_of_computing_and_loading(
    train: float, validate: float, sample: float, epochs: int, workers: int, loaders: int
) -> None:
    config = replace(
        CONFIG,
        optim=OptimConfig(epochs=epochs, batch_size=4),
        cluster=replace(CONFIG.cluster, num_workers=workers, loader_cpus=loaders),
    )
    plan = plan_training(
        "pretrain", COUNTS, config, training_costs(config, train, validate, sample), CLUSTER, (100, 30), 99
    )
    seconds = 0.0
    for _ in range(epochs):
        for _ in range(100 // 4):
            seconds += max(4 * train / workers, 4 * sample / loaders)
        seconds += max(10 * validate / workers, 10 * sample / loaders)
    seconds += 2 * max(5 * validate / workers, 5 * sample / loaders)
    assert plan.hours == pytest.approx(seconds / 3600)
    assert plan.cpu_hours == pytest.approx(seconds / 3600 * (workers + loaders))
    assert plan.gpu_hours == 0
    assert plan.storage_bytes == 4 * 100 + 30
    assert plan.memory_bytes == 2e9


def test_gpu_hours_count_workers_and_stay_unknown_where_only_a_cpu_was_measured() -> None:
    on_cpu = training_costs(CONFIG, 1.0, 1.0, 0.1)
    gpus = replace(CONFIG, cluster=replace(CONFIG.cluster, use_gpu=True))
    plan = plan_training("pretrain", COUNTS, gpus, on_cpu, replace(CLUSTER, gpus=2), (1, 1), 99)
    assert plan.hours is plan.gpu_hours is plan.cpu_hours is None
    assert any("train_frame" in name and "device cuda" in name for name in plan.missing)
    measured = plan_training("pretrain", COUNTS, gpus, training_costs(gpus, 1.0, 1.0, 0.01), CLUSTER, (1, 1), 99)
    assert measured.hours is not None
    assert measured.gpu_hours == pytest.approx(2 * measured.hours)


def test_a_cluster_that_is_too_small_is_named() -> None:
    costs = training_costs(CONFIG, 1.0, 1.0, 0.1)
    plan = plan_training("pretrain", COUNTS, CONFIG, costs, replace(CLUSTER, cpus=5), (1, 1), 99)
    assert plan.notes == ("needs 6 CPUs, this cluster has 5",)
    assert plan_training("pretrain", COUNTS, CONFIG, costs, CLUSTER, (1, 1), 99).notes == ()


def test_fine_tuning_has_costs_of_its_own() -> None:
    config = replace(CONFIG, loss=LossConfig(names=("cross_entropy_lovasz",)))
    plan = plan_training("finetune", COUNTS, config, training_costs(CONFIG, 1.0, 1.0, 0.1), CLUSTER, (1, 1), 99)
    assert plan.hours is None


def test_a_later_measurement_replaces_an_earlier_one_of_the_same_thing() -> None:
    costs = Costs([cost("sample", 1.0, job="pretrain"), cost("sample", 2.0, job="finetune")])
    newer = costs.plus([cost("sample", 3.0, job="pretrain")])
    found = newer.find("sample", job="pretrain")
    assert found is not None
    assert found.value == 3.0
    assert len(newer) == 2
    assert newer.find("sample", job="pretrain", cameras=6) is None


def test_the_cost_of_an_image_comes_from_images_of_nearly_its_size() -> None:
    costs = Costs([cost("slic", 2.0, pixels=1_440_000, segments=150), cost("slic", 0.1, pixels=90_000, segments=150)])
    large = plan_superpixels([1_440_000] * 10, 0, CONFIG, costs, CLUSTER, 1)
    assert large.cpu_hours == pytest.approx(20 / 3600)
    assert plan_superpixels([90_000] * 10, 0, CONFIG, costs, CLUSTER, 1).cpu_hours == pytest.approx(1 / 3600)


def test_costs_survive_their_file_and_damage_is_named(tmp_path: Path) -> None:
    costs = Costs([cost("slic", 2.0, pixels=100, segments=150), cost("superpixel_job", 0.001)])
    write_costs(tmp_path / "costs.json", costs)
    assert list(read_costs(tmp_path / "costs.json")) == list(costs)
    (tmp_path / "bad.json").write_text('[{"name": "slic"}]')
    with pytest.raises(CostError, match=r"bad\.json: entry 0"):
        read_costs(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(CostError, match=r"bad\.json: is not readable JSON"):
        read_costs(tmp_path / "bad.json")
    write_costs(tmp_path / "bad.json", Costs([cost("coffee", 1.0)]))
    with pytest.raises(CostError, match="'coffee'"):
        read_costs(tmp_path / "bad.json")


def test_every_packaged_cost_says_what_where_when_and_how() -> None:
    costs = list(read_costs(PACKAGED))
    assert {"slic", "label_map", "superpixel_job", "sample", "train_frame"} <= {each.name for each in costs}
    for each in costs:
        assert each.machine
        assert each.date.startswith("20")
        assert each.command.startswith(("slidr plan ", "python benchmarks/"))
