"""From a frame to a sample: read, pair, augment, voxelize. A sample is a pure function of its arguments.

All randomness comes from (run seed, epoch, frame token), so neither the number of workers nor the order in
which they work changes a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from slidr.config import AugmentConfig, DataConfig, StudentName
from slidr.data import images as files
from slidr.data import storage
from slidr.data.label_maps import known_segments, map_path
from slidr.data.labels import classes_of
from slidr.data.storage import DataError
from slidr.data.sweeps import read_points
from slidr.ops import augment
from slidr.ops.pairing import pair_points
from slidr.ops.voxelize import voxelize, voxelize_grid
from slidr.shapes import Float32, Int32, Int64, UInt8, UInt16
from slidr.types import Camera, Frame, Pairing, PairSample, ScanSample

Sample = TypeVar("Sample", PairSample, ScanSample)

BEV_RADIUS = 51.2  # m; a bird's-eye-view student sees no farther


def sample_rng(seed: int, epoch: int, token: str) -> np.random.Generator:
    """The one generator of a sample's randomness."""
    word = int.from_bytes(hashlib.sha256(token.encode()).digest()[:8], "little")
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, word]))


def pair_sample(
    frame: Frame,
    data: DataConfig,
    labels_folder: str,
    *,
    student: StudentName,
    seed: int,
    epoch: int,
    training: bool,
) -> PairSample:
    """A keyframe ready for distillation: cloud and images paired, augmented (in training), voxelized.

    In order: the cameras are shuffled; points are paired with pixels; the cloud is rotated, flipped and
    scaled; a cuboid is dropped; every image is cropped and flipped. Out of training images are only resized.
    `labels_folder` holds the superpixel maps, <image token>.png.

    The rows of `points` are those of the answers that `point_index` counts: for a voxel student the point
    that speaks for each voxel, for a bird's-eye-view student every point in its range.

    Raises `DataError` naming the file that is missing, damaged, or of another size than the frame table says.
    """
    rng = sample_rng(seed, epoch, frame.token)
    cameras = _cameras(frame, data, rng if training and data.augment.shuffle_cameras else None)
    points, intensity = read_cloud(frame, data)
    pairing = pair_points(points, cameras, data.min_depth)
    if training:
        points = _augment_cloud(points, data.augment, rng)
    if student == "voxelnet":
        near = (points[:, :2].astype(np.float64) ** 2).sum(1) <= BEV_RADIUS**2
        points, intensity, pairing = points[near], intensity[near], _keep_points(pairing, near)
    if training and data.augment.drop_cuboid:
        kept, pairing = augment.drop_cuboid(
            points,
            pairing,
            len(cameras),
            rng,
            max_side=data.augment.drop_cuboid_max_side,
            min_pairs=data.augment.drop_cuboid_min_pairs,
        )
        points, intensity = points[kept], intensity[kept]
    views = [
        _view(camera, pairing[pairing.camera_index == i], data, labels_folder, rng if training else None)
        for i, camera in enumerate(cameras)
    ]
    coordinates, features, points, row_of_point = _answers(points, intensity, data, student)
    return PairSample(
        token=frame.token,
        coordinates=coordinates,
        features=features,
        points=points,
        images=np.stack([view.image for view in views]),
        superpixels=np.stack([view.superpixels for view in views]),
        point_index=row_of_point[np.concatenate([view.point_index for view in views])],
        pixel_index=np.concatenate([np.insert(view.pixel, 0, i, axis=1) for i, view in enumerate(views)]),
    )


