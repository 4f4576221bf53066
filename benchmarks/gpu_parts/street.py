"""A street as a 32-beam lidar and six cameras see it: numpy alone, the same for the same seed.

Ground, two rows of house fronts, cross streets' ends, cars, trunks and poles, met by rays of nuScenes' elevations
and azimuths. A ray that meets nothing within range returns a point near the sensor, as nuScenes stores it, so that a
sweep always has beams x columns rows, 34,688 at full size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from slidr.data.collate import collate_pairs
from slidr.ops.augment import resize_pixels
from slidr.ops.pairing import pair_points
from slidr.ops.voxelize import voxelize, voxelize_grid
from slidr.types import CAMERA_CHANNELS, Camera, PairBatch, PairSample

HEIGHT = 1.84  # m of the lidar above the ground
RANGE = 105.0  # m
PHOTOGRAPH = (900, 1600)  # height, width of a camera's image, pixels
BEV_RADIUS = 51.2  # m
# Yaw of each camera in the lidar's frame (x right, y forward), degrees from y to the left; focal length, pixels.
YAWS = {"CAM_FRONT": 0, "CAM_FRONT_RIGHT": -55, "CAM_BACK_RIGHT": -110, "CAM_BACK": 180, "CAM_BACK_LEFT": 110}
YAWS["CAM_FRONT_LEFT"] = 55
FOCAL, FOCAL_BACK = 1266.0, 809.0


def sweep(seed: int, beams: int = 32, columns: int = 1084) -> np.ndarray:
    """(beams * columns, 4) float32: x, y, z (m, lidar frame) and intensity (0 to 255)."""
    rng = np.random.default_rng(seed)
    elevation = np.radians(np.linspace(-30.67, 10.67, beams))
    azimuth = np.linspace(-np.pi, np.pi, columns, endpoint=False) + rng.uniform(0, 2 * np.pi / columns)
    azimuth, elevation = (grid.ravel() for grid in np.meshgrid(azimuth, elevation, indexing="ij"))
    rays = np.stack(
        [np.cos(elevation) * np.sin(azimuth), np.cos(elevation) * np.cos(azimuth), np.sin(elevation)], axis=1
    )
    low, high, shade = _boxes(rng)
    distance, hit = _nearest(rays, low, high)
    intensity = np.where(hit < 0, 12.0, shade[hit])
    lost = (distance > RANGE) | (rng.random(len(rays)) < 0.2)  # the sky, glass, wet asphalt, the car's own roof
    distance = np.where(lost, rng.uniform(0.3, 0.35, len(rays)), distance + rng.normal(0, 0.005, len(rays)))
    intensity = np.clip(intensity + rng.normal(0, 4, len(rays)), 0, 255)
    return np.column_stack([rays * distance[:, None], np.round(intensity)]).astype(np.float32)


def _boxes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Low corners, high corners (m, lidar frame) and intensities of everything but the ground."""
    boxes = []
    for side in (-1, 1):
        y = -90.0
        while y < 90:
            length, front, height = rng.uniform(6, 20), rng.uniform(8, 16), rng.uniform(4, 14)
            x = sorted((side * front, side * (front + 10)))
            boxes.append((x[0], y, -HEIGHT, x[1], y + length, height - HEIGHT, rng.uniform(8, 40)))
            y += length + (rng.uniform(6, 14) if rng.random() < 0.2 else 0)  # now and then a side street
        for y in np.arange(-80, 80, rng.uniform(7, 9)):
            x, kind = side * rng.uniform(4, 7), rng.random()
            if kind < 0.55:  # a parked car
                boxes.append((x - 0.9, y, -HEIGHT + 0.25, x + 0.9, y + 4.4, -HEIGHT + 1.5, rng.uniform(10, 60)))
            elif kind < 0.8:  # a trunk and its crown
                boxes.append((x - 0.2, y, -HEIGHT, x + 0.2, y + 0.4, 2.5, 15.0))
                boxes.append((x - 1.5, y - 1.3, 1.2, x + 1.5, y + 1.7, 4.0, 9.0))
            else:  # a pole, or somebody
                boxes.append((x - 0.15, y, -HEIGHT, x + 0.15, y + 0.3, rng.uniform(-0.1, 4), rng.uniform(5, 90)))
    for y in (-95.0, 92.0):
        boxes.append((-60.0, y, -HEIGHT, 60.0, y + 3, 8.0, 20.0))
    for _ in range(8):  # driving cars
        x, y = rng.choice([-1.8, 1.8]) + rng.normal(0, 0.2), rng.uniform(6, 60) * rng.choice([-1, 1])
        boxes.append((x - 0.9, y, -HEIGHT + 0.25, x + 0.9, y + 4.5, -HEIGHT + 1.55, rng.uniform(10, 60)))
    table = np.array(boxes)
    return table[:, :3], table[:, 3:6], table[:, 6]


