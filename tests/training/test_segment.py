"""Fine-tuning's steps: what is trained, at which rate, and how points are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slidr.config import Config, ConfigError, LossConfig, OptimConfig, StudentConfig, VoxelConfig, decode
from slidr.data.collate import collate_scans
from slidr.losses import cross_entropy_lovasz
from slidr.metrics import ConfusionMatrix
from slidr.models.minkunet import MinkUNet14
from slidr.models.weights import WeightsError
from slidr.training.optim import build_optimizer, set_learning_rate
from slidr.training.segment import Segmenter, SegmentTask, count_scans, predict
from slidr.types import ScanBatch, ScanSample

CLASSES = 17


def small(**changes: Any) -> Config:
    config = Config(
        student=StudentConfig(name="minkunet14", width=0.25, out_channels=CLASSES),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        optim=OptimConfig(lr=0.02),
    )
    return replace(config, **changes)


def frozen() -> Config:
    config = small()
    return replace(config, student=replace(config.student, freeze=True))


def scan(token: str, seed: int, points: int = 60) -> ScanSample:
    """A made-up sweep in which several points share each voxel."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 40, (points // 2, 3)).astype(np.int32)[rng.integers(0, points // 2, points)]
    voxels, voxel_of_point = np.unique(cells, axis=0, return_inverse=True)
    labels = rng.integers(0, CLASSES, points)
    speaker = np.array([np.flatnonzero(voxel_of_point == v)[0] for v in range(len(voxels))])
    return ScanSample(
        token=token,
        coordinates=voxels,
        features=rng.random((len(voxels), 1), dtype=np.float32),
        voxel_of_point=voxel_of_point.reshape(-1).astype(np.int64),
        voxel_labels=labels[speaker],
        point_labels=labels,
        distance=rng.uniform(0, 60, points).astype(np.float32),
    )


def batch(*samples: ScanSample) -> ScanBatch:
    return collate_scans(samples)


def step(task: SegmentTask) -> None:
    optimizer = build_optimizer(task.parameter_groups(), task.config.optim)
    task.model.train()
    data = batch(scan("a", 0))
    task.loss(task.model(data), data)[0].backward()
    optimizer.step()


def changed(before: dict[str, torch.Tensor], task: SegmentTask) -> set[str]:
    return {name for name, value in task.state()["student"].items() if not torch.equal(before[name], value)}


def copy(task: SegmentTask) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.state()["student"].items()}


def test_a_probe_changes_the_last_layer_only_not_even_a_statistic() -> None:
    task = SegmentTask(frozen())
    before = copy(task)
    step(task)
    assert changed(before, task) == {"final.kernel", "final.bias"}


def test_fine_tuning_changes_weights_and_statistics_of_every_layer() -> None:
    task = SegmentTask(small())
    before = copy(task)
    step(task)
    assert changed(before, task) == set(before)


def test_a_frozen_backbone_answers_as_in_evaluation_whatever_mode_is_asked_for() -> None:
    task = SegmentTask(frozen())
    data = batch(scan("a", 0))
    wrapped = torch.nn.Sequential(task.model)  # as a wrapper for several workers does
    assert torch.equal(wrapped.train()(data), wrapped.eval()(data))


def test_the_last_layer_has_its_own_rate_and_follows_the_same_schedule() -> None:
    config = small(optim=OptimConfig(lr=0.02, head_lr=2.0))
    task = SegmentTask(config)
    optimizer = build_optimizer(task.parameter_groups(), config.optim)
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(task.model.student.named_parameters())
    assert len(rates) == len(names)
    for name, parameter in names.items():
        assert rates[id(parameter)] == (1.0 if name in ("final.kernel", "final.bias") else 0.01), name


