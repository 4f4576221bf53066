"""The superpixel job: one label map per image, on all the CPUs of a Ray cluster.

Outputs are idempotent: a map is named by its image, written whole or not at all, in a folder named by the
parameters. So a run that was killed, node or driver, is simply run again: it computes what is missing or
damaged.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import ray.data

from slidr.cluster import session
from slidr.cluster.heap import keep_heap
from slidr.cluster.progress import counting
from slidr.cluster.room import telling_waits_for_a_cpu
from slidr.config import ClusterConfig, DataConfig, SuperpixelConfig, fingerprint
from slidr.data import images as files
from slidr.data import storage
from slidr.data.frames import FrameTable
from slidr.data.image_list import ImageList, ImageRef
from slidr.data.label_maps import PARAMETERS, map_path
from slidr.data.records import read_json
from slidr.data.storage import SENSOR_BYTES, DataError
from slidr.ops.superpixels import HEAP_PER_PIXEL, slic
from slidr.types import Frame
from slidr.urls import redact_url

Compute = Callable[[ImageRef, str, str, SuperpixelConfig], None]  # image, root, folder, parameters

MANIFEST = "manifest.json"
_MOST = 64  # images of one task: each costs Ray some 20 ms
_LEAST, _LEAST_PIXELS = 4, 1.44e6  # and fewest: a second or two, as Ray Data gives a CPU its next task 0.2 s late
_SHARE = 0.75  # of what is left for each CPU, in one task: more saves pauses, less ends more evenly
_CPUS_TO_COME = 32  # where there are none yet: an autoscaled cluster
_CHECKERS = 16  # threads that look for damaged maps
_AHEAD = 8 * _CHECKERS  # maps that are read or wait for a thread


@dataclass(frozen=True)
class SuperpixelReport:
    """What a run of the job did. `failed` holds (image path, reason)."""

    folder: str
    computed: int
    skipped: int
    failed: tuple[tuple[str, str], ...]
    seconds: float


def folder_of(config: SuperpixelConfig) -> str:
    """The folder of the label maps of these parameters, for example slic-150-6-3-0a1b2c3d4e."""
    name = f"slic-{config.segments}-{config.compactness:g}-{config.sigma:g}"
    return storage.join(config.folder, f"{name}-{fingerprint(config.parameters)}")


def compute_superpixels(
    frames: Sequence[Frame] | FrameTable,
    data: DataConfig,
    config: SuperpixelConfig,
    cluster: ClusterConfig,
    progress: bool = True,
) -> SuperpixelReport:
    """Makes the label map of every image of the frames' configured cameras that has none, or a damaged one.

    An image that cannot be read is reported and the rest is done; so the caller ends with a failure where
    `report.failed` is not empty. Beside the maps lie their parameters and, once all is done, a manifest.
    Raises `DataError` where no frame has an image of these cameras, where the folder cannot be written or holds other
    parameters' maps, where two images have one token, and where a token cannot name a file.
    """
    images = _images(frames, data)
    if len(images) == 0:
        raise DataError(
            f"superpixels: none of the {len(frames)} frames in {data.frames} has an image of data.cameras "
            f"({', '.join(data.cameras)}): the data set has no cameras, or others; superpixels and pretraining need "
            f"images, fine-tuning and evaluation do not"
        )
    return compute_images(images, data.root, config, cluster, progress)


def compute_images(
    images: Sequence[ImageRef],
    root: str,
    config: SuperpixelConfig,
    cluster: ClusterConfig,
    progress: bool = True,
    compute: Compute | None = None,
) -> SuperpixelReport:
    """`compute_superpixels` for a list of images; `compute` makes one image's map (`compute_map`)."""
    began = time.monotonic()
    folder = folder_of(config)
    images = (images if isinstance(images, ImageList) else ImageList.of(images)).distinct()
    _write_parameters(folder, config)
    storage.sweep_temporary(folder)
    missing = missing_maps(folder, images, progress)
    failed: list[tuple[str, str]] = []
    if missing:
        session.start(cluster)
        results = _results(missing, root, folder, config, cluster, compute or compute_map)
        again = "end this with Ctrl-C: the same command does the rest later"
        with telling_waits_for_a_cpu("superpixels", again), counting("superpixels", len(missing), progress) as count:
            for path, reason in results:
                count(not reason)
                if reason:
                    failed.append((path, reason))
    report = SuperpixelReport(
        folder=folder,
        computed=len(missing) - len(failed),
        skipped=len(images) - len(missing),
        failed=tuple(sorted(failed)),
        seconds=time.monotonic() - began,
    )
    _write_manifest(report, len(images))
    return report


def compute_map(image: ImageRef, root: str, folder: str, config: SuperpixelConfig) -> None:
    """Writes one image's label map. Raises `DataError` for an image that cannot be used."""
    path, target = storage.safe_join(root, image.path), map_path(folder, image.token)
    pixels = files.read_image(path, (image.width, image.height))
    try:
        labels = slic(pixels, config.segments, config.compactness, config.sigma, config.engine)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    storage.write_bytes_atomic(target, files.encode_label_map(labels))


