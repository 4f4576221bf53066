"""What `slidr doctor` looks at, one function a line; each answers with findings and raises nothing.

The cheap checks look at this machine and at a handful of files, within about a second and without starting Ray. The
thorough ones list the data root, open many files and ask the cluster.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from slidr import tracking
from slidr.cluster import session
from slidr.cluster.evaluate import is_scored
from slidr.cluster.room import of_one_job, shortage
from slidr.cluster.session import Node
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.cluster.superpixels import map_path
from slidr.config import Config
from slidr.data import images as files
from slidr.data import storage
from slidr.data.frames import FrameTable, ImageRef
from slidr.data.loading import require_labels, subset_frames
from slidr.data.plan import spread
from slidr.data.samples import point_labels
from slidr.data.storage import DataError
from slidr.models.download import whereabouts
from slidr.models.files import WeightsError
from slidr.models.teachers import TEACHERS
from slidr.planning.costs import PACKAGED, read_costs
from slidr.preflight.plan import has_search, images_to_cut, job_of, state_bytes
from slidr.sparse import cpu_kernels
from slidr.training.runs import folder_of as run_folder
from slidr.types import Camera, Frame

Status = Literal["ok", "warning", "error"]
Stage = Literal["superpixels", "pretrain", "finetune", "evaluate", "tune"]
Needs = Literal["images", "labels", "sweeps"]  # what a job reads of a keyframe besides its sweep; sweeps: nothing

PYTHONS = ((3, 11), (3, 12))
SKEW_WARNING_S, SKEW_ERROR_S = 30.0, 600.0  # S3 refuses requests that are 15 minutes off
_FEW, _MANY = 4, 64  # keyframes whose files are looked at
_READERS = 16  # threads


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, how it is, and what to do where it is not well."""

    name: str
    status: Status
    what: str
    next: str = ""


def cheap(config: Config | None, stage: Stage | None = None) -> list[Finding]:
    """The checks that every job starts with; `stage` says what the job needs to find."""
    findings = [python(sys.version_info[:2]), torch_build(), *packages(_installed)]
    if config is None:
        return findings
    search = stage == "tune" or (stage is None and has_search(config))
    findings += [engine(config), gpu(config), room(config, search)]
    if stage != "superpixels":
        findings += weights(config, search)
    frames = frame_table(config)
    findings.append(frames)
    if frames.status != "error":
        needs = needs_of(config, stage)
        if needs == "labels":
            findings.append(labels(config))
        findings.append(data_root(config, _FEW, needs))
        if stage != "superpixels" and job_of(config) == "pretrain":
            findings.append(superpixels(config, _FEW, needed=stage is not None))
    return [*findings, *disk(config, stage), tracking_server(config, stage), clock(config)]


def thorough(config: Config) -> list[Finding]:
    """The checks that take their time: every file by name, many opened, every map, the cluster."""
    findings = [cluster(config, has_search(config))]
    if frame_table(config).status == "error":
        return findings
    needs = needs_of(config)
    findings += [data_root(config, _MANY, needs, whole=True), listing(config, needs)]
    if job_of(config) == "pretrain":
        findings.append(all_superpixels(config))
    return findings


def needs_of(config: Config, stage: Stage | None = None) -> Needs:
    """What a job reads of a keyframe besides its sweep. An evaluation comes as its `evaluation_config`."""
    if stage == "superpixels" or job_of(config) == "pretrain":
        return "images"
    return "sweeps" if stage == "evaluate" and not is_scored(config) else "labels"


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
        return Finding("cluster", "error", str(error), "ray start --head, or --cluster.address null")
    nodes = session.nodes()
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    return _room(nodes, f"{where}: {len(nodes)} nodes, {cpus} CPUs, {gpus} GPUs", config, search)


def weights(config: Config, search: bool = False) -> Iterable[Finding]:
    """The weights that training starts from are where the config says; of a search, those of its method pretrained."""
    student = config.student.weights
    if student is None:
        if search and "pretrained" in config.tune.methods:
            yield Finding(
                "student", "error", "student.weights: null, but tune.methods has pretrained",
                "--student.weights PATH, or --tune.methods random",
            )  # fmt: skip
    elif storage.exists(student):
        yield Finding("student", "ok", student)
    else:
        yield Finding("student", "error", f"{student}: no such file", "slidr pretrain, or another --student.weights")
    if job_of(config) == "finetune" or config.teacher.weights is None:
        return
    try:
        path, url = whereabouts(config.teacher.weights, encoder=TEACHERS[config.teacher.name].weights_of)
    except WeightsError as error:
        yield Finding("teacher", "error", str(error), "docs/weights.md")
        return
    if url is None:
        yield Finding("teacher", "ok", str(path))
    else:
        yield Finding(
            "teacher", "warning", f"{config.teacher.weights}: not here yet, fetched from {url} when training starts",
            f"without internet: put the file at {path}",
        )  # fmt: skip