def test_weights_come_from_a_checkpoint_except_for_the_last_layer(tmp_path: Path) -> None:
    source = MinkUNet14(1, 64, width=0.25)
    torch.save({"model_points": source.state_dict()}, tmp_path / "pretrained.pt")
    config = small(student=replace(small().student, weights=str(tmp_path / "pretrained.pt")))
    task = SegmentTask(config)
    loaded = task.state()["student"]
    for name, value in source.state_dict().items():
        if name.startswith("final."):
            assert loaded[name].shape[-1] == CLASSES
        else:
            assert torch.equal(loaded[name], value), name
    assert task.report is not None
    assert set(task.report.skipped) == set(task.report.missing) == {"final.kernel", "final.bias"}


def test_weights_made_with_other_voxels_are_refused_with_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "pretrained.pt"
    source = MinkUNet14(1, 64, width=0.25)
    torch.save({"model_points": source.state_dict(), "config": {"voxel_size": 0.1}}, path)
    config = small(student=replace(small().student, weights=str(path)))
    config = replace(config, data=replace(config.data, voxel=VoxelConfig(size=(0.2, 1.0, 0.2))))
    with pytest.raises(WeightsError, match=r"pretrained\.pt.*voxel_size 0\.1.*\(0\.2, 1\.0, 0\.2\)"):
        SegmentTask(config)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"student": {"out_channels": 64}}, ["student.out_channels", "64", "17"]),
        ({"data": {"dataset": "semantic_kitti"}}, ["student.out_channels", "17", "20"]),
        (
            {"student": {"name": "voxelnet", "out_channels": 17}, "data": {"voxel": {"cylindrical": False}}},
            ["voxelnet", "MinkUNet"],
        ),
        ({"loss": {"names": ["superpixel_info_nce"]}}, ["loss.names", "cross_entropy_lovasz"]),
    ],
)
def test_configs_that_name_no_segmentation_are_refused(raw: dict[str, Any], words: list[str]) -> None:
    base = {"student": {"out_channels": 17}, "loss": {"names": ["cross_entropy_lovasz"]}}
    with pytest.raises(ConfigError) as caught:
        SegmentTask(decode({**base, **raw}))
    for word in words:
        assert word in str(caught.value)


def test_class_weights_reach_the_loss() -> None:
    weights = tuple(float(i) for i in range(CLASSES))
    task = SegmentTask(small(loss=LossConfig(names=("cross_entropy_lovasz",), class_weights=weights)))
    data = batch(scan("a", 0))
    scores = task.model(data)
    expected = cross_entropy_lovasz(scores, data.voxel_labels, class_weights=torch.tensor(weights))
    assert torch.equal(task.loss(scores, data)[0], expected)
    assert expected != cross_entropy_lovasz(scores, data.voxel_labels)


def test_the_ignored_class_is_never_predicted() -> None:
    scores = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 2.0]])
    assert predict(scores).tolist() == [2, 1]


def test_validation_in_pieces_equals_one_count_of_all_points_at_once() -> None:
    task = SegmentTask(small())
    samples = [scan(str(i), i, points=40 + i) for i in range(3)]
    metrics = task.validate([batch(*samples[:2]), batch(samples[2])])
    truth, predicted = [], []
    with torch.no_grad():
        for sample in samples:  # every point by itself, through its voxel
            scores = task.model.eval()(batch(sample)).numpy()
            for point, label in enumerate(sample.point_labels):
                truth.append(int(label))
                predicted.append(1 + int(np.argmax(scores[sample.voxel_of_point[point]][1:])))
    whole = [(t, p) for t, p in zip(truth, predicted, strict=True) if t != 0]
    iou = {}
    for cls in range(1, CLASSES):
        hits = sum(t == p == cls for t, p in whole)
        union = sum(cls in (t, p) for t, p in whole)
        if union:
            iou[cls] = hits / union
    assert metrics["val_miou"] == pytest.approx(np.mean(list(iou.values())))
    assert metrics["val_accuracy"] == pytest.approx(np.mean([t == p for t, p in whole]))
    assert len([name for name in metrics if name.startswith("val_iou_")]) == len(iou)


