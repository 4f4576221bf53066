from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidr.metrics import ConfusionMatrix, bootstrap_interval, superpixel_retrieval

seeds = st.integers(0, 2**31 - 1)


def labelled(seed: int, count: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and truth; the truth lacks the last class."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, classes, count), rng.integers(0, classes - 1, count)


def scored(predictions: np.ndarray, truth: np.ndarray, classes: int, ignore: int | None = 0) -> ConfusionMatrix:
    matrix = ConfusionMatrix(classes, ignore)
    matrix.update(predictions, truth)
    return matrix


def loop_iou(predictions: np.ndarray, truth: np.ndarray, classes: int, ignore: int | None) -> list[float]:
    counted = [(p, t) for p, t in zip(predictions.tolist(), truth.tolist(), strict=True) if t != ignore]
    iou = []
    for c in range(classes):
        both = sum(p == c and t == c for p, t in counted)
        either = sum(p == c or t == c for p, t in counted)
        iou.append(both / either if either > 0 and c != ignore else math.nan)
    return iou


def test_iou_is_the_originals_where_it_was_right(golden: Path) -> None:
    file = np.load(golden / "downstream.npz")
    matrix = scored(file["preds"], file["labels"], 17)
    np.testing.assert_allclose(matrix.iou()[1:], file["seed_iou"], atol=1e-7)
    assert matrix.miou() == pytest.approx(float(file["seed_miou"]), abs=1e-7)


def test_a_class_absent_from_both_scores_nothing_where_the_original_scored_one(golden: Path) -> None:
    file = np.load(golden / "downstream.npz")
    predictions, labels = file["preds"].copy(), file["labels"]
    assert labels.max() < 14  # classes 14 to 16 are only ever predicted
    predictions[predictions == 16] = 15
    matrix = scored(predictions, labels, 17)
    assert matrix.absent() == [16]
    assert matrix.iou()[16].isnan()
    per_class = matrix.iou()[1:16]
    assert matrix.miou() == pytest.approx(float(per_class.sum()) / 15)
    original = (float(per_class.sum()) + 1.0) / 16
    assert original > matrix.miou() + 0.05


@settings(deadline=None)
@given(seeds, st.integers(0, 60), st.integers(2, 6), st.sampled_from([0, 1, None]))
def test_scores_are_a_plain_loops(seed: int, count: int, classes: int, ignore: int | None) -> None:
    predictions, truth = labelled(seed, count, classes)
    matrix = scored(predictions, truth, classes, ignore)
    expected = np.array(loop_iou(predictions, truth, classes, ignore))
    np.testing.assert_allclose(matrix.iou(), expected)
    assert matrix.absent() == [c for c in range(classes) if np.isnan(expected[c]) and c != ignore]
    counted = truth != ignore if ignore is not None else np.ones(count, bool)
    if not counted.any():
        assert math.isnan(matrix.miou())
        assert math.isnan(matrix.accuracy())
        assert math.isnan(matrix.frequency_weighted_iou())
        return
    assert matrix.miou() == pytest.approx(np.nanmean(expected))
    assert matrix.accuracy() == pytest.approx((predictions == truth)[counted].mean())
    weighted = sum((truth[counted] == c).mean() * expected[c] for c in range(classes) if (truth[counted] == c).any())
    assert matrix.frequency_weighted_iou() == pytest.approx(weighted)


@settings(deadline=None, max_examples=30)
@given(seeds, st.lists(st.integers(0, 40), min_size=1, max_size=5))
def test_streaming_and_merging_equal_one_update(seed: int, sizes: list[int]) -> None:
    predictions, truth = labelled(seed, sum(sizes), 5)
    merged, streamed, start = ConfusionMatrix(5), ConfusionMatrix(5), 0
    for size in sizes:
        part = slice(start, start + size)
        merged.merge(scored(predictions[part], truth[part], 5))
        streamed.update(torch.from_numpy(predictions[part]), torch.from_numpy(truth[part]))
        start += size
    once = scored(predictions, truth, 5)
    assert torch.equal(once.counts, merged.counts)
    assert torch.equal(once.counts, streamed.counts)
    assert once.counts.dtype == torch.int64
    assert int(once.counts.sum()) == int((truth != 0).sum())


def test_the_ignored_class_is_masked_even_though_it_is_zero() -> None:
    truth = np.array([0, 0, 1, 1, 2])
    matrix = scored(np.array([1, 2, 1, 0, 2]), truth, 3)
    # Rows of class 0 count nowhere; the prediction 0 of a labelled row is a miss of its class.
    np.testing.assert_allclose(matrix.iou(), [math.nan, 1 / 2, 1])
    assert matrix.accuracy() == pytest.approx(2 / 3)


def test_frequency_weighted_iou_is_no_plain_mean() -> None:
    matrix = scored(np.array([1] * 9 + [1]), np.array([1] * 9 + [2]), 3)
    assert matrix.miou() == pytest.approx((0.9 + 0) / 2)
    assert matrix.frequency_weighted_iou() == pytest.approx(0.9 * 0.9)


def test_small_label_types_count_without_overflow() -> None:
    matrix = scored(np.full(1000, 200, np.uint8), np.full(1000, 200, np.uint8), 201)
    assert matrix.counts[200, 200] == 1000


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([1, 3], [1, 1], "predictions span 1 to 3, expected 0 to 2"),
        ([-1, 2], [1, 1], "predictions span -1 to 2"),
        ([1, 1], [1, 9], "labels span 1 to 9"),
        ([1], [1, 1], "1 predictions but 2 labels"),
        ([1.0, 1.0], [1, 1], "expected class indices"),
    ],
)
def test_updates_that_cannot_be_right_are_refused(predictions: list, labels: list, message: str) -> None:
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=message):
        matrix.update(np.array(predictions), np.array(labels))
    assert matrix.counts.sum() == 0


