"""What a well-typed config must fulfil besides: ranges (see `marks`), and keys that agree. One function a section."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, get_args

from slidr.config.marks import wrong_numbers
from slidr.config.schema import (
    MINKUNET_STRIDE,
    ClusterConfig,
    Config,
    ConfigError,
    DemoConfig,
    LossConfig,
    LossName,
    MethodName,
    OptimConfig,
    RunConfig,
    SearcherName,
    SpaceConfig,
    TuneConfig,
)
from slidr.types import CAMERA_CHANNELS

Require = Callable[[bool, str, str], None]  # what must hold, the key, what to say where it does not

_ROUNDED = 0.05  # how far a label fraction may be off the 1/k that it stands for, as a share
_MANY_WORKERS = 4096  # beyond it no batch divides anyway


def step_of(fraction: float) -> int:
    """A fraction takes every k-th item, and is 1/k for a whole k: 0.01 is every 100th.

    Rounded figures pass (0.33, 0.17): what is within 5 % of a 1/k is taken for it. Raises `ValueError` for the
    others, with the nearest possible ones, and outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"got {fraction}, expected 0 < fraction <= 1 (0.01 is every 100th)")
    step = round(1 / fraction)
    if abs(fraction * step - 1) > _ROUNDED:
        below = math.floor(1 / fraction)
        raise ValueError(
            f"got {fraction:g}, but a fraction takes every k-th item; the nearest are {1 / (below + 1):.3g} "
            f"(k = {below + 1}) and {1 / below:.3g} (k = {below})"
        )
    return step


def check(config: Config, source: str = "config") -> None:
    """Raises `ConfigError`, with every key at fault, for values that are well typed but cannot work together."""
    problems: list[str] = []

    def require(ok: bool, key: str, message: str) -> None:
        if not ok:
            problems.append(f"{source}: {key}: {message}")

    check_numbers(config, source)  # first: what the rules compute with others would be nonsense
    _data(config, require)
    _student(config, require)
    _loss(config.loss, config.student.out_channels, require)
    _pretraining(config, require)
    _optim(config.optim, config.cluster, config.evaluation.checkpoint is not None, require)
    _run(config, require)
    _cluster(config.cluster, require)
    _tune(config.tune, _shares(config.cluster, config.optim), require)
    _demo(config.demo, require)
    if problems:
        raise ConfigError("\n".join(problems))


def check_numbers(section: Any, source: str = "config", key: str = "") -> None:
    """Raises `ConfigError` for every number of a section that is not finite or outside its key's range.

    A section is any dataclass whose numbers have `Limits`; `key` is its own name.
    """
    problems = [f"{source}: {name}: {fault}" for name, fault in wrong_numbers(section, key)]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _data(config: Config, require: Require) -> None:
    data, voxel = config.data, config.data.voxel
    unknown = [name for name in data.cameras if name not in CAMERA_CHANNELS]
    require(not unknown, "data.cameras", f"unknown {unknown}; nuScenes has {list(CAMERA_CHANNELS)}")
    require(len(data.cameras) > 0, "data.cameras", "expected at least one")
    require(
        data.allow_missing is None or data.dataset == "nuscenes",
        "data.allow_missing",
        f"got {data.allow_missing}, which is for nuscenes; slidr frames takes those scans of {data.dataset} "
        "that are there and names the missing ones; set null",
    )
    _fraction(data.train_fraction, "data.train_fraction", require)
    for key, (low, high) in {
        "scale": data.augment.scale,
        "crop_area": data.augment.crop_area,
        "crop_aspect": data.augment.crop_aspect,
    }.items():
        require(low <= high, f"data.augment.{key}", f"got [{low}, {high}], expected 0 < low <= high")
    require(
        not (config.student.name == "voxelnet" and voxel.cylindrical),
        "data.voxel.cylindrical",
        "voxelnet's grid is Cartesian; set false",
    )
    require(
        not (voxel.azimuth_wrap and not voxel.cylindrical),
        "data.voxel.azimuth_wrap",
        "only cylindrical voxels have an azimuth",
    )
    degrees, cells = voxel.size[1], voxel.azimuth_cells
    require(
        cells is None or (cells % MINKUNET_STRIDE == 0 and cells > 0 and abs(cells * degrees - 360) < 1e-6),
        "data.voxel.azimuth_wrap",
        f"needs a multiple of {MINKUNET_STRIDE} (the network's total stride) azimuth cells of data.voxel.size[1] = "
        f"{degrees} degrees to make 360; set 1.125 (320 cells), 0.9375 (384) or 0.75 (480) degrees",
    )
    require(
        not (voxel.azimuth_wrap and config.student.engine == "minkowski"),
        "data.voxel.azimuth_wrap",
        "MinkowskiEngine's kernels do not reach across the seam; set student.engine: torch",
    )


def _fraction(fraction: float, key: str, require: Require) -> None:
    try:
        step_of(fraction)
    except ValueError as error:
        require(False, key, str(error))


def _student(config: Config, require: Require) -> None:
    student = config.student
    voxelnet = student.name == "voxelnet"
    require(
        not (voxelnet and student.engine == "minkowski"),
        "student.engine",
        "voxelnet runs on the torch engine only; set student.engine: torch",
    )
    require(not (voxelnet and student.width != 1.0), "student.width", "voxelnet has one width; set 1.0")


