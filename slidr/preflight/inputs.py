"""Whether what a job reads is there and whole: weights, frame table, labels, the data root's files, superpixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from slidr.cluster.evaluate import is_scored, lacking_of_submission
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.config import Config
from slidr.data import storage
from slidr.data.completeness import scan_gaps
from slidr.data.frames import FrameTable, open_table
from slidr.data.label_maps import map_path, read_segments
from slidr.data.loading import require_labels, subset_frames
from slidr.data.plan import spread
from slidr.data.samples import point_labels, read_camera, read_cloud, read_superpixels
from slidr.data.storage import DataError
from slidr.models.download import EncoderName, locate_weights, student_location
from slidr.models.files import WeightsError, read_checkpoint
from slidr.models.teachers import TEACHERS
from slidr.models.weights import require_encoder, student_state
from slidr.ops.pairing import pair_points
from slidr.preflight.findings import Finding, Stage
from slidr.preflight.plan import images_to_cut, job_of
from slidr.types import Camera, Frame
from slidr.urls import redact_url

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
    else:
        yield _student_weights(student)
    if job_of(config) != "finetune" and config.teacher.weights is not None:
        yield _teacher_weights(config.teacher.weights, TEACHERS[config.teacher.name].weights_of)


def _student_weights(student: str) -> Finding:
    """A file is opened as training opens it; an object store is only asked for it, and a URL not even that."""
    try:
        path, url = student_location(student)
        if url is not None:
            return _download_to_come("student", student, url, Path(path))
        if not storage.is_remote(path):
            student_state(read_checkpoint(path), redact_url(student))
        elif not storage.exists(path):
            raise WeightsError(f"{redact_url(student)}: no such file")
    except (WeightsError, DataError, OSError) as error:
        return Finding("student", "error", redact_url(str(error)), "slidr pretrain, or another --student.weights")
    return Finding("student", "ok", redact_url(student))


def _teacher_weights(teacher: str, encoder: EncoderName) -> Finding:
    try:
        path, url = locate_weights(teacher, encoder=encoder)
        if url is not None:
            return _download_to_come("teacher", teacher, url, path)
        require_encoder(path, encoder)
    except (WeightsError, OSError) as error:
        return Finding("teacher", "error", redact_url(str(error)), "docs/weights.md")
    return Finding("teacher", "ok", str(path))


def _download_to_come(name: str, wanted: str, url: str, path: Path) -> Finding:
    wanted, url = redact_url(wanted), redact_url(url)
    text = wanted if wanted == url else f"{wanted}: {url}"
    return Finding(
        name, "warning", f"{text}: not here yet; each node that trains downloads it into its own cache",
        f"on nodes without internet: put the file at {path}, or set SLIDR_CACHE to a folder that all nodes see",
    )  # fmt: skip


def frame_table(config: Config) -> Finding:
    """The frame table is whole, holds the config's data set, and has frames to train and to validate on."""
    data = config.data
    try:
        table = open_table(data.frames, data.dataset)
        table.verify()
    except DataError as error:
        return Finding("frames", "error", str(error), "slidr frames CONFIG")
    try:
        train = table.select(data.train_split, data.train_fraction)
        val = table.select(data.val_split)
    except DataError as error:
        return Finding("frames", "error", str(error), "another split, or slidr frames CONFIG from tables that have it")
    text = f"{len(table)} keyframes: {len(train)} to train on, {len(val)} to validate on"
    if table.allow_missing is not None:
        return Finding(
            "frames", "warning", f"{text}; of a download that is not whole ({table.allow_missing}): {table.left_out}",
            "finish the download, then slidr frames CONFIG without data.allow_missing",
        )  # fmt: skip
    return Finding("frames", "ok", text)