def missing_maps(folder: str, images: Sequence[ImageRef], progress: bool = False) -> ImageList:
    """The images without an undamaged label map of their size.

    Maps are read by threads, a bounded number at a time: the memory does not grow with the number of images.
    """
    there = storage.list_names(folder)

    def is_missing(image: ImageRef) -> bool:
        try:
            path = map_path(folder, image.token)
            files.require_label_map(storage.read_bytes(path, SENSOR_BYTES), path, (image.width, image.height))
        except DataError:
            return True
        return False

    images = images if isinstance(images, ImageList) else ImageList.of(images)
    missing = np.zeros(len(images), bool)
    with ThreadPoolExecutor(_CHECKERS) as pool, counting("maps looked for", len(images), progress) as count:
        reading: deque[tuple[int, Future[bool]]] = deque()

        def take_oldest() -> None:
            place, found = reading.popleft()
            missing[place] = found.result()
            count(True)

        try:
            for place, image in enumerate(images):
                if f"{image.token}.png" not in there:
                    missing[place] = True
                    count(True)
                    continue
                reading.append((place, pool.submit(is_missing, image)))
                if len(reading) >= _AHEAD:
                    take_oldest()
            while reading:
                take_oldest()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # or Ctrl-C would wait for all of them
            raise
    return images.take(np.flatnonzero(missing))


def _images(frames: Sequence[Frame] | FrameTable, data: DataConfig) -> ImageList:
    """The images of the configured cameras."""
    if isinstance(frames, FrameTable):
        return frames.image_list(data.cameras)
    return ImageList.of(
        ImageRef(camera.token, camera.image_path, camera.width, camera.height)
        for frame in frames
        for camera in frame.cameras
        if camera.channel in data.cameras
    )


def _results(
    todo: ImageList,
    root: str,
    folder: str,
    config: SuperpixelConfig,
    cluster: ClusterConfig,
    compute: Compute,
) -> Iterator[tuple[str, str]]:
    """(image path, reason of failure or "") of each image, as tasks all over the cluster finish them."""
    cpus = cluster.superpixel_cpus or session.available_cpus() or _CPUS_TO_COME
    # Copies: a slice would travel with all the images that it was cut from.
    blocks = [part.take(np.arange(len(part))).table for part in cut_blocks(todo, cpus)]

    def work(row: dict[str, Any]) -> dict[str, Any]:
        keep_heap()
        image = ImageRef(**row)
        try:
            compute(image, root, folder, config)
        except (ValueError, MemoryError) as error:  # this image's fault
            return {"path": image.path, "reason": str(error) or type(error).__name__, "fatal": False}
        except OSError as error:  # the folder's: no other image would fare better
            return {"path": image.path, "reason": str(error), "fatal": True}
        return {"path": image.path, "reason": "", "fatal": False}

    # Without a limit of the user's, none: an autoscaled cluster starts with few CPUs, or none at all.
    dataset = ray.data.from_blocks(blocks)  # `from_arrow` would start a task of a CPU for each, all at once
    dataset.context.enable_progress_bars = False
    results = dataset.map(work, num_cpus=1, memory=_task_memory(todo), concurrency=cluster.superpixel_cpus)
    for row in results.iter_rows():
        if row["fatal"]:
            raise DataError(
                f"{folder}: superpixels cannot be written ({row['reason']}); free space or choose another "
                "superpixels.folder, then run again: what is done stays done"
            )
        yield row["path"], row["reason"]


def cut_blocks(todo: ImageList, cpus: int) -> list[ImageList]:
    """The images of each task, in order: few at first, then many, and fewer and fewer towards the end.

    So the first results come soon, and the last CPUs to finish do so together, not a whole task apart.
    """
    least = max(1, min(_LEAST, int(_LEAST_PIXELS / int(todo.pixels.max()))))
    blocks: list[ImageList] = []
    first = 0
    while first < len(todo):
        most = least if len(blocks) < cpus else _MOST
        share = int((len(todo) - first) * _SHARE / cpus)
        size = min(most, max(least, share))
        blocks.append(todo[first : first + size])
        first += size
    return blocks


def _task_memory(todo: ImageList) -> int:
    """Heap bytes that one image's task may need; never more than the cluster has for each CPU."""
    need = HEAP_PER_PIXEL * int(todo.pixels.max())
    have = ray.cluster_resources().get("memory", 0) / max(1, session.available_cpus())
    return int(min(need, have))


def _write_parameters(folder: str, config: SuperpixelConfig) -> None:
    """Puts the parameters beside the maps; refuses a folder that holds other ones'."""
    path = storage.join(folder, PARAMETERS)
    wanted = {"method": "slic", **{k: v for k, v in asdict(config).items() if k not in ("folder", "engine")}}
    if storage.exists(path):
        try:
            found = read_json(path)
        except DataError:
            found = None  # damaged; the folder's name states the parameters, too
        if found == wanted:
            return
        if found is not None:
            raise DataError(
                f"{path}: expected {wanted}, got {found}; move this folder away, or this file alone if it is damaged"
            )
    try:
        storage.write_bytes_atomic(path, json.dumps(wanted, indent=2).encode())
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}); choose another superpixels.folder") from error


def _write_manifest(report: SuperpixelReport, images: int) -> None:
    """The last file of a run: how many maps its images have, and which images have none."""
    manifest = {
        "images": images,
        "maps": images - len(report.failed),
        "failed": {redact_url(path): redact_url(reason) for path, reason in report.failed},
    }
    storage.write_bytes_atomic(storage.join(report.folder, MANIFEST), json.dumps(manifest, indent=2).encode())
