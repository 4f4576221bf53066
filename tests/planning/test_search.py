"""Plans of a search: what a loop over its trials and finals adds up to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.config import ClusterConfig, Config, EvaluationConfig, LossConfig, OptimConfig, SpaceConfig, TuneConfig
from slidr.planning.costs import Costs, UnitCost
from slidr.planning.estimate import Machines, train_setting
from slidr.planning.search import Labels, plan_search
from slidr.tuning.agenda import SearchAgenda, run_here
from slidr.tuning.jobs import End, Group, Job

TRAIN, VALIDATE, SAMPLE = 0.5, 0.25, 0.125
LABELS = [Labels(0.1, trial=40, final=50, val=6, scored=30), Labels(1.0, trial=400, final=500, val=6, scored=30)]
CONFIG = Config(
    loss=LossConfig(names=("cross_entropy_lovasz",)),
    optim=OptimConfig(epochs=9, batch_size=4),
    evaluation=EvaluationConfig(),
    cluster=ClusterConfig(num_workers=1, cpus_per_worker=2),
    tune=TuneConfig(fractions=(0.1, 1.0), trials=6, round_size=2, seeds=3, grace_epochs=2, pruner="asha"),
)
ONE_JOB = Machines(cpus=2, gpus=0, name="room for one job")


def costs_of(config: Config) -> Costs:
    setting = train_setting("finetune", config)

    def cost(name: Any, value: float, **of: Any) -> UnitCost:
        return UnitCost(name, value, of, "a machine", "2026-01-01", "a command")

    return Costs(
        [
            cost("sample", SAMPLE, job="finetune", dataset="nuscenes"),
            cost("train_frame", TRAIN, **setting),
            cost("validate_frame", VALIDATE, **setting),
            cost("worker_memory", 2e9, **setting),
        ]
    )


def plan(config: Config, machines: Machines = ONE_JOB) -> Any:
    return plan_search(LABELS, config, costs_of(config), machines, (100, 30))


def seconds_of(job: Job, config: Config, epochs: int) -> float:
    """One training by a loop over its steps and validations."""
    loading = 0.0 if config.cluster.use_gpu else SAMPLE  # beside a GPU that is slower
    (labels,) = [labels for labels in LABELS if labels.fraction == job.group.fraction]
    keyframes, val = (labels.trial, labels.val) if job.kind == "trial" else (labels.final, 1)
    batch = job.values.get("batch_size", config.optim.batch_size)
    seconds = 0.0
    for _ in range(epochs):
        for _ in range(keyframes // batch):
            seconds += batch * (TRAIN + loading)
        seconds += val * (VALIDATE + loading)
    return seconds + (labels.scored * (VALIDATE + loading) if job.kind == "final" else 0.0)


def search(config: Config, pruned: bool) -> float:
    """Seconds of a search that the real agenda hands out, where a trial that can be ended early is, or none is."""
    groups = [Group(fraction, method) for fraction in config.tune.fractions for method in config.tune.methods]
    agenda = SearchAgenda(groups, config.tune, 0, lambda job: None, lambda job: config.optim.epochs)
    seconds = 0.0

    def run(job: Job) -> End:
        nonlocal seconds
        early = pruned and bool(job.bounds)
        seconds += seconds_of(job, config, min(job.bounds) if early else config.optim.epochs)
        rungs = [(float(epoch), 0.1) for epoch in range(1, config.optim.epochs + 1)]
        return End("pruned" if early else "finished", 0.1, curve=tuple(rungs))

    run_here(agenda, run)
    for group in groups:
        for index in range(config.tune.seeds):
            seconds += seconds_of(Job(group, "final", index, {}), config, config.optim.epochs)
    return seconds


@given(
    trials=st.integers(1, 9), round_size=st.integers(1, 4), reduction=st.integers(2, 4), grace=st.integers(1, 12),
    seeds=st.integers(1, 3), asha=st.booleans(),
)  # fmt: skip
def test_a_search_takes_what_its_jobs_take_one_by_one(
    trials: int, round_size: int, reduction: int, grace: int, seeds: int, asha: bool
) -> None:
    tune = replace(
        CONFIG.tune, trials=trials, round_size=round_size, reduction=reduction, grace_epochs=grace, seeds=seeds,
        pruner="asha" if asha else "none",
    )  # fmt: skip
    config = replace(CONFIG, tune=tune)
    found = plan(config)
    assert found.hours == pytest.approx(search(config, pruned=False) / 3600)
    assert found.cpu_hours == pytest.approx(2 * found.hours)
    assert found.gpu_hours == 0
    spared = [note for note in found.notes if "ASHA" in note]
    assert len(spared) == asha
    if asha:
        assert float(spared[0].rpartition(" ")[2]) == pytest.approx(2 * search(config, pruned=True) / 3600, rel=5e-3)


def test_jobs_run_side_by_side_but_rounds_one_after_the_other_and_finals_last() -> None:
    alone, crowd = plan(CONFIG), plan(CONFIG, Machines(cpus=8, gpus=0, name="four"))
    assert crowd.cpu_hours == alone.cpu_hours
    assert alone.hours / 4 <= crowd.hours < alone.hours
    without_end = plan(CONFIG, Machines(cpus=10_000, gpus=0, name="any number"))
    group = Group(1.0, "random")
    trial, final = (seconds_of(Job(group, kind, 0, {}), CONFIG, 9) for kind in ("trial", "final"))  # type: ignore[arg-type]
    assert without_end.hours == pytest.approx((3 * trial + final) / 3600)  # three rounds of two


def test_a_trial_is_planned_with_the_longest_that_its_space_allows() -> None:
    space = SpaceConfig(lr=(0.1, 0.2), epochs=(3, 12), batch_size=(4, 8))
    tune = replace(CONFIG.tune, pretrained=space, random=space, searcher="grid", trials=None, pruner="none")
    longer = replace(CONFIG, tune=tune)
    as_listed = replace(CONFIG, tune=replace(tune, pretrained=SpaceConfig(lr=tuple(range(1, 9)))))
    as_listed = replace(as_listed, tune=replace(as_listed.tune, random=as_listed.tune.pretrained))
    as_listed = replace(as_listed, optim=replace(CONFIG.optim, epochs=12))
    assert plan(longer).work.startswith("32 trials, 12 finals")  # 2 x 2 x 2 of each of four
    assert plan(longer).hours == pytest.approx(plan(as_listed).hours)


def test_gpus_set_how_many_jobs_run_and_a_cluster_without_is_named() -> None:
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, use_gpu=True))
    two = plan(config, Machines(cpus=64, gpus=2, name="two GPUs"))
    assert two.limit == "training, 2 jobs at a time"
    assert two.gpu_hours == pytest.approx(two.cpu_hours / 2)
    assert two.gpu_hours == pytest.approx(search(config, pruned=False) / 3600)
    assert "a job needs 2 CPUs and 1 GPUs, this cluster has 64 and 0" in plan(config, Machines(64, 0, "none")).notes
    unknown = plan_search(LABELS, config, costs_of(CONFIG), ONE_JOB, (100, 30))
    assert unknown.hours is unknown.gpu_hours is None
    assert any("device cuda" in name for name in unknown.missing)
    assert not [note for note in unknown.notes if "ASHA" in note]


def test_finals_keep_their_students_and_running_jobs_two_checkpoints() -> None:
    assert plan(CONFIG).storage_bytes == 1 * 2 * 100 + 4 * 3 * 30 + 4 * 30
