"""The superpixel job: one label map per image, on all the CPUs of a Ray cluster.

Outputs are idempotent: a map is named by its image, written whole or not at all, in a folder named by the
parameters. So a run that was killed, node or driver, is simply run again: it computes what is missing or
damaged.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import ray
import ray.data

from slidr.cluster import session
from slidr.cluster.heap import keep_heap
from slidr.cluster.progress import counting
from slidr.config import ClusterConfig, DataConfig, SuperpixelConfig, fingerprint
from slidr.data import images as files
from slidr.data import storage
from slidr.data.frames import FrameTable, ImageRef
from slidr.data.storage import DataError
from slidr.ops.superpixels import HEAP_PER_PIXEL, slic
from slidr.types import Frame

Compute = Callable[[ImageRef, str, str, SuperpixelConfig], None]  # image, root, folder, parameters

PARAMETERS, MANIFEST = "parameters.json", "manifest.json"
_MOST = 64  # images of one task: each costs Ray some 20 ms
_LEAST, _LEAST_PIXELS = 4, 1.44e6  # and fewest: a second or two, as Ray Data gives a CPU its next task 0.2 s late
_SHARE = 0.75  # of what is left for each CPU, in one task: more saves pauses, less ends more evenly
_CPUS_TO_COME = 32  # where there are none yet: an autoscaled cluster
_CHECKERS = 16  # threads that look for damaged maps


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
    return storage.join(config.folder, f"{name}-{fingerprint(replace(config, folder=''))}")


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
    Raises `DataError` where the folder cannot be written or holds other parameters' maps.
    """
    return compute_images(_images(frames, data), data.root, config, cluster, progress)


def compute_images(
    images: Sequence[ImageRef],
    root: str,
    config: SuperpixelConfig,
    cluster: ClusterConfig,
    progress: bool = True,
    compute: Compute | None = None,
) -> SuperpixelReport:
    """`compute_superpixels` of a list of distinct images; `compute` makes one image's map (`compute_map`)."""
    began = time.monotonic()
    folder = folder_of(config)
    _write_parameters(folder, config)
    storage.sweep_temporary(folder)
    missing = missing_maps(folder, images, progress)
    failed: list[tuple[str, str]] = []
    if missing:
        session.start(cluster)
        results = _results(missing, root, folder, config, cluster, compute or compute_map)
        with counting("superpixels", len(missing), progress) as count:
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
    path = storage.safe_join(root, image.path)
    pixels = files.read_image(path)
    if pixels.shape[:2] != (image.height, image.width):
        raise DataError(
            f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, the frame table says {image.width} x "
            f"{image.height}"
        )
    labels = slic(pixels, config.segments, config.compactness, config.sigma)
    storage.write_bytes_atomic(map_path(folder, image), files.encode_label_map(labels))


def map_path(folder: str, image: ImageRef) -> str:
    """Where an image's label map lies."""
    return storage.safe_join(folder, f"{image.token}.png")


def missing_maps(folder: str, images: Sequence[ImageRef], progress: bool = False) -> list[ImageRef]:
    """The images without an undamaged label map of their size."""
    there = storage.list_names(folder)

    def is_missing(image: ImageRef) -> bool:
        if f"{image.token}.png" not in there:
            return True
        try:
            return not is_whole_png(storage.read_bytes(map_path(folder, image)), image.width, image.height)
        except DataError:
            return True

    missing = []
    with ThreadPoolExecutor(_CHECKERS) as pool, counting("maps looked for", len(images), progress) as count:
        try:
            for image, flag in zip(images, pool.map(is_missing, images), strict=True):
                count(True)
                if flag:
                    missing.append(image)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # or Ctrl-C would wait for all of them
            raise
    return missing