def test_matrices_of_different_classes_do_not_merge() -> None:
    with pytest.raises(ValueError, match="cannot merge 4 classes ignoring 0 into 3 classes"):
        ConfusionMatrix(3).merge(ConfusionMatrix(4))
    with pytest.raises(ValueError, match="ignoring None"):
        ConfusionMatrix(3).merge(ConfusionMatrix(3, None))
    with pytest.raises(ValueError, match="got 0 classes"):
        ConfusionMatrix(0)


# --- retrieval ---


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(0, 30))
def test_retrieval_is_a_plain_loops(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(count, 3, generator=generator) for _ in range(2))
    image = torch.randint(4, (count,), generator=generator)
    hits = 0
    for i in range(count):
        cosines = {
            j: float(student[i] @ teacher[j] / student[i].norm() / teacher[j].norm())
            for j in range(count)
            if image[j] == image[i]
        }
        hits += max(cosines, key=lambda j: cosines[j]) == i
    assert superpixel_retrieval(student, teacher, image) == (hits, count)


def test_a_student_that_copies_its_teacher_up_to_length_always_finds_itself() -> None:
    teacher = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.rand(50, 1, generator=torch.Generator().manual_seed(1)) + 0.1
    assert superpixel_retrieval(teacher * lengths, teacher, torch.arange(50) // 10) == (50, 50)


def test_a_collapsed_teacher_is_found_by_one_superpixel_of_each_image() -> None:
    ones = torch.ones(12, 4)
    assert superpixel_retrieval(ones, ones, torch.arange(12) // 4) == (3, 12)


# --- intervals ---


def frames(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 30, (count, 4, 4))


def test_a_bootstrap_interval_is_a_plain_loops() -> None:
    confusions = frames(0, 6)
    confusions[:, 0] = 0  # the ignored class has no truth
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(200):
        times = rng.multinomial(6, [1 / 6] * 6)
        matrix = ConfusionMatrix(4)
        for frame, repeat in zip(confusions, times, strict=True):
            matrix.counts += torch.from_numpy(frame) * int(repeat)
        scores.append(matrix.miou())
    expected = np.quantile(scores, [0.05, 0.95])
    np.testing.assert_allclose(bootstrap_interval(confusions, 3, level=0.9, draws=200), expected)


def test_an_interval_repeats_with_its_seed_and_holds_the_score() -> None:
    confusions = frames(1, 40)
    low, high = bootstrap_interval(confusions, seed=0)
    assert (low, high) == bootstrap_interval(confusions, seed=0)
    assert (low, high) != bootstrap_interval(confusions, seed=1)
    matrix = ConfusionMatrix(4)
    matrix.counts += torch.from_numpy(confusions.sum(0))
    assert low < matrix.miou() < high
    narrow_low, narrow_high = bootstrap_interval(confusions, seed=0, level=0.5)
    assert low < narrow_low < narrow_high < high


def test_more_frames_narrow_an_interval_and_one_frame_has_none() -> None:
    def width(count: int) -> float:
        low, high = bootstrap_interval(frames(2, count), seed=0)
        return high - low

    assert width(1) == 0
    assert 1.5 < width(50) / width(200) < 2.7  # about the root of 4


@pytest.mark.filterwarnings("error")
def test_frames_without_a_counted_point_leave_the_interval_to_the_others() -> None:
    empty = np.zeros((3, 4, 4), np.int64)
    assert all(math.isnan(bound) for bound in bootstrap_interval(empty, 0))
    empty[0, 1, 1:] = (8, 2, 0)
    assert bootstrap_interval(empty, 0) == (0.4, 0.4)  # IoU 0.8 and 0; class 3 is absent


@pytest.mark.parametrize(
    ("shape", "level", "message"),
    [((0, 3, 3), 0.95, "at least one frame"), ((3, 3), 0.95, "expected"), ((2, 3, 3), 95, "got level 95")],
)
def test_an_interval_needs_frames_and_a_level(shape: tuple[int, ...], level: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(np.ones(shape, np.int64), 0, level)
