"""Whether what a job reads is there and whole: weights, frame table, labels, the data root's files, superpixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from slidr.cluster.evaluate import is_scored
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
from slidr.preflight.findings import Finding, Stage
from slidr.preflight.plan import images_to_cut, job_of
from slidr.types import Camera, Frame

FEW, MANY = 4, 64  # keyframes whose files are looked at
_READERS = 16  # threads
_SHOWN = 5  # damaged or missing files that are named


@dataclass(frozen=True)
class Needs:
    """What a job reads of a keyframe."""

    sweeps: bool = True
    images: bool = False
    labels: bool = False

    def __str__(self) -> str:
        return " and ".join(name for name in ("sweeps", "images", "labels") if getattr(self, name))


SUPERPIXELS, PRETRAINING = Needs(sweeps=False, images=True), Needs(images=True)
FINETUNING, PREDICTING = Needs(labels=True), Needs()


def needs_of(config: Config, stage: Stage | None = None) -> Needs:
    """What a job reads of a keyframe. An evaluation comes as its `evaluation_config`."""
    if stage == "superpixels":
        return SUPERPIXELS
    if job_of(config) == "pretrain":
        return PRETRAINING
    return PREDICTING if stage == "evaluate" and not is_scored(config) else FINETUNING


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
    except DataError as error:
        return Finding("frames", "error", str(error), "slidr frames CONFIG")
    try:
        train = table.select(data.train_split, data.train_fraction)
        val = table.select(data.val_split)
    except DataError as error:
        return Finding("frames", "error", str(error), "another split, or slidr frames CONFIG from tables that have it")
    return Finding("frames", "ok", f"{len(table)} keyframes: {len(train)} to train on, {len(val)} to validate on")


def root_folder(config: Config) -> Finding | None:
    """An error where there is nothing at all in the data root."""
    try:
        if storage.list_names(config.data.root):
            return None
    except OSError:  # it may not be listed; its files may be there all the same
        return None
    return Finding("data root", "error", f"data.root: {config.data.root}: no such folder, or empty", "--data.root PATH")


def labels(config: Config) -> Finding:
    """Every frame to train and to validate on has point labels, by the frame table."""
    try:
        require_labels(config)
    except DataError as error:
        return Finding(
            "labels", "error", str(error), "choose splits with labels, or slidr frames CONFIG with them there"
        )
    return Finding("labels", "ok", "every frame to train and to validate on has some")


def data_root(config: Config, count: int, needs: Needs, whole: bool = False) -> Finding:
    """The files of some keyframes that a job needs, spread over the table: there, and of the tables' sizes.

    `whole` decodes every pixel; otherwise images' headers are compared. Superpixels are made of the images that are
    good, and the others named at the end, so damage is a warning there, unless nothing is good.
    """
    gone = root_folder(config)
    if gone is not None:
        return gone
    tables = _tables(config, needs)
    chosen = [table[i] for table in tables for i in spread(len(table), count // len(tables)).tolist()]
    with ThreadPoolExecutor(_READERS) as pool:
        looked_at = pool.map(lambda frame: _looked_at(frame, config, needs, whole), chosen)
        found = [problem for of_one in looked_at for problem in of_one]
    problems = [text for text in found if text is not None]
    if not problems:
        kind = "decoded" if whole else "opened"
        return Finding("data root", "ok", f"{config.data.root}: files of {len(chosen)} keyframes {kind}, none amiss")
    text = "; ".join(problems[:_SHOWN]) + _and_more(problems)
    if needs == SUPERPIXELS and len(problems) < len(found):
        return Finding("data root", "warning", text, "copy these files again; the others are done meanwhile")
    return Finding("data root", "error", text, "is data.root this table's data set? Else copy the files again")


def listing(config: Config, needs: Needs) -> Finding:
    """Every file that a job needs is in its folder."""
    tables = _tables(config, needs)
    wanted = []
    if needs.sweeps:
        wanted += [path for table in tables for path in table.lidar_paths]
    if needs.images:
        wanted += [image.path for table in tables for image in table.images(config.data.cameras)]
    if needs.labels:
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
        text = f"not in {config.data.root}: {', '.join(gone[:_SHOWN])}{_and_more(gone)}"
        return Finding("files", "error", text, "copy the missing files")
    return Finding("files", "ok", f"all {len(set(wanted))} {needs} of the table are there")


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
    try:
        pixels, there = images_to_cut(config)
    except OSError as error:
        return Finding("superpixels", "error", f"cannot be looked for ({error})", "choose another superpixels.folder")
    text = f"{superpixel_folder(config.superpixels)}: {there} of {len(pixels)} maps"
    if there == len(pixels):
        return Finding("superpixels", "ok", text)
    return Finding("superpixels", "warning", text, "slidr superpixels CONFIG does what is missing")


def _tables(config: Config, needs: Needs) -> list[FrameTable]:
    """The frames whose files a job needs: those that it trains on and those that it validates on."""
    if needs.images:  # superpixels are made for all of both splits
        data = config.data
        return [FrameTable.open(data.frames).select(split) for split in (data.train_split, data.val_split)]
    return [subset_frames(config, "train"), subset_frames(config, "val")]


def _looked_at(frame: Frame, config: Config, needs: Needs, whole: bool) -> list[str | None]:
    """What is wrong with each file of a keyframe that a job needs; None for a good one."""
    root = config.data.root
    columns = files.NUSCENES_COLUMNS if config.data.dataset == "nuscenes" else files.KITTI_COLUMNS

    def points() -> None:
        sweep = files.read_sweep(storage.safe_join(root, frame.lidar_path), columns)
        if needs.labels and frame.label_path is not None:  # `labels` tells of frames without
            point_labels(frame, config.data, len(sweep))

    def image(camera: Camera) -> None:
        path = storage.safe_join(root, camera.image_path)
        data = storage.read_bytes(path)
        size = files.image_size(data, path)
        if size != (camera.width, camera.height):
            wanted = f"{camera.width} x {camera.height}"
            raise DataError(f"{path}: is {size[0]} x {size[1]} pixels, the frame table says {wanted}")
        if whole:
            files.decode_image(data, path)

    looks = [points] if needs.sweeps else []
    if needs.images:
        looks += [partial(image, camera) for camera in frame.cameras if camera.channel in config.data.cameras]
    return [_problem(look) for look in looks]


def _problem(look: Callable[[], None]) -> str | None:
    try:
        look()
    except DataError as error:
        return str(error)
    return None


def _and_more(problems: Sequence[str]) -> str:
    return f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""


def _ref(camera: Camera) -> ImageRef:
    return ImageRef(camera.token, camera.image_path, camera.width, camera.height)
