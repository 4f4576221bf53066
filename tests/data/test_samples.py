"""Samples: the real keyframe as the original implementation makes it, and what augmentation must keep true."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slidr.config import AugmentConfig, DataConfig, StudentName, VoxelConfig
from slidr.data.images import encode_label_map
from slidr.data.samples import pair_sample, row_to_sample, sample_rng, sample_to_row, scan_sample
from slidr.data.storage import DataError
from slidr.ops.pairing import pair_points
from slidr.ops.superpixels import slic
from slidr.types import CAMERA_CHANNELS, Frame, PairSample, ScanSample

SMALL = VoxelConfig(size=(0.4, 2.0, 0.4))


@pytest.fixture(scope="module")
def maps(tiny_world: Path, world_frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Superpixels of the tiny world's first frames."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("maps")
    for frame in world_frames[:2]:
        for camera in frame.cameras:
            image = np.array(Image.open(tiny_world / camera.image_path))
            (folder / f"{camera.token}.png").write_bytes(encode_label_map(slic(image, 40, 6.0, 1.0)))
    return str(folder)


@pytest.fixture(scope="module")
def world(tiny_world: Path) -> DataConfig:
    """The tiny world, augmented in every way that its few pairs allow."""
    options = AugmentConfig(drop_cuboid_min_pairs=10, crop_min_pairs=100, scale=(0.95, 1.05))
    return DataConfig(root=str(tiny_world), image_size=(56, 104), voxel=SMALL, augment=options)


def sample_of(
    frame: Frame,
    data: DataConfig,
    maps: str,
    *,
    student: StudentName = "minkunet34c",
    seed: int = 0,
    epoch: int = 0,
    training: bool = True,
) -> PairSample:
    return pair_sample(frame, data, maps, student=student, seed=seed, epoch=epoch, training=training)


def assert_equal(one: PairSample | ScanSample, other: PairSample | ScanSample) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- the real keyframe ---


@pytest.fixture(scope="module")
def real(real_frame: Frame, real_nuscenes: Path, real_superpixels: str) -> PairSample:
    """The real keyframe as validation sees it."""
    return sample_of(real_frame, DataConfig(root=str(real_nuscenes)), real_superpixels, training=False)


def test_the_real_keyframe_has_the_originals_voxels(real: PairSample, golden: Path) -> None:
    expected = np.load(golden / "voxels_cylindrical.npz")["coords"]
    ours, theirs = ({tuple(c) for c in coords.tolist()} for coords in (real.coordinates, expected))
    assert len(ours ^ theirs) <= 0.002 * len(theirs)


def test_the_real_keyframe_has_the_originals_pairs(real: PairSample, golden: Path) -> None:
    crops, projection = np.load(golden / "crops.npz"), np.load(golden / "projection.npz")
    voxel_of_point = np.load(golden / "voxels_cylindrical.npz")["point_voxel_coords"]
    ours = np.hstack([real.coordinates[real.point_index], real.pixel_index])
    theirs = np.hstack([voxel_of_point[projection["pairing_points"]], crops["val_pairing_images"]])
    ours_set, theirs_set = ({tuple(row) for row in rows.tolist()} for rows in (ours, theirs))
    assert len(ours) == pytest.approx(len(theirs), rel=0.002)
    assert len(ours_set ^ theirs_set) <= 2 * 0.005 * len(theirs)


def test_the_real_keyframe_has_the_originals_images_and_superpixels(real: PairSample, golden: Path) -> None:
    crops = np.load(golden / "crops.npz")
    np.testing.assert_allclose(real.images[0][:, ::4, ::4], crops["val_image0"], atol=1e-5)
    np.testing.assert_array_equal(real.superpixels[0], crops["val_superpixels0"])


def test_a_training_sample_of_the_real_keyframe_keeps_enough_pairs(
    real_frame: Frame, real_nuscenes: Path, real_superpixels: str
) -> None:
    data = DataConfig(root=str(real_nuscenes), cameras=CAMERA_CHANNELS[:2])
    sample = sample_of(real_frame, data, real_superpixels)
    assert sample.images.shape == (2, 3, 224, 416)
    assert (np.bincount(sample.pixel_index[:, 0], minlength=2) > 1024).all()


# --- what must hold of every sample ---


def test_a_sample_is_a_function_of_seed_epoch_and_frame(
    world_frames: list[Frame], world: DataConfig, maps: str
) -> None:
    one = sample_of(world_frames[0], world, maps, seed=3, epoch=5)
    sample_of(world_frames[1], world, maps, seed=3, epoch=5)
    assert_equal(one, sample_of(world_frames[0], world, maps, seed=3, epoch=5))
    for seed, epoch in ((3, 6), (4, 5)):
        other = sample_of(world_frames[0], world, maps, seed=seed, epoch=epoch)
        assert not np.array_equal(one.images, other.images)
        assert not np.array_equal(one.points, other.points)


def test_streams_of_randomness_differ_by_seed_epoch_and_token() -> None:
    places = [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 1, "a")]
    assert len({sample_rng(*place).integers(2**63) for place in places}) == len(places)


@pytest.mark.parametrize("student", ["minkunet34c", "voxelnet"])
@pytest.mark.parametrize("training", [True, False])
def test_indices_stay_inside_what_they_count(
    world_frames: list[Frame], world: DataConfig, maps: str, student: StudentName, training: bool
) -> None:
    for epoch in range(3):
        sample = sample_of(world_frames[0], world, maps, student=student, epoch=epoch, training=training)
        assert len(sample.point_index) == len(sample.pixel_index) > 0
        assert sample.images.shape == (6, 3, 56, 104)
        assert sample.superpixels.shape == (6, 56, 104)
        assert 0 <= sample.images.min() <= sample.images.max() <= 1
        assert sample.point_index.min() >= 0
        assert sample.point_index.max() < len(sample.points)
        assert (sample.pixel_index >= 0).all()
        assert (sample.pixel_index < [6, 56, 104]).all()
        assert len(sample.features) == len(sample.coordinates)
        assert len(np.unique(sample.coordinates, axis=0)) == len(sample.coordinates)


def test_augmented_pairs_still_show_the_same_things(
    world_frames: list[Frame], world: DataConfig, tiny_world: Path, tmp_path: Path
) -> None:
    """Each point carries its number as intensity; its superpixel must not depend on the augmentation."""
    frame = world_frames[0]
    row, column = np.indices((90, 160))
    blocks = (4 * (row // 30) + column // 40).astype(np.uint16)  # twelve labels
    (tmp_path / f"{frame.cameras[0].token}.png").write_bytes(encode_label_map(blocks))
    shutil.copytree(tiny_world / "samples" / "CAM_FRONT", tmp_path / "samples" / "CAM_FRONT")
    cloud = np.fromfile(tiny_world / frame.lidar_path, np.float32).reshape(-1, 5)
    cloud[:, 3] = np.arange(len(cloud)) / 256  # an intensity is at most 255
    (tmp_path / frame.lidar_path).parent.mkdir()
    cloud.tofile(tmp_path / frame.lidar_path)
    data = replace(
        world,
        root=str(tmp_path),
        cameras=("CAM_FRONT",),
        image_size=(90, 160),
        voxel=VoxelConfig(cylindrical=False, size=(1e-3, 1e-3, 1e-3)),  # every point a voxel of its own
        augment=replace(world.augment, scale=(1.0, 1.0)),
    )

    def seen(sample: PairSample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        image, row, column = sample.pixel_index.T
        number = (sample.features[sample.point_index, 0] * 256).astype(int)
        return number, sample.superpixels[image, row, column].astype(int), sample.points[sample.point_index]

    label_of_point = np.full(len(cloud), -1)
    number, label, points = seen(sample_of(frame, data, str(tmp_path), training=False))
    label_of_point[number] = label
    np.testing.assert_array_equal(points, cloud[number, :3])
    for epoch in range(8):
        number, label, points = seen(sample_of(frame, data, str(tmp_path), epoch=epoch))
        assert len(number) > 100
        # Rounding moves a pixel across a border now and then.
        assert (label == label_of_point[number]).mean() > 0.9
        np.testing.assert_allclose(points[:, 2], cloud[number, 2])
        np.testing.assert_allclose(
            np.hypot(points[:, 0], points[:, 1]), np.hypot(cloud[number, 0], cloud[number, 1]), rtol=1e-4
        )


def test_a_points_place_is_kept_up_to_rotation_flips_and_scale(
    world_frames: list[Frame], world: DataConfig, maps: str
) -> None:
    data = replace(world, augment=replace(world.augment, drop_cuboid=False), voxel=VoxelConfig(size=(1e-4,) * 3))
    plain = sample_of(world_frames[0], data, maps, training=False)
    turned = sample_of(world_frames[0], data, maps)
    factor = np.sort(turned.points[:, 2]) / np.sort(plain.points[:, 2])
    assert 0.95 <= np.median(factor) <= 1.05
    radius, other = (np.sort(np.hypot(p[:, 0], p[:, 1])) for p in (plain.points, turned.points))
    np.testing.assert_allclose(other, radius * np.median(factor), rtol=1e-3)
    assert not np.allclose(np.sort(plain.points[:, 0]), np.sort(turned.points[:, 0]), atol=0.1)


def test_cameras_keep_their_order_in_validation_and_lose_it_in_training(
    world_frames: list[Frame], world: DataConfig, maps: str
) -> None:
    data = replace(world, augment=AugmentConfig(crop=False, flip_images=False, drop_cuboid=False))
    plain = sample_of(world_frames[0], data, maps, training=False)
    orders = []
    for epoch in range(4):
        sample = sample_of(world_frames[0], data, maps, epoch=epoch)
        distance = np.abs(sample.images[:, None] - plain.images[None]).sum((2, 3, 4))
        orders.append(tuple(distance.argmin(1).tolist()))
        assert (distance.min(1) == 0).all()
        assert sorted(orders[-1]) == list(range(6))
    assert len(set(orders)) > 1


def test_a_birds_eye_student_gets_the_points_within_its_range(
    world_frames: list[Frame], world: DataConfig, maps: str
) -> None:
    sample = sample_of(world_frames[0], world, maps, student="voxelnet", training=False)
    assert (np.hypot(sample.points[:, 0], sample.points[:, 1]) <= 51.2001).all()
    assert sample.features.shape == (len(sample.coordinates), 4)
    assert (sample.coordinates < [40, 1024, 1024]).all()
    # Each paired point projects, through the frame's cameras, to a pixel of the resized image next to its pair's.
    pairs = pair_points(sample.points, world_frames[0].cameras, world.min_depth)
    moved = {
        (int(p), int(c), *np.clip(np.rint(px * [56 / 90, 104 / 160]), 0, [55, 103]).astype(int).tolist())
        for p, c, px in zip(pairs.point_index, pairs.camera_index, pairs.pixel, strict=True)
    }
    ours = {(int(p), *map(int, px)) for p, px in zip(sample.point_index, sample.pixel_index, strict=True)}
    assert ours == moved


def test_rows_give_samples_back(world_frames: list[Frame], world: DataConfig, maps: str) -> None:
    pair = sample_of(world_frames[0], world, maps)
    scan = scan_sample(world_frames[0], world, student="minkunet34c", seed=0, epoch=0, training=True)
    assert_equal(pair, row_to_sample(sample_to_row(pair), PairSample))
    widened = {k: v if k == "token" else v.astype(np.float64) for k, v in sample_to_row(scan).items()}
    assert_equal(scan, row_to_sample(widened, ScanSample))


# --- sweeps for segmentation ---


def test_a_scans_labels_follow_its_points(world_frames: list[Frame], world: DataConfig, tiny_world: Path) -> None:
    frame = world_frames[0]
    still = scan_sample(frame, world, student="minkunet34c", seed=0, epoch=0, training=False)
    turned = scan_sample(frame, world, student="minkunet34c", seed=0, epoch=0, training=True)
    cloud = np.fromfile(tiny_world / frame.lidar_path, np.float32).reshape(-1, 5)
    np.testing.assert_array_equal(still.point_labels, turned.point_labels)
    np.testing.assert_allclose(turned.distance, np.hypot(cloud[:, 0], cloud[:, 1]), rtol=1e-5)
    for sample in (still, turned):
        first = [int(np.flatnonzero(sample.voxel_of_point == v)[0]) for v in range(0, len(sample.features), 50)]
        np.testing.assert_array_equal(sample.voxel_labels[::50], sample.point_labels[first])
        np.testing.assert_array_equal(sample.features[::50, 0], cloud[first, 3])
    assert set(np.unique(still.point_labels)) <= set(range(17))


def test_a_scan_without_labels_is_refused_unless_none_are_asked_for(
    world_frames: list[Frame], world: DataConfig
) -> None:
    bare = replace(world_frames[0], label_path=None)
    arguments = {"student": "minkunet34c", "seed": 0, "epoch": 0, "training": False}
    with pytest.raises(DataError, match=f"frame {bare.token} of {bare.scene} has no point labels"):
        scan_sample(bare, world, **arguments)  # type: ignore[arg-type]
    assert not scan_sample(bare, world, labelled=False, **arguments).point_labels.any()  # type: ignore[arg-type]
    with pytest.raises(DataError, match="voxelnet has no score per point"):
        scan_sample(bare, world, **{**arguments, "student": "voxelnet"})  # type: ignore[arg-type]


# --- damage ---


def test_damage_is_refused_by_the_file_at_fault(
    world_frames: list[Frame], world: DataConfig, maps: str, tmp_path: Path
) -> None:
    frame = world_frames[0]
    spoiled = tmp_path / "maps"
    shutil.copytree(maps, spoiled)
    token = frame.cameras[0].token
    (spoiled / f"{token}.png").write_bytes(encode_label_map(np.zeros((9, 16), np.uint16)))
    with pytest.raises(DataError, match=rf"{token}\.png: is 16 x 9 pixels, the frame table says 160 x 90"):
        sample_of(frame, world, str(spoiled))
    (spoiled / f"{token}.png").unlink()
    with pytest.raises(DataError, match=rf"{token}\.png: superpixel map is missing; compute it with"):
        sample_of(frame, world, str(spoiled))
    with pytest.raises(DataError, match="has no cameras at all"):
        sample_of(replace(frame, cameras=()), world, maps)
    with pytest.raises(DataError, match="leaves the data root"):
        sample_of(replace(frame, lidar_path="../x.bin"), world, maps)
    nan = np.full((3, 5), np.nan, np.float32)
    (tmp_path / "x.bin").write_bytes(nan.tobytes())
    with pytest.raises(DataError, match=r"x\.bin: 3 of 3 points are not finite"):
        scan_sample(
            replace(frame, lidar_path="x.bin"),
            replace(world, root=str(tmp_path)),
            student="minkunet34c",
            seed=0,
            epoch=0,
            training=False,
        )


def test_a_sweep_of_one_point_high_above_makes_a_sample_without_pairs_and_an_empty_one_none(
    world_frames: list[Frame], world: DataConfig, maps: str, tiny_world: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_world / "samples", tmp_path / "samples")
    sweep = tmp_path / world_frames[0].lidar_path
    data = replace(world, root=str(tmp_path))
    # In no camera's view, and above VoxelNet's grid.
    sweep.write_bytes(np.array([[0, 0, 50, 1, 0]], np.float32).tobytes())
    for student, voxels in (("minkunet34c", 1), ("voxelnet", 0)):
        for training in (True, False):
            sample = sample_of(world_frames[0], data, maps, student=student, training=training)  # type: ignore[arg-type]
            assert len(sample.coordinates) == voxels
            assert len(sample.point_index) == len(sample.pixel_index) == 0
            assert sample.images.shape == (6, 3, 56, 104)
    sweep.write_bytes(b"")
    with pytest.raises(DataError, match=r"LIDAR_TOP.*\.bin: is empty"):
        sample_of(world_frames[0], data, maps)
