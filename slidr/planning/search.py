"""What `slidr tune` will take: arithmetic over its trials and finals, as `estimate` has it for one training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from slidr.config import Config, SpaceConfig
from slidr.planning.costs import Costs
from slidr.planning.estimate import Estimate, Ledger, Machines, course_of, train_setting
from slidr.training.optim import total_steps


@dataclass(frozen=True)
class Labels:
    """One of a search's label fractions, in keyframes.

    `trial` and `final` are trained on, `val` are those of each of a trial's validations, `scored` those that each final
    is scored on (times the votes).
    """

    fraction: float
    trial: int
    final: int
    val: int
    scored: int


@dataclass(frozen=True)
class Length:
    """How long one training is."""

    steps: int
    epochs: int
    keyframes: int  # over all steps


def plan_search(
    labels: Sequence[Labels], config: Config, costs: Costs, machines: Machines, state_bytes: tuple[int, int]
) -> Estimate:
    """Every trial to its last epoch, the longest that its space allows, then the finals: an upper bound.

    With ASHA a note gives the lower one, where every trial is ended by the first rung that can end it. As many jobs run
    at a time as there is room for; the rounds of a fraction and method follow each other, the finals follow all trials.
    `state_bytes` as in `plan_training`.
    """
    ledger, tune, own = Ledger(costs), config.tune, job_of_search(config)
    spaces = {"pretrained": tune.pretrained, "random": tune.random}
    known = course_of(ledger, "finetune", 1, 1, own).hours is not None

    def hours_of(keyframes: float, validated: float) -> float:
        return course_of(ledger, "finetune", keyframes, validated, own).hours or 0.0

    trials, most, least, chain, finals = 0, 0.0, 0.0, 0.0, [0.0]
    notes = []
    for part in labels:
        steps = (0, 0)
        for space in (spaces[method] for method in tune.methods):
            count = combinations(space) if tune.trials is None else tune.trials
            trial, final = longest(part.trial, config, space), longest(part.final, config, space)
            whole = hours_of(trial.keyframes, trial.epochs * part.val)
            share = min(1.0, tune.grace_epochs / trial.epochs)
            first = hours_of(trial.keyframes * share, trial.epochs * share * part.val)
            sure = whole_trials(count, config)
            trials, most, least = trials + count, most + count * whole, least + sure * whole + (count - sure) * first
            chain = max(chain, math.ceil(count / tune.round_size) * whole)
            # A final's training watches one keyframe an epoch.
            finals += [hours_of(final.keyframes, final.epochs + part.scored)] * tune.seeds
            steps = (max(steps[0], trial.steps), max(steps[1], final.steps))
        notes.append(f"{100 * part.fraction:g} % of the labels: at most {steps[0]} steps a trial, {steps[1]} a final")
    places, cpus, gpus = places_of(config, machines), job_cpus(config), job_gpus(config)
    total = most + sum(finals)
    if known and tune.pruner == "asha":
        unit, each = ("GPU-hours", gpus) if gpus else ("CPU-hours", cpus)
        low, high = (least + sum(finals)) * each, total * each
        notes.append(f"all trials to their end: {high:.3g} {unit}; ASHA saves what it ends, down to {low:.3g}")
    memory = ledger.take("worker_memory", **train_setting("finetune", own))
    checkpoint, student = state_bytes
    groups = len(labels) * len(tune.methods)
    return Estimate(
        job="tune",
        work=f"{trials} trials, {groups * tune.seeds} finals ({len(labels)} fractions x {len(tune.methods)} methods)",
        hours=max(most / places, chain) + max(sum(finals) / places, max(finals)) if known else None,
        cpu_hours=total * cpus if known else None,
        gpu_hours=total * gpus if known or not gpus else None,
        # Running jobs keep a checkpoint and the best one, finals their student, and MLflow the winners'.
        storage_bytes=float(places * 2 * checkpoint + groups * (tune.seeds + 1) * student),
        memory_bytes=None if memory is None else memory.value,
        memory_of="each worker",
        limit=f"training, {places} jobs at a time" if known else "not known",
        basis=tuple(ledger.basis),
        missing=tuple(ledger.missing),
        notes=(*notes, *_room_notes(config, machines)),
    )


def job_of_search(config: Config) -> Config:
    """The config of a search's jobs, as far as their speed goes: one worker alone is a process that loads itself."""
    workers = config.cluster.num_workers if config.cluster.max_workers > 1 else 0
    return replace(config, cluster=replace(config.cluster, num_workers=workers))


def job_cpus(config: Config) -> int:
    """CPUs that one job reserves."""
    cluster = config.cluster
    if cluster.max_workers <= 1:
        return cluster.cpus_per_worker
    return cluster.max_workers * cluster.reserved_cpus + (0 if cluster.elastic else cluster.loader_cpus)


def job_gpus(config: Config) -> int:
    """GPUs that one job reserves."""
    return max(1, config.cluster.max_workers) * config.cluster.use_gpu


def places_of(config: Config, machines: Machines) -> int:
    """How many jobs run at a time; at least one is planned with."""
    if config.cluster.max_workers == 0:
        return 1
    places = machines.cpus // job_cpus(config)
    if config.cluster.use_gpu:
        places = min(places, machines.gpus // job_gpus(config))
    return max(1, places)


def _room_notes(config: Config, machines: Machines) -> tuple[str, ...]:
    """What a cluster lacks for a single job."""
    cpus, gpus = job_cpus(config), job_gpus(config)
    if config.cluster.max_workers == 0 or (machines.cpus >= cpus and machines.gpus >= gpus):
        return ()
    return (f"a job needs {cpus} CPUs and {gpus} GPUs, this cluster has {machines.cpus} and {machines.gpus}",)


def combinations(space: SpaceConfig) -> int:
    """How many trials a grid over a space has."""
    lists = (space.lr, space.head_lr, space.weight_decay, space.batch_size, space.epochs)
    return math.prod(len(values) for values in lists if values)


def whole_trials(count: int, config: Config) -> int:
    """How many of a group's trials nothing can end early: those with fewer than `reduction` in the rounds before."""
    tune = config.tune
    if tune.pruner == "none":
        return count
    return min(count, math.ceil(tune.reduction / tune.round_size) * tune.round_size)


def longest(keyframes: int, config: Config, space: SpaceConfig) -> Length:
    """The longest training on so many keyframes among those that a space allows."""
    found = []
    for epochs in space.epochs or (config.optim.epochs,):
        for batch in space.batch_size or (config.optim.batch_size,):
            per_epoch = max(1, keyframes // batch)
            steps = total_steps(replace(config.optim, epochs=epochs), per_epoch)
            found.append(Length(steps, math.ceil(steps / per_epoch), steps * batch))
    return max(found, key=lambda length: length.keyframes)
