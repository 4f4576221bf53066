"""The whole configuration: its schema, how it is read, written and named. Nothing else reads YAML.

A config is plain frozen dataclasses. The same decoder reads YAML files, Ray Tune's trial dicts and the
config inside a checkpoint; it refuses unknown keys, wrong types and combinations that cannot work, naming
the key's path.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from slidr.types import CAMERA_CHANNELS

DatasetName = Literal["nuscenes", "semantic_kitti"]
NuscenesVersion = Literal["v1.0-trainval", "v1.0-mini", "v1.0-test"]
SplitName = Literal["train", "val", "test", "mini_train", "mini_val", "parametrize", "verify", "all"]
StudentName = Literal["minkunet34c", "minkunet18", "minkunet14", "voxelnet"]
Engine = Literal["torch", "minkowski"]
TeacherName = Literal[
    "dilation_resnet50",
    "ppkt_resnet18",
    "ppkt_resnet50",
    "dino_vits16",
    "dino_vits8",
    "dino_vitb16",
    "dino_vitb8",
    "efficientnet_lite0",
]
LossName = Literal["superpixel_info_nce", "point_pixel_info_nce", "cross_entropy_lovasz"]
OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["cosine", "one_cycle", "step", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]
MethodName = Literal["pretrained", "random"]
SearcherName = Literal["grid", "random", "tpe"]
PrunerName = Literal["none", "asha"]
_MANY_WORKERS = 4096  # beyond it no batch divides anyway


MINKUNET_STRIDE = 16


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, what it got and what it takes."""


@dataclass(frozen=True)
class VoxelConfig:
    cylindrical: bool = True  # (rho, phi, z) voxels; false: (x, y, z)
    size: tuple[float, float, float] = (0.1, 1.0, 0.1)  # cylindrical: m, degrees, m; Cartesian: m, m, m
    azimuth_wrap: bool = False  # true: the azimuth has no seam at 180 degrees (the original's has one)

    @property
    def azimuth_cells(self) -> int | None:
        """Azimuth cells of the whole circle, where it is closed."""
        return round(360 / self.size[1]) if self.azimuth_wrap else None


@dataclass(frozen=True)
class AugmentConfig:
    """Training-time augmentation. All of it is off in validation."""

    rotate: bool = True  # about z by U[0, 2 pi)
    flip_axes: bool = True  # x, then y, each with p = 0.5
    scale: tuple[float, float] = (1.0, 1.0)  # global scale, U[low, high]
    drop_cuboid: bool = True
    drop_cuboid_max_side: float = 0.2  # of the cloud's extent
    drop_cuboid_min_pairs: int = 1024  # undone where a camera would keep fewer
    crop: bool = True
    crop_area: tuple[float, float] = (0.3, 1.0)  # of the image
    crop_aspect: tuple[float, float] = (14 / 9, 17 / 9)  # width / height, drawn log-uniformly
    crop_min_pairs: int = 1024  # a crop is drawn again until it keeps more pairs than this ...
    crop_min_share: float = 0.75  # ... or more than this share of the image's pairs
    flip_images: bool = True  # left-right, p = 0.5 per image
    shuffle_cameras: bool = True