def frame_table(config: Config) -> Finding:
    """The frame table opens and has frames to train and to validate on."""
    data = config.data
    try:
        table = FrameTable.open(data.frames)
        train = table.select(data.train_split, data.train_fraction)
        val = table.select(data.val_split)
    except DataError as error:
        return Finding("frames", "error", str(error), "slidr frames CONFIG")
    return Finding("frames", "ok", f"{len(table)} keyframes: {len(train)} to train on, {len(val)} to validate on")


def labels(config: Config) -> Finding:
    """Every frame to train and to validate on has point labels, by the frame table."""
    try:
        require_labels(config)
    except DataError as error:
        return Finding(
            "labels", "error", str(error), "choose splits with labels, or slidr frames CONFIG with them there"
        )
    return Finding("labels", "ok", "every frame to train and to validate on has some")


def data_root(config: Config, count: int, needs: Needs = "images", whole: bool = False) -> Finding:
    """The files of some keyframes that a job needs, spread over the table: there, and of the tables' sizes.

    `whole` decodes every pixel; otherwise images' headers are compared.
    """
    tables = _tables(config, needs)
    chosen = [table[i] for table in tables for i in spread(len(table), count // len(tables)).tolist()]
    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(lambda frame: _damage(frame, config, needs, whole), chosen))
    problems = [text for texts in found for text in texts]
    kind = "decoded" if whole else "opened"
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Finding(
            "data root", "error", problems[0] + more, "is data.root this table's data set? Else copy the files again"
        )  # fmt: skip
    return Finding("data root", "ok", f"{config.data.root}: files of {len(chosen)} keyframes {kind}, none amiss")


def listing(config: Config, needs: Needs = "images") -> Finding:
    """Every file that a job needs is in its folder: sweeps, and images or point labels."""
    tables = _tables(config, needs)
    wanted = [path for table in tables for path in table.lidar_paths]
    if needs == "images":
        wanted += [image.path for table in tables for image in table.images(config.data.cameras)]
    elif needs == "labels":
        wanted += [path for table in tables for path in table.label_paths if path is not None]
    by_folder: dict[str, set[str]] = {}
    for path in wanted:
        folder, _, name = path.rpartition("/")
        by_folder.setdefault(folder, set()).add(name)
    gone = [
        f"{folder}/{name}"
        for folder, names in sorted(by_folder.items())
        for name in sorted(names - storage.list_names(storage.join(config.data.root, folder)))
    ]
    if gone:
        more = f" (and {len(gone) - 1} more)" if len(gone) > 1 else ""
        return Finding("files", "error", f"{gone[0]} is not in {config.data.root}{more}", "copy the missing files")
    what = "sweeps" if needs == "sweeps" else f"{needs} and sweeps"
    return Finding("files", "ok", f"all {len(set(wanted))} {what} of the table are there")


def superpixels(config: Config, count: int, needed: bool) -> Finding:
    """Some of the training images have their superpixel maps."""
    table = FrameTable.open(config.data.frames).select(config.data.train_split, config.data.train_fraction)
    folder = superpixel_folder(config.superpixels)
    chosen = np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int).tolist()
    images = [camera for i in chosen for camera in table[i].cameras if camera.channel in config.data.cameras]
    with ThreadPoolExecutor(_READERS) as pool:
        there = list(pool.map(lambda c: storage.exists(map_path(folder, _ref(c))), images))
    if all(there):
        return Finding("superpixels", "ok", f"{folder}: maps of {len(images)} images looked for, all there")
    missing = f"{folder}: {there.count(False)} of {len(images)} maps looked for are missing"
    return Finding("superpixels", "error" if needed else "warning", missing, "slidr superpixels CONFIG")


def all_superpixels(config: Config) -> Finding:
    """Every image of the training and validation splits has its map."""
    pixels, there = images_to_cut(config)
    text = f"{there} of {len(pixels)} maps"
    if there == len(pixels):
        return Finding("maps", "ok", text)
    return Finding("maps", "warning", text, "slidr superpixels CONFIG does what is missing")