def scan_sample(
    frame: Frame,
    data: DataConfig,
    *,
    student: StudentName,
    seed: int,
    epoch: int,
    training: bool,
    labelled: bool = True,
) -> ScanSample:
    """A sweep ready for segmentation: labelled, rotated, flipped and scaled (in training), voxelized.

    A voxel's label is that of the point which gives it its feature. Not `labelled` (a test split), every
    label is 0, the ignored class. Raises `DataError` where a file is missing or damaged, where the frame has
    no labels, or for a bird's-eye-view student, which has no score per point.
    """
    if student == "voxelnet":
        raise DataError(
            "student.name: voxelnet has no score per point; segment with a MinkUNet, or export it for detection"
        )
    points, intensity = read_cloud(frame, data)
    labels = point_labels(frame, data, len(points)) if labelled else np.zeros(len(points), np.int64)
    distance = np.hypot(points[:, 0], points[:, 1])
    if training:
        points = _augment_cloud(points, data.augment, sample_rng(seed, epoch, frame.token))
    voxels = voxelize(points, data.voxel.size, data.voxel.cylindrical, data.voxel.azimuth_wrap)
    return ScanSample(
        token=frame.token,
        coordinates=voxels.coordinates,
        features=intensity[voxels.point_of_voxel, None],
        voxel_of_point=voxels.voxel_of_point,
        voxel_labels=labels[voxels.point_of_voxel],
        point_labels=labels,
        distance=distance,
    )


def sample_to_row(sample: PairSample | ScanSample) -> dict[str, Any]:
    """A sample as a plain row of arrays and strings, for Ray Data."""
    return dict(vars(sample))


def row_to_sample(row: Mapping[str, Any], cls: type[Sample]) -> Sample:
    """The sample that `sample_to_row` made a row of; shapes and types that a store has changed are put right."""
    return cls(**{f.name: _restored(row[f.name], f.name) for f in fields(cls)})


_TYPE_OF = {
    "coordinates": np.int32,
    "features": np.float32,
    "points": np.float32,
    "images": np.float32,
    "superpixels": np.uint16,
    "point_index": np.int64,
    "pixel_index": np.int64,
    "voxel_of_point": np.int64,
    "voxel_labels": np.int64,
    "point_labels": np.int64,
    "distance": np.float32,
}


def _restored(value: Any, name: str) -> Any:
    return str(value) if name == "token" else np.ascontiguousarray(value, _TYPE_OF[name])


@dataclass(frozen=True)
class _View:
    """One image as the teacher sees it, and where the frame's points fall in it."""

    image: Float32[np.ndarray, "3 H W"]
    superpixels: UInt16[np.ndarray, "H W"]
    point_index: Int64[np.ndarray, " P"]
    pixel: Int64[np.ndarray, "P 2"]  # row, column


def _view(
    camera: Camera, pairing: Pairing, data: DataConfig, labels_folder: str, rng: np.random.Generator | None
) -> _View:
    """A camera's image, superpixels and pairs at `data.image_size`, cropped and flipped where there is an
    `rng`.
    """
    image = read_camera(camera, data)
    superpixels = read_superpixels(camera, labels_folder, known_segments(labels_folder))
    options, size, point_index = data.augment, data.image_size, pairing.point_index
    if rng is not None and options.crop:
        crop = augment.draw_crop(
            camera.height,
            camera.width,
            pairing.pixel,
            rng,
            area=options.crop_area,
            aspect=options.crop_aspect,
            min_pairs=options.crop_min_pairs,
            min_share=options.crop_min_share,
            size=size,
        )
        pixel, inside = augment.crop_pixels(pairing.pixel, crop, size)
        point_index = point_index[inside]
    else:
        crop = augment.Crop(0, 0, camera.height, camera.width)
        pixel = augment.resize_pixels(pairing.pixel, (camera.height, camera.width), size)
    resized = augment.crop_image(image, crop, size)
    labels = augment.crop_labels(superpixels, crop, size)
    if rng is not None and options.flip_images and rng.random() < 0.5:
        resized, labels = augment.flip_image(resized), augment.flip_image(labels)
        pixel = augment.flip_pixels(pixel, size[1])
    return _View(resized, labels, point_index, pixel)


def _answers(
    points: Float32[np.ndarray, "N 3"], intensity: Float32[np.ndarray, " N"], data: DataConfig, student: StudentName
) -> tuple[Int32[np.ndarray, "V 3"], Float32[np.ndarray, "V C"], Float32[np.ndarray, "R 3"], Int64[np.ndarray, " N"]]:
    """Voxel coordinates and features, where each of the student's R answers lies, and the answer of each
    point.
    """
    if student == "voxelnet":
        grid = voxelize_grid(np.column_stack([points, intensity]), radius=BEV_RADIUS)
        return grid.indices, grid.features, points, np.arange(len(points))
    voxels = voxelize(points, data.voxel.size, data.voxel.cylindrical, data.voxel.azimuth_wrap)
    speakers = voxels.point_of_voxel
    return voxels.coordinates, intensity[speakers, None], points[speakers], voxels.voxel_of_point