def cameras(config: Config) -> Finding:
    """Every frame to train and to validate on has the cameras that the config asks for, by the frame table.

    A table of a download that is not whole (`allow_missing: cameras`) may lack some of them in each frame.
    """
    data = config.data
    table = open_table(data.frames, data.dataset)
    frames = table.select((data.train_split, data.val_split))
    lacking, wanted = frames.lacking(data.cameras), ", ".join(data.cameras)
    there = [channel for channel in data.cameras if lacking.get(channel, 0) < len(frames)]
    if not there:
        known = ", ".join(camera.channel for camera in frames[0].cameras) or "no cameras at all"
        return Finding(
            "cameras", "error",
            f"{data.frames}: no frame of these splits has an image of {wanted}; the first frame has {known}",
            "set data.cameras; superpixels and pretraining need images, fine-tuning does not",
        )  # fmt: skip
    blind = frames.blind(data.cameras)
    texts = [f"{count} of {len(frames)} frames have no {channel}" for channel, count in lacking.items()]
    texts += [f"{blind} have none of data.cameras"] if blind else []
    text = f"{data.frames}: {'; '.join(texts)}"
    if blind or (lacking and table.allow_missing != "cameras"):
        return Finding("cameras", "error", text, "set data.cameras to those that every frame has")
    if lacking:
        return Finding("cameras", "warning", text, "finish the download, then slidr frames CONFIG")
    return Finding("cameras", "ok", f"every frame has {wanted}")


def scans(config: Config) -> Iterable[Finding]:
    """SemanticKITTI: every official scan of the sequences is in the frame table."""
    if config.data.dataset != "semantic_kitti":
        return
    gaps = scan_gaps(open_table(config.data.frames, config.data.dataset).tokens)
    if gaps:
        text = "; ".join(gaps[:_SHOWN]) + _and_more(gaps)
        yield Finding("scans", "warning", text, "unpack the archives again, then slidr frames CONFIG")
    else:
        yield Finding("scans", "ok", "every sequence of the table is whole")


def submission(config: Config) -> Iterable[Finding]:
    """The frame table has all of the split that predictions are made for."""
    if config.evaluation.submission is None:
        return
    try:
        lacking = lacking_of_submission(config)
    except DataError as error:
        yield Finding("submission", "error", str(error), "choose another evaluation.split")
        return
    if lacking:
        yield Finding(
            "submission", "warning", f"{config.evaluation.split} is not whole in the frame table: it lacks {lacking}",
            "finish the download, then slidr frames CONFIG; the benchmark refuses predictions that are not whole",
        )  # fmt: skip
    else:
        yield Finding("submission", "ok", f"the frame table has all of {config.evaluation.split}")


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