def disk(config: Config, stage: Stage | None) -> list[Finding]:
    """Free space where a job writes, against what it will write."""
    findings = []
    job = job_of(config)
    if stage not in ("superpixels", "evaluate"):  # an evaluation writes no weights
        state, student = state_bytes(config, job)
        # While a new checkpoint is written, the old ones are all there still.
        need = (config.run.keep_checkpoints + 2) * state + student
        if stage == "tune" or (stage is None and has_search(config)):  # every final keeps its student
            need += len(config.tune.fractions) * len(config.tune.methods) * config.tune.seeds * student
        findings.append(space("run.folder", run_folder(config).path, need))
    if stage in (None, "superpixels") and job == "pretrain" and frame_table(config).status != "error":
        pixels, there = images_to_cut(config) if stage == "superpixels" else ([], 0)
        size = read_costs(PACKAGED).nearest("label_map", max([*pixels, 1]))
        left = sum(pixels) * (1 - there / max(len(pixels), 1))
        need = int(left * size.value / size.setting["pixels"]) if size is not None else 0
        findings.append(space("superpixels.folder", superpixel_folder(config.superpixels), need))
    return findings


def space(key: str, folder: str, need: int) -> Finding:
    """Free bytes on the file system that `folder` is on, or will be, against `need`."""
    if storage.is_remote(folder):
        return Finding(f"disk: {key}", "ok", f"{folder}: an object store, its room is not asked for")
    existing = Path(storage.join(folder)).absolute()
    while not existing.exists():
        existing = existing.parent
    have = shutil.disk_usage(existing).free
    text = f"{existing}: {have / 1e9:.1f} GB free, {need / 1e9:.2f} GB needed"
    if have < need:
        return Finding(f"disk: {key}", "error", text, f"free some space, or choose another {key}")
    if have < 2 * need:
        return Finding(f"disk: {key}", "warning", text, f"more room in {key} would be safer")
    return Finding(f"disk: {key}", "ok", text)


def tracking_server(config: Config, stage: Stage | None = None) -> Finding:
    """MLflow answers. A run needs it to begin; a search goes on without and makes its runs up later."""
    uri = tracking.tracking_uri(config)
    shown = uri.split("@")[-1]
    problem = tracking.unreachable(uri)
    if problem is None:
        return Finding("tracking", "ok", shown)
    return Finding(
        "tracking", "warning" if stage == "tune" else "error", f"{shown}: {problem}",
        "start the server (docs/cluster.md), or --tracking.uri null for a file in run.folder",
    )  # fmt: skip


def clock(config: Config) -> Finding:
    """This machine's clock against that of the storage that runs are written to, which so is found writable."""
    folder = run_folder(config).path
    if not storage.is_remote(folder):
        existing = Path(storage.join(folder)).absolute()
        while not existing.exists():
            existing = existing.parent
        folder = str(existing)
    probe = storage.join(folder, f".tmp-doctor-{uuid.uuid4().hex[:8]}")
    try:
        storage.write_bytes_atomic(probe, b".")
        try:
            off = time.time() - storage.modified(probe)
        finally:
            storage.delete(probe)
    except OSError as error:
        return Finding("run folder", "error", f"{folder}: cannot be written ({error})", "choose another run.folder")
    return skew(off)


def skew(seconds: float) -> Finding:
    """How far this machine's clock is ahead of the storage's."""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}, {abs(seconds):.1f} s off the storage's"
    if abs(seconds) < SKEW_WARNING_S:
        return Finding("clock", "ok", text)
    status: Status = "error" if abs(seconds) > SKEW_ERROR_S else "warning"
    return Finding("clock", status, text, "let chrony or ntpd set the clocks of all machines")


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


def _tables(config: Config, needs: Needs) -> list[FrameTable]:
    """The frames whose files a job may need: of pretraining the whole table's, else those of its own two subsets."""
    if needs == "images":
        return [FrameTable.open(config.data.frames)]
    return [subset_frames(config, "train"), subset_frames(config, "val")]


def _damage(frame: Frame, config: Config, needs: Needs, whole: bool) -> list[str]:
    """What is wrong with the files of a keyframe that a job needs."""
    problems, root = [], config.data.root
    columns = files.NUSCENES_COLUMNS if config.data.dataset == "nuscenes" else files.KITTI_COLUMNS
    try:
        sweep = files.read_sweep(storage.safe_join(root, frame.lidar_path), columns)
        if needs == "labels" and frame.label_path is not None:  # `labels` tells of frames without
            point_labels(frame, config.data, len(sweep))
    except DataError as error:
        problems.append(str(error))
    for camera in frame.cameras if needs == "images" else ():
        try:
            path = storage.safe_join(root, camera.image_path)
            data = storage.read_bytes(path)
            size = files.image_size(data, path)
            if size != (camera.width, camera.height):
                wanted = f"{camera.width} x {camera.height}"
                problems.append(f"{path}: is {size[0]} x {size[1]} pixels, the frame table says {wanted}")
            if whole:
                files.decode_image(data, path)
        except DataError as error:
            problems.append(str(error))
    return problems


def _ref(camera: Camera) -> ImageRef:
    return ImageRef(camera.token, camera.image_path, camera.width, camera.height)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