def _cameras(frame: Frame, data: DataConfig, rng: np.random.Generator | None) -> list[Camera]:
    """The frame's cameras of the configured channels, in the config's order or, given an `rng`, in a random one.

    Without `data.allow_missing: cameras` all of them must be there.
    """
    camera_of = {camera.channel: camera for camera in frame.cameras}
    there = [channel for channel in data.cameras if channel in camera_of]
    absent = [channel for channel in data.cameras if channel not in camera_of]
    if not there or (absent and data.allow_missing != "cameras"):
        raise DataError(
            f"frame {frame.token} of {frame.scene}: has no {absent or 'configured camera'}; it has "
            f"{sorted(camera_of) or 'no cameras at all'}; set data.cameras"
        )
    cameras = [camera_of[channel] for channel in there]
    return cameras if rng is None else [cameras[i] for i in rng.permutation(len(cameras))]


def read_cloud(frame: Frame, data: DataConfig) -> tuple[Float32[np.ndarray, "N 3"], Float32[np.ndarray, " N"]]:
    """A frame's points (m, lidar frame) and their intensity, checked. Raises `DataError` naming the sweep."""
    return read_points(storage.safe_join(data.root, frame.lidar_path), data.dataset)


def point_labels(frame: Frame, data: DataConfig, points: int) -> Int64[np.ndarray, " N"]:
    """The class of each of a sweep's `points`.

    Raises `DataError` for a frame without labels, and where its file is missing, of another length, or holds raw
    labels that the data set does not have.
    """
    if frame.label_path is None:
        raise no_labels(frame, data)
    path = storage.safe_join(data.root, frame.label_path)
    dtype = np.uint32 if data.dataset == "semantic_kitti" else np.uint8
    return classes_of(files.read_point_labels(path, dtype, points), data.dataset, path)


def no_labels(frame: Frame, data: DataConfig, more: str = "") -> DataError:
    """What to raise for a frame that needs labels and has none; `more` says how many others have none either."""
    return DataError(
        f"{storage.join(data.root, frame.lidar_path)}: frame {frame.token} of {frame.scene} has no point labels{more}; "
        "add them to the data root (nuScenes-lidarseg, or a sequence's labels/) and write the frame table again"
    )


def _augment_cloud(
    points: Float32[np.ndarray, "N 3"], options: AugmentConfig, rng: np.random.Generator
) -> Float32[np.ndarray, "N 3"]:
    if options.rotate:
        points = augment.rotate_z(points, rng)
    if options.flip_axes:
        points = augment.flip_axes(points, rng)
    if options.scale != (1.0, 1.0):
        points = augment.scale(points, *options.scale, rng)
    return points


def _keep_points(pairing: Pairing, kept: np.ndarray) -> Pairing:
    """The pairs of the points that are kept, counted among those."""
    pairs = pairing[kept[pairing.point_index]]
    return Pairing((np.cumsum(kept) - 1)[pairs.point_index], pairs.camera_index, pairs.pixel)


def read_camera(camera: Camera, data: DataConfig) -> UInt8[np.ndarray, "H W 3"]:
    """A camera's image, of the size that the frame table states. Raises `DataError` as `images.read_image` does."""
    return files.read_image(storage.safe_join(data.root, camera.image_path), (camera.width, camera.height))


def read_superpixels(camera: Camera, labels_folder: str, segments: int | None) -> UInt16[np.ndarray, "H W"]:
    """A camera's superpixel map; `segments` is what the folder's parameters ask for, None where it has none.

    Raises `DataError` where it is missing, and as `images.read_label_map` does.
    """
    path = map_path(labels_folder, camera.token)
    if not storage.exists(path):
        raise DataError(f"{path}: superpixel map is missing; compute it with `slidr superpixels CONFIG`")
    return files.read_label_map(path, (camera.width, camera.height), segments)