@dataclass(frozen=True)
class DataConfig:
    dataset: DatasetName = "nuscenes"
    root: str = "data/nuscenes"  # the dataroot: holds samples/, sweeps/ and the version's folder
    version: NuscenesVersion = "v1.0-trainval"
    frames: str = "data/frames/nuscenes-trainval.parquet"  # the frame table that `slidr frames` writes
    train_split: SplitName = "parametrize"
    val_split: SplitName = "verify"
    train_fraction: float = 1.0  # of the split's scenes (nuScenes) or scans (SemanticKITTI)
    max_val_frames: int | None = None  # validate on this many frames, evenly spread; null: all
    val_batch_size: int = 4  # frames of a validation batch, on one worker
    cameras: tuple[str, ...] = CAMERA_CHANNELS
    image_size: tuple[int, int] = (224, 416)  # height, width fed to the teacher, pixels
    min_depth: float = 1.0  # m; nearer points make no pairs
    voxel: VoxelConfig = field(default_factory=VoxelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class SuperpixelConfig:
    """SLIC parameters. Their fingerprint names the folder of the label maps."""

    folder: str = "data/superpixels"  # holds one folder per parameter set
    segments: int = 150
    compactness: float = 6.0
    sigma: float = 3.0  # pixels


@dataclass(frozen=True)
class StudentConfig:
    name: StudentName = "minkunet34c"
    engine: Engine = "torch"
    out_channels: int = 64
    width: float = 1.0  # multiplies every hidden channel count of a MinkUNet
    bn_momentum: float = 0.05
    weights: str | None = None  # a checkpoint to start from
    freeze: bool = False  # fine-tuning: train the last layer only (a linear probe)


@dataclass(frozen=True)
class TeacherConfig:
    name: TeacherName = "dilation_resnet50"
    weights: str | None = "moco_v2"  # a published name, a path, a URL, or null for random weights
    sha256: str | None = None  # of the weights file


@dataclass(frozen=True)
class LossConfig:
    names: tuple[LossName, ...] = ("superpixel_info_nce",)  # several are averaged
    temperature: float = 0.07
    min_points: int = 1  # superpixels with fewer paired points are dropped
    pairs: int = 4096  # point_pixel_info_nce: pairs drawn per batch and worker
    gather_negatives: bool = False  # true: every worker's superpixels are negatives
    class_weights: tuple[float, ...] | None = None  # cross_entropy_lovasz: of every class, the ignored one included


@dataclass(frozen=True)
class OptimConfig:
    name: OptimizerName = "sgd"
    lr: float = 0.5
    head_lr: float | None = None  # fine-tuning: of the last layer; null: lr
    momentum: float = 0.9
    dampening: float = 0.1
    weight_decay: float = 1e-4
    schedule: ScheduleName = "cosine"  # cosine and step count epochs, one_cycle counts steps
    epochs: int = 50
    max_steps: int | None = None  # optimizer steps after which training ends early
    batch_size: int = 4  # frames per optimizer step, over all workers
    accumulate: int = 1  # micro-batches per optimizer step
    precision: Precision = "float32"  # of the forward pass; float16 and bfloat16 on GPU only


@dataclass(frozen=True)
class EvaluationConfig:
    """What `slidr evaluate` does."""

    checkpoint: str | None = None  # the fine-tuned student; the command line's --checkpoint
    split: SplitName = "val"
    votes: int = 1  # predictions averaged per sweep: itself, then randomly turned and flipped copies
    bootstrap: int = 1000  # draws of frames for the interval of mIoU
    submission: str | None = None  # a folder for predictions in the benchmark's format; null: none


@dataclass(frozen=True)
class RunConfig:
    folder: str = "runs"
    name: str = "slidr_minkunet"
    seed: int = 0
    resume: bool = False  # continue this run from its newest intact checkpoint
    checkpoint_every: int = 500  # optimizer steps between checkpoints; one more at each epoch's end
    keep_checkpoints: int = 3  # the newest ones kept; the best is kept besides
    log_every: int = 10  # optimizer steps between logged metrics
    score_frames: int = 64  # held-out frames for the retrieval score


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None  # a running Ray cluster ("auto", ray://...); null starts one on this machine
    # Training processes; 0 trains in the calling process; [min, max]: as many as the cluster has room for at the time.
    num_workers: int | tuple[int, int] = 1
    use_gpu: bool = False
    cpus_per_worker: int = 1
    loader_cpus: int = 1  # CPUs kept free for loading, over all workers (of [min, max]: over max workers)
    local_cpus: int | None = None  # CPUs that a cluster started here claims to have; null: this machine's
    superpixel_cpus: int | None = None  # CPUs for `slidr superpixels`; null: all
    max_failures: int = 0  # worker-group restarts before a run is given up
    scale_up_s: float = 0.0  # seconds that training waits for an autoscaler to bring nodes; 0: refuse what has no room

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change during a run."""
        return not isinstance(self.num_workers, int)

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def loader_cpus_per_worker(self) -> int:
        """Whole CPUs that each worker of an elastic run keeps beside it for loading."""
        return -(-self.loader_cpus // max(1, self.max_workers))

    @property
    def reserved_cpus(self) -> int:
        """CPUs that each worker reserves: its own, and in an elastic run those for its loading."""
        return self.cpus_per_worker + (self.loader_cpus_per_worker if self.elastic else 0)


@dataclass(frozen=True)
class TrackingConfig:
    uri: str | None = None  # MLflow tracking URI; null: sqlite in run.folder
    experiment: str = "slidr"
    ui_port: int = 5000  # of `slidr ui`, on loopback


@dataclass(frozen=True)
class SpaceConfig:
    """What a method's trials differ in; what is empty here stays as `optim` has it.

    A grid takes every combination of the listed values. Random search and TPE draw rates and decay log-uniformly
    between the first and the last value listed, batch sizes and epochs from the list.
    """

    lr: tuple[float, ...] = (0.001, 0.1)
    head_lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    batch_size: tuple[int, ...] = ()
    epochs: tuple[int, ...] = ()


@dataclass(frozen=True)
class TuneConfig:
    """What `slidr tune` searches. Trials train on `data.train_split` and are compared on `data.val_split`."""

    fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.25, 1.0)  # of the labels, each searched on its own
    methods: tuple[MethodName, ...] = ("pretrained", "random")  # pretrained starts from student.weights
    pretrained: SpaceConfig = field(default_factory=SpaceConfig)
    random: SpaceConfig = field(default_factory=SpaceConfig)
    searcher: SearcherName = "random"
    trials: int | None = 12  # of each fraction and method; null with a grid, which has as many as combinations
    round_size: int = 4  # trials proposed together; they learn from the rounds before, never from each other
    pruner: PrunerName = "none"  # asha: ends trials early that do worse than earlier rounds' best did
    max_loss: float = 100.0  # a trial whose validation loss exceeds it has failed; chance is below 5
    grace_epochs: int = 10  # asha: epochs that every trial gets; its first rung
    reduction: int = 3  # asha: a rung lets the best 1/reduction go on, and lies that much further than the last
    seeds: int = 3  # retrainings of each winner, on final_train_split
    final_train_split: SplitName = "train"
    final_split: SplitName = "val"  # scored once for each retrained winner, read by nothing before
    results: str | None = None  # folder of the tables and plots; null: results/ and run.name
    fresh: bool = False  # true (--fresh): set an earlier search of this name aside and start anew


@dataclass(frozen=True)
class WorldConfig:
    """The synthetic world that the demo makes when `data.root` holds none."""

    parametrize: int = 8  # scenes to train on
    verify: int = 2  # scenes to choose on
    val: int = 2  # scenes to report on
    keyframes: int = 8  # a scene, 0.5 s apart
    scale: float = 0.25  # of 1600 x 900 pixels
    seed: int = 0


@dataclass(frozen=True)
class DemoConfig:
    """The demo's last stage: what the student is worth with few labels (see `slidr.label_efficiency`)."""

    seeds: tuple[int, ...] = (0, 1)  # of the fine-tunings; two at least show a spread
    probe_steps: int = 60
    probe_lr: float = 0.06
    scene_steps: int = 60  # of fine-tuning with the labels of one scene
    scene_lr: float = 0.02


@dataclass(frozen=True)
class Config:
    """Everything a stage may need. Every stage reads the sections it uses."""

    data: DataConfig = field(default_factory=DataConfig)
    superpixels: SuperpixelConfig = field(default_factory=SuperpixelConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)


def decode(raw: dict[str, Any], source: str = "config") -> Config:
    """The checked config that a plain dict describes.

    Missing keys take their defaults. Raises `ConfigError` naming `source` and every offending key.
    """
    _refuse_unknown(raw, Config, (), source)
    try:
        # As JSON, strictly: lists may become tuples and integers floats, but no text a number.
        config = _ADAPTER.validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        lines = [
            f"{source}: {'.'.join(str(part) for part in e['loc'])}: {e['msg']}, got {e.get('input')!r}"
            for e in error.errors()
        ]
        raise ConfigError("\n".join(lines)) from None
    check(config, source)
    return config


def load(path: str | Path) -> Config:
    """The config in a YAML file."""
    path = Path(path)
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not a text file; pass a YAML file such as configs/demo.yaml") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); pass a file such as configs/demo.yaml") from None
    return parse(text, str(path))


