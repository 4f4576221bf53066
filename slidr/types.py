"""What flows through the house: frames, pairs, samples and batches.

Arrays are numpy up to and including samples, tensors from batches on. Lengths are metres, angles radians,
timestamps microseconds. A 4x4 transform named ``target_from_source`` maps homogeneous source coordinates to
target coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np

from slidr.shapes import Float32, Float64, Int32, Int64, UInt16

if TYPE_CHECKING:  # tasks that cut superpixels start a second sooner without torch
    import torch
    from torch import Tensor

CAMERA_CHANNELS = (
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_RIGHT",
    "CAM_BACK",
    "CAM_BACK_LEFT",
    "CAM_FRONT_LEFT",
)


@dataclass(frozen=True)
class Camera:
    """One image of a frame and where its camera stood when it was taken."""

    channel: str
    token: str  # the image's sample_data token; names its superpixel map
    image_path: str  # relative to the dataroot
    width: int  # pixels
    height: int  # pixels
    timestamp: int  # microseconds
    intrinsics: Float64[np.ndarray, "3 3"]  # pixels
    ego_from_camera: Float64[np.ndarray, "4 4"]
    global_from_ego: Float64[np.ndarray, "4 4"]  # at the camera's time
    camera_from_lidar: Float64[np.ndarray, "4 4"]  # lidar at its own time, through the global frame


@dataclass(frozen=True)
class Frame:
    """One keyframe: a lidar sweep, the images taken with it, and its neighbours in time.

    ``cameras`` is empty where a data set has none to offer (SemanticKITTI); ``label_path`` is None where a
    frame has no point labels (test splits). ``previous`` and ``next`` are tokens of the scene's neighbouring
    keyframes.
    """

    token: str
    scene: str
    timestamp: int  # microseconds
    lidar_token: str
    lidar_path: str  # relative to the dataroot
    label_path: str | None  # relative to the dataroot
    ego_from_lidar: Float64[np.ndarray, "4 4"]
    global_from_ego: Float64[np.ndarray, "4 4"]  # at the lidar's time
    cameras: tuple[Camera, ...]
    previous: str | None
    next: str | None
    splits: tuple[str, ...]  # every split the frame's scene belongs to, e.g. ("train", "parametrize")


@dataclass(frozen=True)
class Pairing:
    """Point-pixel pairs: point ``point_index[i]`` is seen at ``pixel[i]`` of image ``camera_index[i]``."""

    point_index: Int64[np.ndarray, " P"]
    camera_index: Int64[np.ndarray, " P"]
    pixel: Int64[np.ndarray, "P 2"]  # row, column

    def __len__(self) -> int:
        return len(self.point_index)

    def __getitem__(self, keep: np.ndarray) -> Pairing:
        return Pairing(self.point_index[keep], self.camera_index[keep], self.pixel[keep])


@dataclass(frozen=True)
class PairSample:
    """One keyframe ready for distillation: a voxelized cloud, its images, their superpixels, and the pairs.

    ``point_index`` counts the rows that the student answers with: voxels for a voxel student (a point speaks
    through its voxel), points in range for a bird's-eye-view student. ``points`` says where these rows lie.
    ``pixel_index`` is (image, row, column).
    """

    token: str
    coordinates: Int32[np.ndarray, "V 3"]
    features: Float32[np.ndarray, "V C"]
    points: Float32[np.ndarray, "N 3"]  # metres, lidar frame after augmentation; where each answer lies
    images: Float32[np.ndarray, "I 3 H W"]  # RGB in [0, 1]
    superpixels: UInt16[np.ndarray, "I H W"]
    point_index: Int64[np.ndarray, " P"]
    pixel_index: Int64[np.ndarray, "P 3"]


@dataclass(frozen=True)
class ScanSample:
    """One sweep ready for segmentation. Labels are per voxel for the loss and per point for the score."""

    token: str
    coordinates: Int32[np.ndarray, "V 3"]
    features: Float32[np.ndarray, "V C"]
    voxel_of_point: Int64[np.ndarray, " N"]
    voxel_labels: Int64[np.ndarray, " V"]
    point_labels: Int64[np.ndarray, " N"]
    distance: Float32[np.ndarray, " N"]  # metres from the sensor in the plane, for scores by distance


@dataclass(frozen=True)
class _Movable:
    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch with every tensor on `device`."""
        from torch import Tensor

        moved = {
            name: value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return type(self)(**moved)


@dataclass(frozen=True)
class PairBatch(_Movable):
    """Several `PairSample`s as one: column 0 of ``coordinates`` and of ``pixel_index`` tells them apart.

    Images are stacked, so ``pixel_index[:, 0]`` counts images of the whole batch.
    """

    tokens: tuple[str, ...]
    coordinates: Int32[Tensor, "V 4"]  # batch, x, y, z
    features: Float32[Tensor, "V C"]
    images: Float32[Tensor, "I 3 H W"]  # RGB in [0, 1]
    superpixels: Int64[Tensor, "I H W"]
    points: Float32[Tensor, "N 4"]  # batch, x, y, z in metres
    point_index: Int64[Tensor, " P"]  # into the rows of `features` (voxel student) or `points` (BEV student)
    pixel_index: Int64[Tensor, "P 3"]  # image, row, column


@dataclass(frozen=True)
class ScanBatch(_Movable):
    """Several `ScanSample`s as one. ``voxel_of_point`` indexes the rows of ``features``."""

    tokens: tuple[str, ...]
    coordinates: Int32[Tensor, "V 4"]  # batch, x, y, z
    features: Float32[Tensor, "V C"]
    voxel_of_point: Int64[Tensor, " N"]
    voxel_labels: Int64[Tensor, " V"]
    point_labels: Int64[Tensor, " N"]
    distance: Float32[Tensor, " N"]  # metres
    points_per_scan: tuple[int, ...] = field(default=())
