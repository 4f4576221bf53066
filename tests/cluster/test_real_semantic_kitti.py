"""SemanticKITTI's own scans, all the way: learned by heart, evaluated, and written as a submission."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slidr.cluster.evaluate import evaluate
from slidr.cluster.finetune import finetune
from slidr.config import (
    AugmentConfig,
    ClusterConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    StudentConfig,
    VoxelConfig,
)
from slidr.data.frames import write_frames
from slidr.data.images import read_point_labels
from slidr.data.labels import SEMANTIC_KITTI_CLASSES, classes_of
from slidr.data.semantic_kitti import read_frames

K = len(SEMANTIC_KITTI_CLASSES)


def labels_of(root: Path, scan: str) -> np.ndarray:
    raw = np.fromfile(root / f"sequences/00/labels/{scan}.label", np.uint32)
    return classes_of(raw, "semantic_kitti")


@pytest.fixture(scope="module")
def tuned(
    real_semantic_kitti: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, dict[str, Any], dict[str, str]]:
    """A small student that was shown scan 0 and nothing else, and the frame tables of both scans."""
    folder = tmp_path_factory.mktemp("kitti")
    scans = read_frames(str(real_semantic_kitti))
    # Ten copies make an epoch, so that few of the steps are followed by a validation.
    copies = [replace(scans[0], token=f"copy/{i}", splits=("train",)) for i in range(10)]
    tables = {"0": str(folder / "scan0.parquet"), "1": str(folder / "scan1.parquet")}
    for scan, table in zip(scans, tables.values(), strict=True):
        write_frames([*copies, replace(scan, splits=("val",))], table, "semantic_kitti")
    counts = np.bincount(labels_of(real_semantic_kitti, "000000"), minlength=K)
    rare = np.where(counts > 0, 1 / np.sqrt(np.maximum(counts, 1)), 0)
    rare[0] = 0
    config = Config(
        data=DataConfig(
            dataset="semantic_kitti",
            root=str(real_semantic_kitti),
            frames=tables["0"],
            train_split="train",
            val_split="val",
            voxel=VoxelConfig(cylindrical=False, size=(0.2, 0.2, 0.2)),
            augment=AugmentConfig(rotate=False, flip_axes=False),
        ),
        student=StudentConfig(name="minkunet14", width=0.125, out_channels=K, bn_momentum=0.1),
        loss=LossConfig(names=("cross_entropy_lovasz",), class_weights=tuple(rare.tolist())),
        optim=OptimConfig(name="adamw", lr=0.02, weight_decay=0.0, epochs=8, batch_size=1),
        evaluation=EvaluationConfig(bootstrap=20),
        run=RunConfig(folder=str(folder / "runs"), name="kitti", keep_checkpoints=1),
        cluster=ClusterConfig(num_workers=0),
    )
    return config, finetune(config, progress=False), tables


def test_a_student_learns_a_scan_by_heart(tuned: tuple[Config, dict[str, Any], dict[str, str]]) -> None:
    config, result, _ = tuned
    wanted = replace(config.evaluation, checkpoint=result["student"])
    scores = evaluate(replace(config, evaluation=wanted))["evaluation"]
    assert scores["miou"] == pytest.approx(result["val_miou"])
    assert scores["miou"] >= 0.9
    assert len(scores["absent"]) == K - 1 - 12  # of 19 classes the scan shows 12, and no other is predicted


def test_another_scan_is_scored_and_its_predictions_read_back_as_what_was_scored(
    tuned: tuple[Config, dict[str, Any], dict[str, str]], real_semantic_kitti: Path, tmp_path: Path
) -> None:
    config, result, tables = tuned
    wanted = replace(config.evaluation, checkpoint=result["student"], submission=str(tmp_path))
    config = replace(config, data=replace(config.data, frames=tables["1"]), evaluation=wanted)
    scores = evaluate(config)["evaluation"]
    truth = labels_of(real_semantic_kitti, "000001")
    path = tmp_path / "sequences/00/predictions/000001.label"
    predicted = classes_of(read_point_labels(path, np.uint32, len(truth)), "semantic_kitti")
    assert scores["points"] == (truth > 0).sum()
    assert scores["accuracy"] == pytest.approx((predicted == truth)[truth > 0].mean())
    assert scores["accuracy"] > 0.5
