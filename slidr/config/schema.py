"""The schema of a config: one frozen dataclass a section, with the defaults, units and ranges of every key."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, TypeVar

from slidr.config.marks import (
    Count,
    Fraction,
    Limits,
    Natural,
    NotNegative,
    PathText,
    Positive,
    Seed,
    Share,
    TrackingText,
)
from slidr.types import CAMERA_CHANNELS
from slidr.urls import RedactedError

DatasetName = Literal["nuscenes", "semantic_kitti"]
NuscenesVersion = Literal["v1.0-trainval", "v1.0-mini", "v1.0-test"]
SplitName = Literal["train", "val", "test", "mini_train", "mini_val", "parametrize", "verify", "all"]
MissingFiles = Literal["scenes", "cameras"]
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
SlicEngine = Literal["compiled", "scikit-image"]
SearcherName = Literal["grid", "random", "tpe"]
PrunerName = Literal["none", "asha"]


MINKUNET_STRIDE = 16
ADDED = "added"  # marks a field in its metadata, see `added`

T = TypeVar("T")


def added(default: T) -> T:
    """A key that the first schema did not have. Fingerprints leave it out while it has its default."""
    return field(default=default, metadata={ADDED: True})


Length = Annotated[float, Limits(least=1e-3, most=360)]  # of a voxel: m, or degrees
Pixels = Annotated[int, Limits(least=1, most=16384)]  # of an image's side
Labels = Annotated[int, Limits(least=1, most=65535)]  # what 16 bits can name
Workers = Annotated[int, Limits(least=0, most=100_000)]
Cpus = Annotated[int, Limits(least=1, most=1_000_000)]
Ratio = Annotated[float, Limits(above=0, most=1000)]
Port = Annotated[int, Limits(least=1, most=65535)]
Draws = Annotated[int, Limits(least=1, most=100_000)]
Votes = Annotated[int, Limits(least=1, most=1000)]
Jobs = Annotated[int, Limits(least=1, most=100_000)]  # each is held in memory
Reduction = Annotated[int, Limits(least=2, most=1000)]
Depth = Annotated[float, Limits(least=0, most=1000)]  # m
Blur = Annotated[float, Limits(least=0, most=1000)]  # pixels


class ConfigError(RedactedError, ValueError):
    """A configuration that cannot be used; the message names the key, what it got and what it takes."""


@dataclass(frozen=True)
class VoxelConfig:
    cylindrical: bool = True  # (rho, phi, z) voxels; false: (x, y, z)
    size: tuple[Length, Length, Length] = (0.1, 1.0, 0.1)  # cylindrical: m, degrees, m; Cartesian: m, m, m
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
    scale: tuple[Ratio, Ratio] = (1.0, 1.0)  # global scale, U[low, high]
    drop_cuboid: bool = True
    drop_cuboid_max_side: Share = 0.2  # of the cloud's extent
    drop_cuboid_min_pairs: Natural = 1024  # undone where a camera would keep fewer
    crop: bool = True
    crop_area: tuple[Fraction, Fraction] = (0.3, 1.0)  # of the image
    crop_aspect: tuple[Ratio, Ratio] = (14 / 9, 17 / 9)  # width / height, drawn log-uniformly
    crop_min_pairs: Natural = 1024  # a crop is drawn again until it keeps more pairs than this ...
    crop_min_share: Share = 0.75  # ... or more than this share of the image's pairs
    flip_images: bool = True  # left-right, p = 0.5 per image
    shuffle_cameras: bool = True


@dataclass(frozen=True)
class DataConfig:
    dataset: DatasetName = "nuscenes"
    root: PathText = "data/nuscenes"  # the dataroot: holds samples/, sweeps/ and the version's folder
    version: NuscenesVersion = "v1.0-trainval"
    frames: PathText = "data/frames/nuscenes-trainval.parquet"  # the frame table that `slidr frames` writes
    train_split: SplitName = "parametrize"
    val_split: SplitName = "verify"
    train_fraction: Fraction = 1.0  # of the split's scenes (nuScenes) or scans (SemanticKITTI)
    max_val_frames: Count | None = None  # validate on this many frames, evenly spread; null: all
    val_batch_size: Count = 4  # frames of a validation batch, on one worker
    cameras: tuple[str, ...] = CAMERA_CHANNELS
    image_size: tuple[Pixels, Pixels] = (224, 416)  # height, width fed to the teacher, pixels
    min_depth: Depth = 1.0  # m; nearer points make no pairs
    # `slidr frames` of a nuScenes download that is not whole: null refuses it; scenes takes the scenes whose files are
    # all there; cameras takes those whose sweeps are all there, with the images that are there.
    allow_missing: MissingFiles | None = added(None)
    voxel: VoxelConfig = field(default_factory=VoxelConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True)
class SuperpixelConfig:
    """SLIC parameters. Their fingerprint names the folder of the label maps."""

    folder: PathText = "data/superpixels"  # holds one folder per parameter set
    segments: Labels = 150
    compactness: Positive = 6.0
    sigma: Blur = 3.0  # pixels
    engine: SlicEngine = added("compiled")  # both give the same labels; compiled is faster

    @property
    def parameters(self) -> SuperpixelConfig:
        """Only what shapes the labels: not where they are kept, nor which engine computes them."""
        return replace(self, folder="", engine="compiled")


@dataclass(frozen=True)
class StudentConfig:
    name: StudentName = "minkunet34c"
    engine: Engine = "torch"
    out_channels: Labels = 64
    width: Annotated[float, Limits(above=0, most=64)] = 1.0  # multiplies every hidden channel count of a MinkUNet
    bn_momentum: Share = 0.05  # of each batch in batch norm's running statistics
    weights: PathText | None = None  # a checkpoint to start from
    freeze: bool = False  # fine-tuning: train the last layer only (a linear probe)


@dataclass(frozen=True)
class TeacherConfig:
    name: TeacherName = "dilation_resnet50"
    weights: PathText | None = "moco_v2"  # a published name, a path, a URL, or null for random weights
    sha256: str | None = None  # of the weights file


@dataclass(frozen=True)
class LossConfig:
    names: tuple[LossName, ...] = ("superpixel_info_nce",)  # several are averaged
    temperature: Positive = 0.07
    min_points: Count = 1  # superpixels with fewer paired points are dropped
    pairs: Count = 4096  # point_pixel_info_nce: pairs drawn per batch and worker
    gather_negatives: bool = False  # true: every worker's superpixels are negatives
    class_weights: tuple[NotNegative, ...] | None = None  # cross_entropy_lovasz: of all classes, the ignored included


@dataclass(frozen=True)
class OptimConfig:
    name: OptimizerName = "sgd"
    lr: Positive = 0.5
    head_lr: Positive | None = None  # fine-tuning: of the last layer; null: lr
    momentum: Annotated[float, Limits(least=0, below=1)] = 0.9
    dampening: Share = 0.1
    weight_decay: NotNegative = 1e-4
    schedule: ScheduleName = "cosine"  # cosine and step count epochs, one_cycle counts steps
    epochs: Count = 50
    max_steps: Natural | None = None  # optimizer steps after which training ends early
    batch_size: Count = 4  # frames per optimizer step, over all workers
    accumulate: Count = 1  # micro-batches per optimizer step
    precision: Precision = "float32"  # of the forward pass; float16 and bfloat16 on GPU only


@dataclass(frozen=True)
class EvaluationConfig:
    """What `slidr evaluate` does."""

    checkpoint: PathText | None = None  # the fine-tuned student; the command line's --checkpoint
    split: SplitName = "val"
    votes: Votes = 1  # predictions averaged per sweep: itself, then randomly turned and flipped copies
    bootstrap: Draws = 1000  # draws of frames for the interval of mIoU
    # Training batches over which batch norm's statistics are averaged again for the scores; 0: off.
    reestimate_norms: Natural = added(0)
    submission: PathText | None = None  # a folder for predictions in the benchmark's format; null: none


@dataclass(frozen=True)
class RunConfig:
    folder: PathText = "runs"
    name: str = "slidr_minkunet"
    seed: Seed = 0
    resume: bool = False  # continue this run from its newest intact checkpoint
    checkpoint_every: Count = 500  # optimizer steps between checkpoints; one more at each epoch's end
    keep_checkpoints: Count = 3  # the newest ones kept; the best is kept besides
    log_every: Count = 10  # optimizer steps between logged metrics
    score_frames: Count = 64  # held-out frames for the retrieval score


@dataclass(frozen=True)
class ClusterConfig:
    address: str | None = None  # a running Ray cluster ("auto", ray://...); null starts one on this machine
    # Training processes; 0 trains in the calling process; [min, max]: as many as the cluster has room for at the time.
    num_workers: Workers | tuple[Workers, Workers] = 1
    use_gpu: bool = False
    cpus_per_worker: Cpus = 1
    loader_cpus: Cpus = 1  # CPUs kept free for loading, over all workers (of [min, max]: over max workers)
    local_cpus: Cpus | None = None  # CPUs that a cluster started here claims to have; null: this machine's
    superpixel_cpus: Cpus | None = None  # CPUs for `slidr superpixels`; null: all
    max_failures: Natural = 0  # worker-group restarts before a run is given up
    scale_up_s: NotNegative = 0.0  # seconds to wait for an autoscaler to bring nodes; 0: refuse what has no room

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
    uri: TrackingText | None = None  # MLflow tracking URI; null: sqlite in run.folder
    experiment: str = "slidr"
    ui_port: Port = 5000  # of `slidr ui`, on loopback


@dataclass(frozen=True)
class SpaceConfig:
    """What a method's trials differ in; what is empty here stays as `optim` has it.

    A grid takes every combination of the listed values. Random search and TPE draw rates and decay log-uniformly
    between the first and the last value listed, batch sizes and epochs from the list.
    """

    lr: tuple[Positive, ...] = (0.001, 0.1)
    head_lr: tuple[Positive, ...] = ()
    weight_decay: tuple[NotNegative, ...] = ()
    batch_size: tuple[Count, ...] = ()
    epochs: tuple[Count, ...] = ()


@dataclass(frozen=True)
class TuneConfig:
    """What `slidr tune` searches. Trials train on `data.train_split` and are compared on `data.val_split`."""

    fractions: tuple[Fraction, ...] = (0.01, 0.05, 0.1, 0.25, 1.0)  # of the labels, each searched on its own
    methods: tuple[MethodName, ...] = ("pretrained", "random")  # pretrained starts from student.weights
    pretrained: SpaceConfig = field(default_factory=SpaceConfig)
    random: SpaceConfig = field(default_factory=SpaceConfig)
    searcher: SearcherName = "random"
    trials: Jobs | None = 12  # of each fraction and method; null with a grid, which has as many as combinations
    round_size: Jobs = 4  # trials proposed together; they learn from the rounds before, never from each other
    pruner: PrunerName = "none"  # asha: ends trials early that do worse than earlier rounds' best did
    max_loss: Positive = 100.0  # a trial whose training loss exceeds it has failed; chance is below 5
    grace_epochs: Count = 10  # asha: epochs that every trial gets; its first rung
    reduction: Reduction = 3  # asha: a rung lets the best 1/reduction go on, and lies that much further than the last
    seeds: Jobs = 3  # retrainings of each winner, on final_train_split
    final_train_split: SplitName = "train"
    final_split: SplitName = "val"  # scored once for each retrained winner, read by nothing before
    results: PathText | None = None  # folder of the tables and plots; null: results/ and run.name
    fresh: bool = False  # true (--fresh): set an earlier search of this name aside and start anew


@dataclass(frozen=True)
class WorldConfig:
    """The synthetic world that the demo makes when `data.root` holds none."""

    parametrize: Count = 8  # scenes to train on
    verify: Count = 2  # scenes to choose on
    val: Count = 2  # scenes to report on
    keyframes: Jobs = 8  # a scene, 0.5 s apart
    scale: Annotated[float, Limits(least=0.02, most=1)] = 0.25  # of 1600 x 900 pixels
    seed: Seed = 0


@dataclass(frozen=True)
class DemoConfig:
    """The demo's last stage: what the student is worth with few labels (see `slidr.label_efficiency`)."""

    seeds: tuple[Seed, ...] = (0, 1)  # of the fine-tunings; two at least show a spread
    probe_steps: Count = 60
    probe_lr: Positive = 0.06
    scene_steps: Count = 60  # of fine-tuning with the labels of one scene
    scene_lr: Positive = 0.02


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