def data_root(config: Config, count: int, needs: Needs) -> Finding:
    """The files of some keyframes that a job needs, spread over the table: the job's own readers accept them.

    Superpixels are made for the images that are good, and the others named at the end, so damage is a warning there,
    unless nothing is good.
    """
    gone = root_folder(config)
    if gone is not None:
        return gone
    tables = _tables(config, needs)
    # Both splits may hold the same frame.
    frames = [table[i] for table in tables for i in spread(len(table), count // len(tables)).tolist()]
    chosen = list({frame.token: frame for frame in frames}.values())
    with ThreadPoolExecutor(_READERS) as pool:
        looked_at = pool.map(lambda frame: _looked_at(frame, config, needs), chosen)
        found = [problem for of_one in looked_at for problem in of_one]
    problems = list(dict.fromkeys(text for text in found if text is not None))  # frames may share an image
    if not problems:
        text = f"{config.data.root}: files of {len(chosen)} keyframes read and decoded, no fault found"
        return Finding("data root", "ok", text)
    text = "; ".join(problems[:_SHOWN]) + _and_more(problems)
    if needs == SUPERPIXELS and len(problems) < len(found):
        return Finding("data root", "warning", text, "copy these files again; the others are done meanwhile")
    return Finding("data root", "error", text, "is data.root this table's data set? Else copy the files again")


def pairs(config: Config, count: int) -> Finding:
    """The cameras of some keyframes see points: those at most `count` of both splits make pairs.

    A camera that sees none in any of them is a warning; where none of them sees any, as with another unit of length or
    a mirrored extrinsic, it is an error.
    """
    tables, data = _tables(config, PRETRAINING), config.data
    frames = [table[i] for table in tables for i in spread(len(table), count // len(tables)).tolist()]
    chosen = list({frame.token: frame for frame in frames}.values())
    seen: dict[str, list[int]] = {channel: [] for channel in data.cameras}
    looked: list[str] = []
    for frame in chosen:
        cameras = [camera for camera in frame.cameras if camera.channel in data.cameras]
        try:
            found = pair_points(read_cloud(frame, data)[0], cameras, data.min_depth)
        except DataError:  # `data_root` names it
            continue
        looked.append(frame.token)
        for number, camera in enumerate(cameras):
            seen[camera.channel].append(int((found.camera_index == number).sum()))
    if not looked:
        return Finding("pairs", "warning", "no keyframe could be read to count them", "see the data root's line")
    text = f"points seen in {len(looked)} keyframes: " + ", ".join(f"{name} {sum(n)}" for name, n in seen.items() if n)
    step = (
        "are the poses in metres, camera_from_lidar with z forward, the intrinsics in pixels of these images? See also "
        "data.min_depth and data.cameras"
    )
    if not any(map(sum, seen.values())):
        shown = ", ".join(looked[:_SHOWN]) + _and_more(looked)
        return Finding("pairs", "error", f"no camera sees a point of keyframes {shown}; {text}", step)
    blind = [name for name, numbers in seen.items() if numbers and not any(numbers)]
    if blind:
        return Finding("pairs", "warning", f"{', '.join(blind)} sees no point; {text}", step)
    return Finding("pairs", "ok", text)


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
    """Some of the training images have their superpixel maps, and the training's own reader accepts them."""
    problems, opened, missing = _map_problems(config, count)
    folder = superpixel_folder(config.superpixels)
    if problems:
        return _damaged_maps(problems)
    if missing:
        text = f"{folder}: {missing} of {missing + opened} maps looked for are missing"
        return Finding("superpixels", "error" if needed else "warning", text, "slidr superpixels CONFIG")
    return Finding("superpixels", "ok", f"{folder}: maps of {opened} images read, no fault found")


def all_superpixels(config: Config, count: int = MANY) -> Finding:
    """Every image of the training and validation splits has its map, and the training's reader accepts some of them."""
    try:
        pixels, there = images_to_cut(config)
        problems, opened, _ = _map_problems(config, count)
    except OSError as error:
        return Finding("superpixels", "error", f"cannot be looked for ({error})", "choose another superpixels.folder")
    except DataError as error:
        return Finding("superpixels", "error", str(error), "slidr frames CONFIG, with a token for each image")
    if problems:
        return _damaged_maps(problems)
    text = f"{superpixel_folder(config.superpixels)}: {there} of {len(pixels)} maps, {opened} of them read"
    if there == len(pixels):
        return Finding("superpixels", "ok", text)
    return Finding("superpixels", "warning", text, "slidr superpixels CONFIG does what is missing")


def _map_problems(config: Config, count: int) -> tuple[list[str], int, int]:
    """What is wrong with some maps, how many were read, and how many are missing."""
    folder = superpixel_folder(config.superpixels)
    try:
        segments = read_segments(folder)
    except DataError as error:
        return [str(error)], 0, 0
    table = open_table(config.data.frames, config.data.dataset).select(
        config.data.train_split, config.data.train_fraction
    )
    chosen = np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(int).tolist()
    images = [camera for i in chosen for camera in table[i].cameras if camera.channel in config.data.cameras]

    def look(camera: Camera) -> str | None:
        """The fault of a map; "" where it is missing."""
        try:
            if not storage.exists(map_path(folder, camera.token)):
                return ""
            read_superpixels(camera, folder, segments)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(look, images))
    return [text for text in found if text], found.count(None), found.count("")


def _damaged_maps(problems: Sequence[str]) -> Finding:
    return Finding(
        "superpixels", "error", "; ".join(problems[:_SHOWN]) + _and_more(problems), "slidr superpixels CONFIG"
    )


def _tables(config: Config, needs: Needs) -> list[FrameTable]:
    """The frames whose files a job needs: those that it trains on and those that it validates on."""
    if needs.images:  # superpixels are made for all of both splits
        data = config.data
        return [open_table(data.frames, data.dataset).select(split) for split in (data.train_split, data.val_split)]
    return [subset_frames(config, "train"), subset_frames(config, "val")]


def _looked_at(frame: Frame, config: Config, needs: Needs) -> list[str | None]:
    """What is wrong with each file of a keyframe that a job needs; None for a good one."""
    data = config.data

    def points() -> None:
        cloud, _ = read_cloud(frame, data)
        if needs.labels and frame.label_path is not None:  # `labels` looks for frames without
            point_labels(frame, data, len(cloud))

    looks: list[Callable[[], Any]] = [points] if needs.sweeps else []
    if needs.images:
        looks += [partial(read_camera, camera, data) for camera in frame.cameras if camera.channel in data.cameras]
    return [_problem(look) for look in looks]


def _problem(look: Callable[[], Any]) -> str | None:
    try:
        look()
    except DataError as error:
        return str(error)
    return None


def _and_more(problems: Sequence[str]) -> str:
    return f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
