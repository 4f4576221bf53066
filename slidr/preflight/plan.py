"""`slidr plan`: a config's jobs, counted from its frame table, and what each takes on a given cluster."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from slidr.cluster import session
from slidr.cluster.superpixels import folder_of
from slidr.config import Config, TuneConfig
from slidr.config.marks import Count, Natural
from slidr.data import storage
from slidr.data.frames import open_table
from slidr.data.loading import subset_frames
from slidr.models.students import build_student
from slidr.models.teachers import build_teacher
from slidr.ops.superpixels import HEAP_PER_PIXEL
from slidr.planning.costs import PACKAGED, Costs, UnitCost, read_costs, write_costs
from slidr.planning.estimate import Estimate, Machines, TrainingName, plan_superpixels, plan_training
from slidr.planning.measure import measure
from slidr.planning.search import Labels, plan_search
from slidr.training.segment import HEAD
from slidr.tuning.jobs import Group, Job, job_config


@dataclass(frozen=True)
class PlanOptions:
    """Options of `slidr plan`. Without --nodes: the cluster of cluster.address, else this machine."""

    nodes: Count | None = None  # machines of the cluster to plan for
    cpus: Count = 1  # of each node
    gpus: Natural = 0  # of each node
    measure: bool = False  # measure the unit costs on this machine first
    costs: str | None = None  # a file of unit costs besides the package's; --measure writes there
    json: bool = False  # print JSON


def run_plan(config: Config, options: PlanOptions, command: str, console: Console) -> list[Estimate]:
    """Prints what a config's jobs take; returns the estimates.

    Unit costs: the package's, then those of `options.costs`, then what `options.measure` measures now.
    """
    costs = read_costs(PACKAGED)
    own = Costs()
    if options.costs is not None and (not options.measure or storage.exists(options.costs)):
        own = read_costs(options.costs)
    if options.measure:
        with console.status("measuring") as status:
            fresh = measure(config, job_of(config), command, lambda what: status.update(f"measuring {what}"))
        own = own.plus(fresh)
        if options.costs is not None:
            write_costs(options.costs, own)
    machines = machines_of(config, options)
    estimates = estimate(config, costs.plus(own), machines)
    if options.json:
        print(json.dumps({"cluster": asdict(machines), "jobs": [asdict(each) for each in estimates]}, indent=2))
    else:
        show(estimates, machines, Console(highlight=False, soft_wrap=True))
    return estimates


def job_of(config: Config) -> TrainingName:
    """What a config trains: with labels it is fine-tuning."""
    return "finetune" if "cross_entropy_lovasz" in config.loss.names else "pretrain"


def has_search(config: Config) -> bool:
    """Whether a config is one of `slidr tune`: it has labels to train on, and says what to search."""
    return job_of(config) == "finetune" and config.tune != TuneConfig()


def estimate(config: Config, costs: Costs, machines: Machines) -> list[Estimate]:
    """A config's jobs, in the order they are run: a search's where the config has one."""
    job = job_of(config)
    if has_search(config):
        return [plan_search(labels_of(config), config, costs, machines, state_bytes(config, job))]
    counts = {subset: len(subset_frames(config, subset)) for subset in ("train", "val", "score")}
    cameras = subset_frames(config, "train")[0].cameras
    pixels = max((camera.width * camera.height for camera in cameras), default=1)
    training = plan_training(job, counts, config, costs, machines, state_bytes(config, job), pixels)
    if job == "finetune":
        return [training]
    sizes, there = images_to_cut(config)
    return [plan_superpixels(sizes, there, config, costs, machines, HEAP_PER_PIXEL), training]


def labels_of(config: Config) -> list[Labels]:
    """The keyframes of each label fraction that `slidr tune` searches."""
    found, tune = [], config.tune
    scored = len(open_table(config.data.frames, config.data.dataset).select(tune.final_split)) * config.evaluation.votes
    for fraction in tune.fractions:
        group = Group(fraction, tune.methods[0])
        trial, final = (job_config(config, Job(group, kind, 0, {})) for kind in ("trial", "final"))
        found.append(
            Labels(
                fraction=fraction,
                trial=len(subset_frames(trial, "train")),
                final=len(subset_frames(final, "train")),
                val=len(subset_frames(trial, "val")),
                scored=scored,
            )
        )
    return found


def machines_of(config: Config, options: PlanOptions) -> Machines:
    """The cluster that the options describe, else the connected or named one, else this machine."""
    if options.nodes is not None:
        many = "1 node" if options.nodes == 1 else f"{options.nodes} nodes"
        name = f"{many} of {options.cpus} CPUs and {options.gpus} GPUs"
        return Machines(options.nodes * options.cpus, options.nodes * options.gpus, name)
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        return Machines(config.cluster.local_cpus or os.cpu_count() or 1, torch.cuda.device_count(), "this machine")
    session.start(config.cluster)
    nodes = session.nodes()
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return Machines(cpus, gpus, f"the cluster at {address}: {len(nodes)} nodes, {cpus} CPUs, {gpus} GPUs")


def images_to_cut(config: Config) -> tuple[list[int], int]:
    """The pixels of each distinct image that `slidr superpixels` looks at, and how many have a map already."""
    table = open_table(config.data.frames, config.data.dataset).select((config.data.train_split, config.data.val_split))
    images = table.image_list(config.data.cameras).distinct()
    names = storage.list_names(folder_of(config.superpixels))
    return images.pixels.tolist(), sum(f"{token}.png" in names for token in images.tokens)


def state_bytes(config: Config, job: TrainingName) -> tuple[int, int]:
    """Bytes of a checkpoint (networks and the optimizer's moments) and of a student file, from the shapes alone."""
    with torch.device("meta"):
        student = build_student(config.student)
        modules: list[nn.Module] = [student]
        if job == "pretrain":
            modules.append(build_teacher(config.teacher.name, config.student.out_channels, weights=None).head)
    trained = [
        parameter
        for module in modules
        for name, parameter in module.named_parameters()
        if not (config.student.freeze and job == "finetune") or name.startswith(HEAD)
    ]
    moments = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
    networks = sum(_bytes(module.state_dict().values()) for module in modules)
    return networks + moments * _bytes(trained), _bytes(student.state_dict().values())


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def show(estimates: list[Estimate], machines: Machines, console: Console) -> None:
    """The estimates as a table, what they rest on, and what nobody measured."""
    table = Table(title=f"on {machines.name}", title_justify="left")
    for column in ("", *(each.job for each in estimates)):
        table.add_column(column)
    rows: dict[str, Any] = {
        "work": lambda e: e.work,
        "hours": lambda e: _number(e.hours),
        "CPU-hours": lambda e: _number(e.cpu_hours),
        "GPU-hours": lambda e: _number(e.gpu_hours),
        "storage": lambda e: _size(e.storage_bytes),
        "memory": lambda e: f"{_size(e.memory_bytes)} ({e.memory_of})",
        "bound by": lambda e: e.limit,
    }
    for name, value in rows.items():
        table.add_row(name, *(value(each) for each in estimates))
    console.print(table)
    for note in (f"{each.job}: {note}" for each in estimates for note in each.notes):
        console.print(note)
    basis = dict.fromkeys(_key(cost) for each in estimates for cost in each.basis)
    sources = list(dict.fromkeys(source for _, source in basis))
    if basis:
        console.print("measured:")
    for value, source in basis:
        console.print(f"  {value} [{sources.index(source) + 1}]", markup=False)
    for number, source in enumerate(sources, 1):
        console.print(f"  [{number}] {source}", markup=False)
    missing = dict.fromkeys(name for each in estimates for name in each.missing)
    if missing:
        console.print("not measured, by anyone; `slidr plan CONFIG --measure` on a machine of that kind does it:")
        for name in missing:
            console.print(f"  {name}")


def _key(cost: UnitCost) -> tuple[str, str]:
    """A unit cost in words, and where it comes from."""
    setting = ", ".join(f"{key} {value}" for key, value in cost.setting.items())
    return f"{cost.name} {cost.value:g} {cost.unit}: {setting}", f"{cost.machine}, {cost.date}: {cost.command}"


def _number(value: float | None) -> str:
    if value is None:
        return "not measured"
    return "< 0.01" if 0 < value < 0.01 else f"{value:.3g}"


def _size(value: float | None) -> str:
    if value is None:
        return "not measured"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
