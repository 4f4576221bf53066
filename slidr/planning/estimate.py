"""Hours, storage and memory of a job, from its counts, unit costs and a cluster: arithmetic, no files.

What nobody measured stays None, and its name is in `Estimate.missing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from slidr.config import Config
from slidr.planning.costs import CostName, Costs, UnitCost
from slidr.training.optim import total_steps

JobName = Literal["superpixels", "pretrain", "finetune", "tune"]
TrainingName = Literal["pretrain", "finetune"]
STUDENT_FILE = 1  # copies of the student besides the checkpoints


@dataclass(frozen=True)
class Machines:
    """A cluster: its CPUs and GPUs, and what to call it."""

    cpus: int
    gpus: int
    name: str


@dataclass(frozen=True)
class Estimate:
    """What a job takes. None: a unit cost it needs was not measured; `missing` says which."""

    job: JobName
    work: str
    hours: float | None
    cpu_hours: float | None
    gpu_hours: float | None
    storage_bytes: float | None
    memory_bytes: float | None  # of the process that `memory_of` names
    memory_of: str
    limit: str  # what the hours go to
    basis: tuple[UnitCost, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Ledger:
    """The unit costs that an estimate asked for: those found, and those nobody measured."""

    costs: Costs
    basis: list[UnitCost] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def take(self, name: CostName, pixels: float | None = None, **setting: Any) -> UnitCost | None:
        found = self.costs.find(name, **setting) if pixels is None else self.costs.nearest(name, pixels, **setting)
        return self._note(name, found, setting)

    def _note(self, name: CostName, entry: UnitCost | None, setting: dict[str, Any]) -> UnitCost | None:
        if entry is None:
            details = ", ".join(f"{key} {value}" for key, value in setting.items())
            text = f"{name} ({details})" if details else name
            if text not in self.missing:
                self.missing.append(text)
        elif entry not in self.basis:
            self.basis.append(entry)
        return entry


def plan_superpixels(
    pixels: list[int], there: int, config: Config, costs: Costs, machines: Machines, bytes_per_pixel: int
) -> Estimate:
    """The superpixel job over images of so many `pixels`, of which `there` have their map already.

    Costs of an image grow with its pixels. The job takes as long as its CPUs need, or as the driver needs to list,
    schedule and gather: whichever is longer. `bytes_per_pixel`: heap of one task.
    """
    ledger = Ledger(costs)
    share = (len(pixels) - there) / max(len(pixels), 1)
    cpus = min(config.cluster.superpixel_cpus or machines.cpus, machines.cpus)
    typical, segments = sum(pixels) / max(len(pixels), 1), config.superpixels.segments
    compute = _by_pixels(ledger.take("slic", pixels=typical, segments=segments), pixels)
    maps = _by_pixels(ledger.take("label_map", pixels=typical, segments=segments), pixels)
    overhead = ledger.take("superpixel_job")
    hours = cpu_hours = None
    limit = "not known"
    if compute is not None:
        cpu_hours = compute * share / 3600
        driver = overhead.value * len(pixels) * share / 3600 if overhead is not None else 0.0
        hours = max(cpu_hours / cpus, driver)
        limit = "the driver" if driver > cpu_hours / cpus else f"{cpus} CPUs"
    return Estimate(
        job="superpixels",
        work=f"{len(pixels)} images" + (f", {there} done already" if there else ""),
        hours=hours,
        cpu_hours=cpu_hours,
        gpu_hours=0.0,
        storage_bytes=maps,
        memory_bytes=float(bytes_per_pixel * max(pixels, default=0)),
        memory_of="each CPU's task",
        limit=limit,
        basis=tuple(ledger.basis),
        missing=tuple(ledger.missing),
    )


def plan_training(
    job: TrainingName,
    counts: dict[str, int],
    config: Config,
    costs: Costs,
    machines: Machines,
    state_bytes: tuple[int, int],
    pixels: int,
) -> Estimate:
    """Pretraining or fine-tuning over `counts` of "train", "val" and "score" keyframes.

    Training and loading run side by side, so a step takes as long as the slower of the two; each epoch ends with a
    validation. `state_bytes`: of a checkpoint, and of a student file; `pixels`: of an image.
    """
    ledger = Ledger(costs)
    optim, cluster = config.optim, config.cluster
    per_epoch = max(1, counts["train"] // optim.batch_size)
    steps = total_steps(optim, per_epoch)
    epochs = math.ceil(steps / per_epoch)
    # After the last epoch: scores, of pretraining those of the untrained networks, too.
    validated = epochs * counts["val"] + (2 * counts["score"] if job == "pretrain" else 0)
    course = course_of(ledger, job, steps * optim.batch_size, validated, config, pixels)
    hours, workers = course.hours, max(1, cluster.max_workers)
    memory = ledger.take("worker_memory", **train_setting(job, config))
    reserved = reserved_cpus(config)
    checkpoint, student = state_bytes
    return Estimate(
        job=job,
        work=f"{steps} steps of {optim.batch_size} keyframes, {epochs} epochs, {validated} validated",
        hours=hours,
        cpu_hours=None if hours is None else hours * reserved,
        gpu_hours=None if hours is None else hours * workers * cluster.use_gpu,
        storage_bytes=float((config.run.keep_checkpoints + 1) * checkpoint + STUDENT_FILE * student),
        memory_bytes=None if memory is None else memory.value,
        memory_of="each worker",
        limit=_limit(course, config),
        basis=tuple(ledger.basis),
        missing=tuple(ledger.missing),
        notes=room_notes(config, machines),
    )


@dataclass(frozen=True)
class Course:
    """Hours of one training; `hours` is None where nobody measured what they rest on."""

    hours: float | None
    computing: float
    loading: float


def course_of(
    ledger: Ledger, job: TrainingName, trained: float, validated: float, config: Config, pixels: int | None = None
) -> Course:
    """The hours of one training that takes so many keyframes through its steps and through its validations."""
    cluster = config.cluster
    # An elastic run is planned with the most workers it may have.
    alone, workers = cluster.max_workers == 0, max(1, cluster.max_workers)
    # A process alone loads in between its steps, or, on a GPU, with its other CPUs beside them.
    beside = cluster.use_gpu or not alone
    loaders = cluster.loader_cpus if not alone else max(1, cluster.cpus_per_worker - 1) if beside else 1
    if job == "pretrain":
        sample = ledger.take("sample", pixels=pixels, job=job)
    else:
        sample = ledger.take("sample", job=job, dataset=config.data.dataset)
    hours: float | None = 0.0
    computing = loading = 0.0
    frames: dict[CostName, float] = {"train_frame": trained, "validate_frame": validated}
    for name, count in frames.items():
        unit = ledger.take(name, **train_setting(job, config))
        if unit is None or sample is None:
            hours = None
            continue
        compute = unit.value * count / workers / 3600
        load = sample.value * count / loaders / 3600
        computing, loading = computing + compute, loading + load
        if hours is not None:
            hours += max(compute, load) if beside else compute + load
    return Course(hours, computing, loading)


def train_setting(job: TrainingName, config: Config) -> dict[str, Any]:
    """What a training step's cost depends on, as unit costs name it."""
    student, data = config.student, config.data
    shared = {
        "job": job,
        "device": "cuda" if config.cluster.use_gpu else "cpu",
        "student": student.name,
        "width": student.width,
        "precision": config.optim.precision,
        "voxel": list(data.voxel.size),
    }
    if job == "finetune":
        return {**shared, "dataset": data.dataset, "freeze": student.freeze}
    return {**shared, "teacher": config.teacher.name, "image_size": list(data.image_size)}