def test_a_validation_split_without_labels_is_refused() -> None:
    sample = scan("a", 0)
    blank = replace(sample, point_labels=np.zeros_like(sample.point_labels))
    with pytest.raises(ConfigError, match=r"data\.val_split"):
        SegmentTask(small()).validate([batch(blank)])


def test_counts_by_frame_and_by_distance_hold_every_labelled_point_once() -> None:
    task = SegmentTask(small())
    samples = [scan(str(i), i) for i in range(3)]
    counts = count_scans(task.model, [batch(*samples)], {"2": 0, "0": 1, "1": 2}, CLASSES)
    for token, row in (("2", 0), ("0", 1), ("1", 2)):
        labels = samples[int(token)].point_labels
        assert counts.frames[row].sum(1).tolist() == [int(((labels == c) & (labels > 0)).sum()) for c in range(CLASSES)]
    points = [(d, c) for s in samples for d, c in zip(s.distance, s.point_labels, strict=True) if c != 0]
    near, middle = sum(d < 20 for d, _ in points), sum(20 <= d < 40 for d, _ in points)
    assert counts.bands.sum((1, 2)).tolist() == [near, middle, len(points) - near - middle]
    assert torch.equal(counts.frames.sum(0), counts.bands.sum(0))


def test_votes_of_a_sweep_are_averaged_as_probabilities_per_point() -> None:
    task = SegmentTask(small())
    first = scan("a", 0)
    second = replace(scan("a", 1), point_labels=first.point_labels, distance=first.distance)
    written: dict[str, torch.Tensor] = {}
    counts = count_scans(task.model, [batch(first, second)], {"a": 0}, CLASSES, written.__setitem__)
    with torch.no_grad():
        both = [task.model(batch(s))[:, 1:].softmax(1)[torch.from_numpy(s.voxel_of_point)] for s in (first, second)]
    expected = 1 + ((both[0] + both[1]) / 2).argmax(1)
    assert torch.equal(written["a"], expected)
    once = ConfusionMatrix(CLASSES)
    once.update(expected, first.point_labels)
    assert torch.equal(counts.frames[0], once.counts)


def test_what_a_vote_gives_to_the_ignored_class_does_not_weaken_it() -> None:
    # Of the classes that count, the first vote is sure of 1 and the second leans to 2; nearly all else it ignores.
    votes = torch.tensor([[8.0, 4.0, 0.0], [0.0, 0.0, 0.5]])

    class Answers(Segmenter):
        def forward(self, batch: ScanBatch) -> torch.Tensor:
            return votes

    one = ScanSample(
        token="a",
        coordinates=np.zeros((1, 3), np.int32),
        features=np.zeros((1, 1), np.float32),
        voxel_of_point=np.zeros(1, np.int64),
        voxel_labels=np.ones(1, np.int64),
        point_labels=np.ones(1, np.int64),
        distance=np.zeros(1, np.float32),
    )
    assert votes.softmax(1).mean(0)[1:].argmax() + 1 == 2  # with the ignored class in it the lean would win
    counts = count_scans(Answers(torch.nn.Linear(1, 1)), [batch(one, one)], {"a": 0}, 3)
    assert counts.frames[0].nonzero().tolist() == [[1, 1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_numbers_are_refused_with_their_sweep_and_nothing_is_written(value: float) -> None:
    class Answers(Segmenter):
        def forward(self, batch: ScanBatch) -> torch.Tensor:
            return torch.tensor([[0.0, value, 1.0]])

    one = ScanSample(
        token="a",
        coordinates=np.zeros((1, 3), np.int32),
        features=np.zeros((1, 1), np.float32),
        voxel_of_point=np.zeros(1, np.int64),
        voxel_labels=np.ones(1, np.int64),
        point_labels=np.ones(1, np.int64),
        distance=np.zeros(1, np.float32),
    )
    written: dict[str, object] = {}
    with pytest.raises(WeightsError, match=r"^scores of a: 1 of 3 are NaN or infinite; "):
        count_scans(Answers(torch.nn.Linear(1, 1)), [batch(one)], {"a": 0}, 3, written.__setitem__)
    assert not written