def _loss(loss: LossConfig, classes: int, require: Require) -> None:
    require(len(loss.names) > 0, "loss.names", f"expected at least one of {list(get_args(LossName))}")
    require(
        "cross_entropy_lovasz" not in loss.names or len(loss.names) == 1,
        "loss.names",
        "cross_entropy_lovasz is for labels, the others for images; it stands alone",
    )
    weights = loss.class_weights
    require(
        weights is None or len(weights) == classes,
        "loss.class_weights",
        f"expected one weight for each of student.out_channels ({classes}) classes",
    )


def _pretraining(config: Config, require: Require) -> None:
    """Refuses what only fine-tuning reads, in a config that learns from images."""
    if "cross_entropy_lovasz" in config.loss.names:
        return
    for key, given in {
        "student.freeze": config.student.freeze,
        "optim.head_lr": config.optim.head_lr is not None,
        "loss.class_weights": config.loss.class_weights is not None,
    }.items():
        require(not given, key, "is of fine-tuning (loss.names: [cross_entropy_lovasz]); pretraining does not read it")


def _optim(optim: OptimConfig, cluster: ClusterConfig, evaluates: bool, require: Require) -> None:
    # An evaluation is a run of no steps.
    least = 0 if evaluates else 1
    require(
        optim.max_steps is None or optim.max_steps >= least,
        "optim.max_steps",
        f"got {optim.max_steps}, expected at least 1, or null for all epochs",
    )
    few, many = cluster.min_workers, cluster.max_workers
    shares = _shares(cluster, optim)
    remedy = f"use a multiple of {shares}" if shares < 100_000 else "allow fewer numbers of workers"
    require(
        optim.batch_size % shares == 0,
        "optim.batch_size",
        f"{optim.batch_size} frames do not divide over {max(1, few) if few == many else f'each of {few} to {many}'} "
        f"workers x {optim.accumulate} micro-batches; {remedy}",
    )
    require(
        optim.precision == "float32" or cluster.use_gpu,
        "optim.precision",
        f"{optim.precision} needs cluster.use_gpu: true",
    )


def _shares(cluster: ClusterConfig, optim: OptimConfig) -> int:
    """What a batch must divide by: every number of workers that a run may have takes the same batch."""
    few, many = cluster.min_workers, min(cluster.max_workers, _MANY_WORKERS)
    return math.lcm(*range(max(1, few), many + 1)) * max(1, optim.accumulate)


def _run(config: Config, require: Require) -> None:
    run: RunConfig = config.run
    require(
        re.fullmatch(r"\w[\w.-]*", run.name) is not None,
        "run.name",
        f"got {run.name!r}, expected letters, digits, '.', '_' and '-': it names a folder",
    )
    require(
        "://" not in run.folder or config.tracking.uri is not None,
        "tracking.uri",
        f"run.folder is in an object store ({run.folder}), where the default sqlite file cannot lie; set a "
        f"tracking server's http:// address or sqlite:////path/mlflow.db",
    )


def _cluster(cluster: ClusterConfig, require: Require) -> None:
    few, many = cluster.min_workers, cluster.max_workers
    require(
        0 <= few <= many and (few > 0 or not cluster.elastic),
        "cluster.num_workers",
        f"got {cluster.num_workers}, expected 0 (in this process), a number of workers, or [min, max] with "
        f"1 <= min <= max",
    )


def _tune(tune: TuneConfig, shares: int, require: Require) -> None:
    """`shares`: what a batch size must divide by."""
    require(len(tune.fractions) > 0, "tune.fractions", "expected at least one")
    for fraction in tune.fractions:
        _fraction(fraction, "tune.fractions", require)
    require(
        len(set(tune.fractions)) == len(tune.fractions),
        "tune.fractions",
        f"got {list(tune.fractions)}, expected distinct ones",
    )
    require(
        len(tune.methods) == len(set(tune.methods)) > 0,
        "tune.methods",
        f"got {list(tune.methods)}, expected one or both of {list(get_args(MethodName))}",
    )
    spaces: dict[MethodName, SpaceConfig] = {"pretrained": tune.pretrained, "random": tune.random}
    for method, space in spaces.items():
        _space(f"tune.{method}", space, tune.searcher, shares, require)
    require(
        (tune.trials is None) == (tune.searcher == "grid"),
        "tune.trials",
        "a grid has as many trials as combinations (null); random and tpe need a number",
    )
    require(tune.final_split != "test", "tune.final_split", "test has no public labels to score")


def _space(path: str, space: SpaceConfig, searcher: SearcherName, shares: int, require: Require) -> None:
    for name, values in dataclasses.asdict(space).items():
        key = f"{path}.{name}"
        ascending = all(a < b for a, b in itertools.pairwise(values))
        require(ascending, key, f"got {list(values)}, expected distinct values in ascending order")
    # Proposals are drawn in the logarithm.
    require(0 not in space.weight_decay or searcher == "grid", f"{path}.weight_decay", "expected positive numbers")
    require(
        all(size % shares == 0 for size in space.batch_size),
        f"{path}.batch_size",
        f"got {list(space.batch_size)}, expected multiples of {shares}, as for optim.batch_size",
    )


def _demo(demo: DemoConfig, require: Require) -> None:
    require(len(set(demo.seeds)) == len(demo.seeds) >= 1, "demo.seeds", f"got {demo.seeds}, expected distinct seeds")