def _by_pixels(cost: UnitCost | None, pixels: list[int]) -> float | None:
    """An image's cost over all images, in proportion to their size."""
    return None if cost is None else cost.value * sum(pixels) / cost.setting["pixels"]


def _limit(course: Course, config: Config) -> str:
    if course.hours is None:
        return "not known"
    cluster = config.cluster
    if cluster.max_workers and course.loading > course.computing:
        return f"loading, on {cluster.loader_cpus} CPUs: raise cluster.loader_cpus"
    return f"training, on {max(1, cluster.max_workers)} {'GPU' if cluster.use_gpu else 'CPU'} workers"


def reserved_cpus(config: Config) -> int:
    """CPUs that a training reserves: its workers' and the loader's; one for a training in its caller's process."""
    cluster = config.cluster
    if cluster.max_workers == 0:
        return 1
    return cluster.max_workers * cluster.reserved_cpus + (0 if cluster.elastic else cluster.loader_cpus)


def room_notes(config: Config, machines: Machines) -> tuple[str, ...]:
    """What a cluster lacks for a training."""
    cluster = config.cluster
    if cluster.max_workers == 0:
        return ()
    needed, notes = reserved_cpus(config), []
    if needed > machines.cpus:
        notes.append(f"needs {needed} CPUs, this cluster has {machines.cpus}")
    if cluster.use_gpu and cluster.max_workers > machines.gpus:
        notes.append(f"needs {cluster.max_workers} GPUs, this cluster has {machines.gpus}")
    return tuple(notes)