def is_whole_png(data: bytes, width: int, height: int) -> bool:
    """Whether a PNG of that size is all there: every chunk's checksum, first to last, without decoding it."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return False
    at, kinds = 8, []
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 12 + length
        if end > len(data) or zlib.crc32(data[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            return False
        kinds.append(data[at + 4 : at + 8])
        if kinds == [b"IHDR"] and struct.unpack_from(">II", data, at + 8) != (width, height):
            return False
        at = end
    return at == len(data) and kinds[:1] == [b"IHDR"] and b"IDAT" in kinds and kinds[-1] == b"IEND"


def _images(frames: Sequence[Frame] | FrameTable, data: DataConfig) -> list[ImageRef]:
    """The distinct images of the configured cameras."""
    if isinstance(frames, FrameTable):
        images = frames.images(data.cameras)
    else:
        images = [
            ImageRef(camera.token, camera.image_path, camera.width, camera.height)
            for frame in frames
            for camera in frame.cameras
            if camera.channel in data.cameras
        ]
    return list({image.token: image for image in images}.values())


def _results(
    todo: Sequence[ImageRef],
    root: str,
    folder: str,
    config: SuperpixelConfig,
    cluster: ClusterConfig,
    compute: Compute,
) -> Iterator[tuple[str, str]]:
    """(image path, reason of failure or "") of each image, as tasks all over the cluster finish them."""
    cpus = cluster.superpixel_cpus or session.available_cpus() or _CPUS_TO_COME
    blocks = [pa.Table.from_pylist([asdict(image) for image in part]) for part in cut_blocks(todo, cpus)]

    def work(row: dict[str, Any]) -> dict[str, Any]:
        keep_heap()
        image = ImageRef(**row)
        try:
            compute(image, root, folder, config)
        except ValueError as error:  # this image's fault
            return {"path": image.path, "reason": str(error), "fatal": False}
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


def cut_blocks(todo: Sequence[ImageRef], cpus: int) -> list[Sequence[ImageRef]]:
    """The images of each task, in order: few at first, then many, and fewer and fewer towards the end.

    So the first are soon told of, and the last CPUs to finish do so together, not a whole task apart.
    """
    pixels = max(image.width * image.height for image in todo)
    least = max(1, min(_LEAST, int(_LEAST_PIXELS / pixels)))
    blocks: list[Sequence[ImageRef]] = []
    first = 0
    while first < len(todo):
        most = least if len(blocks) < cpus else _MOST
        share = int((len(todo) - first) * _SHARE / cpus)
        size = min(most, max(least, share))
        blocks.append(todo[first : first + size])
        first += size
    return blocks


def _task_memory(todo: Sequence[ImageRef]) -> int:
    """Heap bytes that one image's task may need; never more than the cluster has for each CPU."""
    need = HEAP_PER_PIXEL * max(image.width * image.height for image in todo)
    have = ray.cluster_resources().get("memory", 0) / max(1, session.available_cpus())
    return int(min(need, have))


def _write_parameters(folder: str, config: SuperpixelConfig) -> None:
    """Puts the parameters beside the maps; refuses a folder that holds other ones'."""
    path = storage.join(folder, PARAMETERS)
    wanted = {"method": "slic", **{k: v for k, v in asdict(config).items() if k != "folder"}}
    if storage.exists(path):
        try:
            found = json.loads(storage.read_bytes(path))
        except ValueError:
            found = None  # damaged: the folder's name vouches for it
        if found is not None and found != wanted:
            raise DataError(f"{path}: expected {wanted}, got {found}; move this folder away")
        if found == wanted:
            return
    try:
        storage.write_bytes_atomic(path, json.dumps(wanted, indent=2).encode())
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error}); choose another superpixels.folder") from error


def _write_manifest(report: SuperpixelReport, images: int) -> None:
    """The last file of a run: how many maps its images have, and which images have none."""
    manifest = {"images": images, "maps": images - len(report.failed), "failed": dict(report.failed)}
    storage.write_bytes_atomic(storage.join(report.folder, MANIFEST), json.dumps(manifest, indent=2).encode())