def parse(text: str, source: str = "config") -> Config:
    """The config in a YAML text; `source` names it in errors."""
    try:
        raw = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: is not YAML: {error}") from None
    if not isinstance(raw, dict):
        found = "nothing: the file is empty" if raw is None else type(raw).__name__
        raise ConfigError(f"{source}: expected a mapping of sections such as data: and optim:, got {found}")
    return decode(raw, source)


def to_dict(config: Any) -> dict[str, Any]:
    """A config (or one section) as plain dicts, lists and scalars; the inverse of `decode`."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def public_dict(config: Config) -> dict[str, Any]:
    """`to_dict` for files that others may see: URLs lose user names, passwords and queries."""

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(inner) for key, inner in value.items()}
        if isinstance(value, str) and "://" in value and not value.startswith("sqlite:"):
            scheme, _, rest = value.partition("://")
            host, slash, path = rest.partition("?")[0].partition("/")
            return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
        return value

    return public(to_dict(config))


def dump(config: Config) -> str:
    """A config as YAML that `load` reads back to the same value, but for what URLs keep secret."""
    return yaml.dump(public_dict(config), Dumper=_Dumper, sort_keys=False)


def fingerprint(section: Any, length: int = 10) -> str:
    """A short name for a dataclass's values: equal values, equal names, whatever the field order."""
    text = json.dumps(dataclasses.asdict(section), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def check(config: Config, source: str = "config") -> None:
    """Raises `ConfigError` for values that are well typed but cannot work together."""
    problems: list[str] = []

    def require(ok: bool, key: str, message: str) -> None:
        if not ok:
            problems.append(f"{source}: {key}: {message}")

    data, optim, cluster, student = config.data, config.optim, config.cluster, config.student
    unknown = [name for name in data.cameras if name not in CAMERA_CHANNELS]
    require(not unknown, "data.cameras", f"unknown {unknown}; nuScenes has {list(CAMERA_CHANNELS)}")
    require(0 < data.train_fraction <= 1, "data.train_fraction", f"got {data.train_fraction}, expected 0 < f <= 1")
    require(min(data.voxel.size) > 0, "data.voxel.size", f"got {data.voxel.size}, expected positive lengths")
    require(min(data.image_size) > 0, "data.image_size", f"got {data.image_size}, expected positive pixels")
    for key, (low, high) in {
        "scale": data.augment.scale,
        "crop_area": data.augment.crop_area,
        "crop_aspect": data.augment.crop_aspect,
    }.items():
        require(0 < low <= high, f"data.augment.{key}", f"got [{low}, {high}], expected 0 < low <= high")
    require(data.augment.crop_area[1] <= 1, "data.augment.crop_area", "a crop is at most the whole image (1.0)")
    require(config.superpixels.segments >= 1, "superpixels.segments", "expected at least 1")
    require(config.superpixels.segments <= 65535, "superpixels.segments", "a label map holds at most 65535")
    require(
        not (student.name == "voxelnet" and student.engine == "minkowski"),
        "student.engine",
        "voxelnet runs on the torch engine only; set student.engine: torch",
    )
    require(student.width > 0, "student.width", f"got {student.width}, expected a positive factor")
    require(
        not (student.name == "voxelnet" and student.width != 1.0),
        "student.width",
        "voxelnet has one width; set 1.0",
    )
    require(student.out_channels > 0, "student.out_channels", f"got {student.out_channels}, expected at least 1")
    require(len(config.loss.names) > 0, "loss.names", f"expected at least one of {list(get_args(LossName))}")
    require(
        "cross_entropy_lovasz" not in config.loss.names or len(config.loss.names) == 1,
        "loss.names",
        "cross_entropy_lovasz is for labels, the others for images; it stands alone",
    )
    weights = config.loss.class_weights
    require(
        weights is None or (len(weights) == student.out_channels and min(weights) >= 0),
        "loss.class_weights",
        f"expected one weight of at least 0 for each of student.out_channels ({student.out_channels}) classes",
    )
    require(config.loss.temperature > 0, "loss.temperature", "expected a positive number")
    require(0 < optim.lr < float("inf"), "optim.lr", "expected a positive number")
    require(0 <= optim.momentum < 1, "optim.momentum", "expected 0 <= momentum < 1")
    require(optim.weight_decay >= 0, "optim.weight_decay", "expected at least 0")
    require(data.max_val_frames is None or data.max_val_frames >= 1, "data.max_val_frames", "expected at least 1")
    require(data.val_batch_size >= 1, "data.val_batch_size", "expected at least 1")
    require(len(data.cameras) > 0, "data.cameras", "expected at least one")
    require(
        not (data.voxel.azimuth_wrap and not data.voxel.cylindrical),
        "data.voxel.azimuth_wrap",
        "only cylindrical voxels have an azimuth",
    )
    degrees, cells = data.voxel.size[1], data.voxel.azimuth_cells
    require(
        cells is None or (cells % MINKUNET_STRIDE == 0 and cells > 0 and abs(cells * degrees - 360) < 1e-6),
        "data.voxel.azimuth_wrap",
        f"needs a multiple of {MINKUNET_STRIDE} (the network's total stride) azimuth cells of data.voxel.size[1] = "
        f"{degrees} degrees to make 360; set 1.125 (320 cells), 0.9375 (384) or 0.75 (480) degrees",
    )
    require(
        not (data.voxel.azimuth_wrap and student.engine == "minkowski"),
        "data.voxel.azimuth_wrap",
        "MinkowskiEngine's kernels do not reach across the seam; set student.engine: torch",
    )
    require(
        not (student.name == "voxelnet" and data.voxel.cylindrical),
        "data.voxel.cylindrical",
        "voxelnet's grid is Cartesian; set false",
    )
    require(config.superpixels.compactness > 0, "superpixels.compactness", "expected a positive number")
    require(config.superpixels.sigma >= 0, "superpixels.sigma", "expected at least 0")
    require(config.loss.min_points >= 1, "loss.min_points", "expected at least 1")
    require(config.loss.pairs >= 1, "loss.pairs", "expected at least 1")
    require(config.run.log_every >= 1, "run.log_every", "expected at least 1")
    require(config.run.score_frames >= 1, "run.score_frames", "expected at least 1")
    require(config.run.seed >= 0, "run.seed", "expected at least 0")
    require(
        re.fullmatch(r"\w[\w.-]*", config.run.name) is not None,
        "run.name",
        f"got {config.run.name!r}, expected letters, digits, '.', '_' and '-': it names a folder",
    )
    require(
        "://" not in config.run.folder or config.tracking.uri is not None,
        "tracking.uri",
        f"run.folder is in an object store ({config.run.folder}), where the default sqlite file cannot lie; set a "
        f"tracking server's http:// address or sqlite:////path/mlflow.db",
    )
    for key in ("local_cpus", "superpixel_cpus"):
        value = getattr(cluster, key)
        require(value is None or value >= 1, f"cluster.{key}", "expected at least 1")
    require(cluster.max_failures >= 0, "cluster.max_failures", "expected at least 0")
    require(0 <= cluster.scale_up_s < float("inf"), "cluster.scale_up_s", "expected seconds, at least 0")
    require(optim.head_lr is None or optim.head_lr > 0, "optim.head_lr", "expected a positive number or null")
    require(optim.epochs >= 1, "optim.epochs", "expected at least 1")
    require(optim.batch_size >= 1, "optim.batch_size", "expected at least 1")
    require(optim.accumulate >= 1, "optim.accumulate", "expected at least 1")
    few, many = cluster.min_workers, cluster.max_workers
    require(
        0 <= few <= many and (few > 0 or not cluster.elastic),
        "cluster.num_workers",
        f"got {cluster.num_workers}, expected 0 (in this process), a number of workers, or [min, max] with "
        f"1 <= min <= max",
    )
    # Every number of workers that a run may have takes the same batch, so that the result means the same.
    shares = math.lcm(*range(max(1, few), min(many, _MANY_WORKERS) + 1)) * optim.accumulate
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
    require(cluster.cpus_per_worker >= 1, "cluster.cpus_per_worker", "expected at least 1")
    require(cluster.loader_cpus >= 1, "cluster.loader_cpus", "loading needs at least 1 CPU")
    require(config.evaluation.votes >= 1, "evaluation.votes", "expected at least 1")
    require(config.evaluation.bootstrap >= 1, "evaluation.bootstrap", "expected at least 1")
    world = config.world
    for key in ("parametrize", "verify", "val", "keyframes"):
        require(getattr(world, key) >= 1, f"world.{key}", f"got {getattr(world, key)}, expected at least 1")
    require(0.02 <= world.scale <= 1, "world.scale", f"got {world.scale}, expected 0.02 to 1")
    demo = config.demo
    require(len(set(demo.seeds)) == len(demo.seeds) >= 1, "demo.seeds", f"got {demo.seeds}, expected distinct seeds")
    require(min(demo.seeds, default=0) >= 0, "demo.seeds", f"got {demo.seeds}, expected at least 0")
    for key in ("probe_steps", "scene_steps"):
        require(getattr(demo, key) >= 1, f"demo.{key}", f"got {getattr(demo, key)}, expected at least 1")
    for key in ("probe_lr", "scene_lr"):
        require(getattr(demo, key) > 0, f"demo.{key}", f"got {getattr(demo, key)}, expected a positive number")
    require(config.run.checkpoint_every >= 1, "run.checkpoint_every", "expected at least 1")
    require(config.run.keep_checkpoints >= 1, "run.keep_checkpoints", "expected at least 1")
    _check_tune(config.tune, shares, require)
    if problems:
        raise ConfigError("\n".join(problems))


def _check_tune(tune: TuneConfig, shares: int, require: Callable[[bool, str, str], None]) -> None:
    """`shares`: what a batch size must divide by."""
    require(len(tune.fractions) > 0, "tune.fractions", "expected at least one")
    require(
        all(0 < f <= 1 for f in tune.fractions) and len(set(tune.fractions)) == len(tune.fractions),
        "tune.fractions",
        f"got {list(tune.fractions)}, expected distinct 0 < f <= 1",
    )
    require(
        len(tune.methods) == len(set(tune.methods)) > 0,
        "tune.methods",
        f"got {list(tune.methods)}, expected one or both of {list(get_args(MethodName))}",
    )
    spaces: dict[MethodName, SpaceConfig] = {"pretrained": tune.pretrained, "random": tune.random}
    for method, space in spaces.items():
        for name, values in dataclasses.asdict(space).items():
            key = f"tune.{method}.{name}"
            ascending = all(a < b for a, b in itertools.pairwise(values))
            require(ascending, key, f"got {list(values)}, expected distinct values in ascending order")
            least = 0 if name == "weight_decay" and tune.searcher == "grid" else 1e-300
            require(all(least <= value < float("inf") for value in values), key, "expected positive numbers")
        require(
            all(size % shares == 0 for size in space.batch_size),
            f"tune.{method}.batch_size",
            f"got {list(space.batch_size)}, expected multiples of {shares}, as for optim.batch_size",
        )
    require(
        (tune.trials is None) == (tune.searcher == "grid"),
        "tune.trials",
        "a grid has as many trials as combinations (null); random and tpe need a number",
    )
    for key in ("trials", "round_size", "grace_epochs", "seeds"):
        value = getattr(tune, key)
        require(value is None or value >= 1, f"tune.{key}", f"got {value}, expected at least 1")
    require(tune.final_split != "test", "tune.final_split", "test has no public labels to score")
    require(tune.max_loss > 0, "tune.max_loss", f"got {tune.max_loss}, expected a positive number")
    require(tune.reduction >= 2, "tune.reduction", f"got {tune.reduction}, expected at least 2")


def _refuse_unknown(raw: Any, schema: type, path: tuple[str, ...], source: str) -> None:
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: {'.'.join(path)}: expected a mapping, got {raw!r}")
    types = get_type_hints(schema)
    for key, value in raw.items():
        dotted = ".".join((*path, str(key)))
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join((*path, near[0]))}?" if near else f"known here: {', '.join(types)}"
            raise ConfigError(f"{source}: unknown key {dotted}; {hint}")
        if dataclasses.is_dataclass(types[key]):
            _refuse_unknown(value, types[key], (*path, key), source)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML alone reads 1e-4 as text."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a float."""


_FLOAT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))

_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)