def _nearest(rays: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance (m) along each unit ray from the origin to what it meets first, and which box that is, -1: none."""
    with np.errstate(divide="ignore"):
        distance = np.where(rays[:, 2] < 0, -HEIGHT / rays[:, 2], np.inf)
        inverse = 1 / rays
    hit = np.full(len(rays), -1)
    for number, (a, b) in enumerate(zip(low, high, strict=True)):
        entry, leaving = a * inverse, b * inverse
        near = np.minimum(entry, leaving).max(1)
        met = (near > 0) & (near <= np.maximum(entry, leaving).min(1)) & (near < distance)
        distance[met], hit[met] = near[met], number
    return distance, hit


def read_sweep(root: Path) -> np.ndarray:
    """The first sweep in a nuScenes root, as `sweep` gives it. Raises `FileNotFoundError` where there is none."""
    files = sorted((root / "samples" / "LIDAR_TOP").glob("*.bin"))
    if not files:
        raise FileNotFoundError(f"{root}: has no samples/LIDAR_TOP/*.bin; pass the folder that holds samples/")
    return np.fromfile(files[0], np.float32).reshape(-1, 5)[:, :4].copy()


def cameras(count: int = 6) -> list[Camera]:
    """The first of nuScenes' cameras, at their nominal places."""
    height, width = PHOTOGRAPH
    made = []
    for channel in CAMERA_CHANNELS[:count]:
        yaw, focal = np.radians(YAWS[channel]), FOCAL_BACK if channel == "CAM_BACK" else FOCAL
        forward = np.array([-np.sin(yaw), np.cos(yaw), 0])
        down = np.array([0.0, 0.0, -1.0])
        camera_from_lidar = np.eye(4)
        camera_from_lidar[:3, :3] = np.stack([np.cross(down, forward), down, forward])
        camera_from_lidar[:3, 3] = -camera_from_lidar[:3, :3] @ (0.6 * forward + 0.3 * down)
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
        eye = np.eye(4)
        made.append(
            Camera(channel, channel, f"{channel}.jpg", width, height, 0, intrinsics, eye, eye, camera_from_lidar)
        )
    return made


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: a bright sky over shaded patches with edges and grain, about as hard to encode as a street."""
    height, width = size
    rows, columns = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    image = np.stack([120 + 110 * (1 - rows) * (rows < 0.4) + 40 * np.sin(7 * columns + k) for k in range(3)], axis=2)
    for _ in range(60):
        top, left = rng.integers(height), rng.integers(width)
        window = (slice(top, top + rng.integers(4, height // 3)), slice(left, left + rng.integers(4, width // 4)))
        image[window] = 0.5 * image[window] + rng.uniform(0, 120, 3)
    return np.clip(image + rng.normal(0, 5, (height, width, 1)), 0, 255).astype(np.uint8)


def superpixels(rng: np.random.Generator, size: tuple[int, int], segments: int) -> np.ndarray:
    """(H, W) uint16 labels of cells around jittered grid points, about `segments` of them."""
    down = max(1, round((segments * size[0] / size[1]) ** 0.5))
    across = max(1, segments // down)
    spacing = np.array(size) / (down, across)
    centres = (np.stack(np.mgrid[:down, :across], 2) + rng.uniform(0.2, 0.8, (down, across, 2))) * spacing
    pixel = np.stack(np.mgrid[: size[0], : size[1]], 2)
    cell = (pixel / spacing).astype(int)
    nearest, label = np.full(size, np.inf), np.zeros(size, np.uint16)
    for step in np.ndindex(3, 3):
        near = np.clip(cell + np.array(step) - 1, 0, np.array([down, across]) - 1)
        square = ((pixel - centres[near[..., 0], near[..., 1]]) ** 2).sum(2)
        closer = square < nearest
        nearest[closer], label[closer] = square[closer], (near[..., 0] * across + near[..., 1])[closer]
    return label


def sample(points: np.ndarray, seed: int, student: str, count: int, size: tuple[int, int]) -> PairSample:
    """One keyframe of `points` (x, y, z, intensity), ready for a step: voxels, images, superpixels and pairs."""
    rng = np.random.default_rng([seed, 7])
    views, xyz, intensity = cameras(count), points[:, :3], points[:, 3]
    if student == "voxelnet":
        near = np.hypot(xyz[:, 0], xyz[:, 1]) <= BEV_RADIUS
        xyz, intensity = xyz[near], intensity[near]
    pairing = pair_points(xyz, views)
    turn = rng.uniform(0, 2 * np.pi)  # after the pairs are known, as in training
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]], np.float32)
    xyz = xyz @ rotation.T
    if student == "voxelnet":
        grid = voxelize_grid(np.column_stack([xyz, intensity]), radius=BEV_RADIUS)
        coordinates, features, row_of_point = grid.indices, grid.features, np.arange(len(xyz))
    else:
        voxels = voxelize(xyz)
        coordinates, row_of_point = voxels.coordinates, voxels.voxel_of_point
        xyz, features = xyz[voxels.point_of_voxel], intensity[voxels.point_of_voxel, None]
    pixel = resize_pixels(pairing.pixel, PHOTOGRAPH, size)
    images = np.stack([photograph(rng, size) for _ in views]).astype(np.float32) / 255
    return PairSample(
        token=f"street-{seed}",
        coordinates=coordinates,
        features=features.astype(np.float32),
        points=np.ascontiguousarray(xyz, np.float32),
        images=np.ascontiguousarray(images.transpose(0, 3, 1, 2)),
        superpixels=np.stack([superpixels(rng, size, 150) for _ in views]),
        point_index=row_of_point[pairing.point_index],
        pixel_index=np.insert(pixel, 0, pairing.camera_index, axis=1),
    )


def batch(clouds: list[np.ndarray], student: str, count: int, size: tuple[int, int], first_seed: int = 0) -> PairBatch:
    """Several keyframes as one batch on the CPU."""
    made = [sample(points, first_seed + n, student, count, size) for n, points in enumerate(clouds)]
    return collate_pairs([replace(one, token=f"{one.token}-{n}") for n, one in enumerate(made)])
