"""The numbers of every published row, written out from SLidR's paper and code: a config that differs is another row."""

from __future__ import annotations

from pathlib import Path

import pytest

from slidr.config import Config, load

CONFIGS = Path(__file__).parents[1] / "configs"
STUDENT = "runs/slidr_minkunet/student.pt"

# file: loss, teacher, learning rate, batch, segments, voxel size, cylindrical
PRETRAINING = {
    "slidr_minkunet": ("superpixel_info_nce", "dilation_resnet50", 0.5, 4, 150, (0.1, 1.0, 0.1), True),
    "ppkt_minkunet": ("point_pixel_info_nce", "ppkt_resnet50", 0.5, 4, 150, (0.1, 1.0, 0.1), True),
    "slidr_voxelnet": ("superpixel_info_nce", "dilation_resnet50", 0.01, 6, 30, (0.1, 0.1, 0.2), False),
}

# file: fraction, weights, frozen, learning rate, of the last layer, batch
DOWNSTREAM = {
    "finetune/nuscenes_1pct": (0.01, STUDENT, False, 0.02, 2.0, 16),
    "finetune/nuscenes_5pct": (0.05, STUDENT, False, 0.02, 2.0, 16),
    "finetune/nuscenes_10pct": (0.1, STUDENT, False, 0.02, 2.0, 16),
    "finetune/nuscenes_25pct": (0.25, STUDENT, False, 0.02, 2.0, 16),
    "finetune/nuscenes_100pct": (1.0, STUDENT, False, 0.02, 2.0, 16),
    "finetune/nuscenes_1pct_random": (0.01, None, False, 0.05, None, 16),
    "finetune/nuscenes_5pct_random": (0.05, None, False, 0.05, None, 16),
    "finetune/nuscenes_10pct_random": (0.1, None, False, 0.05, None, 16),
    "finetune/nuscenes_25pct_random": (0.25, None, False, 0.05, None, 16),
    "finetune/nuscenes_100pct_random": (1.0, None, False, 0.05, None, 16),
    "finetune/semantic_kitti_1pct": (0.01, STUDENT, False, 0.05, 2.0, 10),
    "finetune/semantic_kitti_1pct_random": (0.01, None, False, 0.05, None, 10),
    "probe/nuscenes": (1.0, STUDENT, True, 0.05, None, 16),
    "probe/nuscenes_random": (1.0, None, True, 0.05, None, 16),
}


def require_slidrs_sgd(config: Config) -> None:
    """What every published row shares."""
    optim = config.optim
    assert (optim.name, optim.momentum, optim.dampening, optim.weight_decay) == ("sgd", 0.9, 0.1, 1e-4)
    assert (optim.schedule, optim.max_steps, optim.accumulate, optim.precision) == ("cosine", None, 1, "float32")
    assert not config.data.voxel.azimuth_wrap


def test_every_shipped_row_has_its_numbers_here() -> None:
    shipped = {
        path.relative_to(CONFIGS).with_suffix("").as_posix()
        for folder in ("pretrain", "finetune", "probe")
        for path in (CONFIGS / folder).glob("*.yaml")
    }
    assert shipped == {f"pretrain/{name}" for name in PRETRAINING} | set(DOWNSTREAM)


@pytest.mark.parametrize("name", PRETRAINING)
def test_a_pretraining_has_the_published_numbers(name: str) -> None:
    config = load(CONFIGS / "pretrain" / f"{name}.yaml")
    loss, teacher, rate, batch, segments, size, cylindrical = PRETRAINING[name]
    require_slidrs_sgd(config)
    assert (config.loss.names, config.loss.temperature) == ((loss,), 0.07)
    assert config.loss.pairs == 4096
    assert (config.teacher.name, config.teacher.weights) == (teacher, "moco_v2")
    assert (config.optim.lr, config.optim.batch_size, config.optim.epochs) == (rate, batch, 50)
    superpixels = config.superpixels
    assert (superpixels.segments, superpixels.compactness, superpixels.sigma) == (segments, 6.0, 3.0)
    assert config.student.name == ("voxelnet" if name.endswith("voxelnet") else "minkunet34c")
    assert (config.student.out_channels, config.student.width) == (64, 1.0)
    if config.student.name == "minkunet34c":  # VoxelNet's norms have OpenPCDet's momentum
        assert config.student.bn_momentum == 0.05
    assert (config.data.voxel.size, config.data.voxel.cylindrical) == (size, cylindrical)
    data = config.data
    assert (data.train_split, data.val_split, data.train_fraction) == ("parametrize", "verify", 1.0)
    assert (data.image_size, data.min_depth, len(data.cameras)) == ((224, 416), 1.0, 6)
    augment = data.augment
    assert augment.rotate
    assert augment.flip_axes
    assert (augment.drop_cuboid, augment.drop_cuboid_max_side, augment.drop_cuboid_min_pairs) == (True, 0.2, 1024)
    assert (augment.crop, augment.crop_area, augment.crop_min_pairs) == (True, (0.3, 1.0), 1024)
    assert augment.crop_aspect == pytest.approx((14 / 9, 17 / 9))
    assert (augment.crop_min_share, augment.flip_images, augment.shuffle_cameras) == (0.75, True, True)


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_a_downstream_row_has_the_published_numbers(name: str) -> None:
    config = load(CONFIGS / f"{name}.yaml")
    fraction, weights, frozen, rate, head_rate, batch = DOWNSTREAM[name]
    require_slidrs_sgd(config)
    assert (config.data.train_split, config.data.val_split, config.data.train_fraction) == ("train", "val", fraction)
    assert (config.student.weights, config.student.freeze) == (weights, frozen)
    assert (config.optim.lr, config.optim.head_lr, config.optim.batch_size) == (rate, head_rate, batch)
    assert (config.optim.epochs, config.student.bn_momentum) == (100, 0.02)
    assert (config.student.name, config.student.width) == ("minkunet34c", 1.0)
    assert (config.data.voxel.cylindrical, config.data.voxel.size) == (True, (0.1, 1.0, 0.1))
    kitti = "kitti" in name
    assert config.data.dataset == ("semantic_kitti" if kitti else "nuscenes")
    assert config.student.out_channels == (20 if kitti else 17)
    assert (config.loss.names, config.loss.class_weights) == (("cross_entropy_lovasz",), None)
    augment = config.data.augment
    assert (augment.rotate, augment.flip_axes, augment.scale) == (True, True, (1.0, 1.0))
    assert config.evaluation.votes == 1
