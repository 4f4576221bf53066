"""Whether this machine, or the cluster, can run a job: Python, packages, engine, GPUs, room for the workers."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata

import torch

from slidr.cluster import session
from slidr.cluster.room import of_one_job, shortage
from slidr.cluster.session import Node
from slidr.config import Config
from slidr.preflight.findings import Finding
from slidr.sparse import cpu_kernels

PYTHONS = ((3, 11), (3, 12))


def python(version: Sequence[int]) -> Finding:
    """The interpreter: one that the locked packages are built for."""
    text = ".".join(str(part) for part in version)
    if tuple(version[:2]) in PYTHONS:
        return Finding("python", "ok", f"{text} at {sys.executable}")
    return Finding("python", "error", f"{text}; slidr needs 3.11 or 3.12", "make install, with python3.11 on the PATH")


def torch_build() -> Finding:
    """The build of torch, and what it can compute on."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Finding("torch", "ok", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def packages(installed: Callable[[str], str | None]) -> Iterable[Finding]:
    """The packages whose versions are pinned, since their behaviour is relied on: as pinned, or not."""
    pinned = [line.split(";")[0].strip() for line in metadata.requires("slidr") or [] if "extra ==" not in line]
    for requirement in (line for line in pinned if "==" in line and not line.startswith("efficientnet")):
        name, _, version = requirement.partition("==")
        name = name.split("[")[0]
        found = installed(name)
        if found == version:
            yield Finding(name, "ok", version)
        else:
            yield Finding(
                name,
                "error" if found is None else "warning",
                f"{found or 'not installed'}; slidr is tested with {version}",
                "pip install --requirement requirements.lock",
            )


def engine(config: Config) -> Finding:
    """The sparse engine that the config asks for can be imported, and is as fast as it can be here."""
    there = importlib.util.find_spec("MinkowskiEngine") is not None
    if config.student.engine == "minkowski" and not there:
        return Finding(
            "engine", "error", "student.engine: minkowski, but MinkowskiEngine is not installed",
            "tools/build_minkowski.sh .venv/bin/python, or --student.engine torch",
        )  # fmt: skip
    if config.student.engine == "torch" and not config.cluster.use_gpu:
        obstacle = cpu_kernels.obstacle()
        if obstacle is not None:
            return Finding("engine", "warning", f"torch, slowly: {obstacle.what}", obstacle.next)
    return Finding("engine", "ok", f"{config.student.engine}" + ("; minkowski is installed" if there else ""))


def gpu(config: Config) -> Finding:
    """The GPUs of this machine, and whether the config needs some here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        name, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0] / 1e9
        return Finding("gpu", "ok", f"{count} x {name}, {free:.0f} GB free, driver for CUDA {torch.version.cuda}")
    if not config.cluster.use_gpu:
        return Finding("gpu", "ok", "none here, and none is asked for")
    if _elsewhere(config) is not None:
        return Finding("gpu", "ok", "none here; the cluster's are asked for")
    reason = (
        "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none; is the driver there?"
    )
    return Finding(
        "gpu", "error", f"cluster.use_gpu: true, but no GPU: {reason}",
        "nvidia-smi shows the driver; without a GPU: --cluster.use_gpu false --optim.precision float32",
    )  # fmt: skip


def room(config: Config, search: bool = False) -> Finding:
    """Whether a private cluster on this machine holds the training, or with `search` one job of a search.

    A running cluster is asked by `cluster`.
    """
    where = _elsewhere(config)
    if where is not None:
        return Finding("cluster", "ok", f"training on the cluster at {where}")
    if config.cluster.max_workers == 0:
        return Finding("cluster", "ok", "training in one process, without Ray")
    cpus = config.cluster.local_cpus or os.cpu_count() or 1
    return _room([Node(cpus, torch.cuda.device_count())], f"this machine, as {cpus} CPUs", config, search)


def cluster(config: Config, search: bool = False) -> Finding:
    """What the named cluster has, against the needs of the training, or with `search` of one job of a search."""
    where = _elsewhere(config)
    if where is None:
        return room(config, search)
    try:
        session.start(config.cluster)
    except session.ClusterError as error:
        what, _, step = str(error).partition("; ")  # what is wrong; what to do
        return Finding("cluster", "error", what, step or "ray start --head, or --cluster.address null")
    nodes = session.nodes()
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return _room(nodes, f"{where}: {len(nodes)} nodes, {cpus} CPUs, {gpus} GPUs", config, search)


def installed(name: str) -> str | None:
    """The version of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _elsewhere(config: Config) -> str | None:
    """The running cluster that a job would join, or None for a private one."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS")


def _room(nodes: Sequence[Node], where: str, config: Config, search: bool) -> Finding:
    needs = of_one_job(config.cluster) if search else config.cluster
    problem = shortage(needs, nodes) if config.cluster.max_workers else None
    if problem is None:
        what = "a job of the search" if search else "the workers and the loader"
        return Finding("cluster", "ok", f"{where}: holds {what}")
    if config.cluster.scale_up_s > 0:
        return Finding("cluster", "warning", problem, f"waits {config.cluster.scale_up_s:g} s for an autoscaler")
    return Finding(
        "cluster", "error", problem, "or plan another cluster: slidr plan CONFIG --nodes N --cpus C --gpus G"
    )
