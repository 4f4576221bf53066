from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from slidr.losses import (
    Gather,
    cross_entropy_lovasz,
    info_nce,
    lovasz_softmax,
    point_pixel_info_nce,
    superpixel_info_nce,
    superpixel_means,
)

seeds = st.integers(0, 2**31 - 1)
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the first five arguments of superpixel_info_nce


def batch(seed: int, pairs: int, images: int = 2, ids: int = 5) -> Batch:
    """A small float64 batch; about one superpixel in five has no pixel, more have no pair."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    maps = torch.randn(images, 4, 3, 6, generator=generator, dtype=torch.float64)
    superpixels = torch.randint(ids, (images, 3, 6), generator=generator)
    point_index = torch.randint(20, (pairs,), generator=generator)
    pixel_index = torch.stack([torch.randint(n, (pairs,), generator=generator) for n in (images, 3, 6)], dim=1)
    return points, maps, superpixels, point_index, pixel_index


def loop_means(case: Batch, min_points: int) -> list[tuple[Tensor, Tensor, int, int]]:
    """(student mean, teacher mean, image, pairs) of every kept superpixel."""
    points, maps, superpixels, point_index, pixel_index = case
    kept = []
    for image in range(len(superpixels)):
        for label in range(int(superpixels.max()) + 1):
            paired = [
                points[n]
                for n, (i, row, column) in zip(point_index.tolist(), pixel_index.tolist(), strict=True)
                if i == image and superpixels[i, row, column] == label
            ]
            pixels = [
                maps[image, :, row, column]
                for row in range(superpixels.shape[1])
                for column in range(superpixels.shape[2])
                if superpixels[image, row, column] == label
            ]
            if len(paired) >= min_points:
                student, teacher = torch.stack(paired).mean(0), torch.stack(pixels).mean(0)
                kept.append((student, teacher, image, len(paired)))
    return kept


def loop_info_nce(rows: list[tuple[Tensor, Tensor]], temperature: float) -> float:
    total = 0.0
    for index, (student, _) in enumerate(rows):
        logits = [math.exp(float(student @ teacher) / temperature) for _, teacher in rows]
        total -= math.log(logits[index] / sum(logits))
    return total / len(rows)


# --- contrast ---


@pytest.mark.parametrize("name", ["superpixel", "ppkt"])
def test_contrastive_losses_and_gradients_are_the_originals(golden: Path, name: str) -> None:
    file = np.load(golden / "losses.npz")
    points = torch.from_numpy(file["points"]).requires_grad_()
    images = torch.from_numpy(file["images"]).requires_grad_()
    pairs = torch.from_numpy(file["pairing_points"]), torch.from_numpy(file["pairing_images"])
    if name == "superpixel":
        loss = superpixel_info_nce(points, images, torch.from_numpy(file["superpixels"]).long(), *pairs)
        expected = float(file["superpixel_loss"])
    else:
        loss = point_pixel_info_nce(points, images, *pairs)
        expected = float(file["ppkt_loss_all_pairs"])
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for leaf, of in ((points, "points"), (images, "images")):
        target = torch.from_numpy(file[f"{name}_grad_{of}"])
        assert leaf.grad is not None
        assert (leaf.grad - target).norm() < 1e-5 * target.norm()


@settings(deadline=None, max_examples=30)
@given(seeds, st.integers(1, 30), st.integers(1, 3))
def test_superpixel_loss_is_a_plain_loops(seed: int, pairs: int, min_points: int) -> None:
    case = batch(seed, pairs)
    expected = loop_means(case, min_points)
    means = superpixel_means(*case, min_points=min_points)
    assert means.counts.tolist() == [count for *_, count in expected]
    assert means.image_of_superpixel.tolist() == [image for _, _, image, _ in expected]
    for student, teacher, row in zip(means.student_means, means.teacher_means, expected, strict=True):
        torch.testing.assert_close(student, row[0])
        torch.testing.assert_close(teacher, row[1])
    if expected:
        loss = superpixel_info_nce(*case, temperature=0.3, min_points=min_points)
        assert loss.item() == pytest.approx(loop_info_nce([row[:2] for row in expected], 0.3))


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(1, 20))
def test_point_pixel_loss_is_a_plain_loops(seed: int, pairs: int) -> None:
    points, maps, _, point_index, pixel_index = batch(seed, pairs)
    rows = [
        (points[n], maps[image, :, row, column])
        for n, (image, row, column) in zip(point_index.tolist(), pixel_index.tolist(), strict=True)
    ]
    loss = point_pixel_info_nce(points, maps, point_index, pixel_index, temperature=0.5)
    assert loss.item() == pytest.approx(loop_info_nce(rows, 0.5))


def test_the_order_of_pairs_and_images_does_not_matter() -> None:
    points, maps, superpixels, point_index, pixel_index = batch(3, 25)
    loss = superpixel_info_nce(points, maps, superpixels, point_index, pixel_index)
    order = torch.randperm(25)
    shuffled = pixel_index[order].clone()
    shuffled[:, 0] = 1 - shuffled[:, 0]
    again = superpixel_info_nce(points, maps.flip(0), superpixels.flip(0), point_index[order], shuffled)
    torch.testing.assert_close(again, loss)


def test_random_pairs_are_distinct_and_repeat_with_their_generator() -> None:
    # Orthogonal one-hot features: the loss of P distinct pairs at temperature 1 is log(e + P - 1) - 1.
    points, maps = torch.eye(30), torch.eye(30).T.reshape(1, 30, 5, 6)
    index = torch.arange(30)
    pixel = torch.stack([torch.zeros_like(index), index // 6, index % 6], dim=1)

    def loss(seed: int, pairs: int | None, scale: Tensor | float = 1.0) -> float:
        generator = torch.Generator().manual_seed(seed)
        return point_pixel_info_nce(points * scale, maps, index, pixel, 1.0, pairs, generator).item()

    for pairs in (1, 7, 29):
        assert loss(0, pairs) == pytest.approx(math.log(math.e + pairs - 1) - 1, abs=1e-6)
    for enough in (30, 4096, None):
        assert loss(0, enough) == pytest.approx(math.log(math.e + 29) - 1, abs=1e-6)
    uneven = torch.linspace(0, 1, 30)[:, None]
    assert loss(1, 7, uneven) == loss(1, 7, uneven)
    assert len({loss(seed, 7, uneven) for seed in range(8)}) > 1


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("name", ["superpixel", "point-pixel", "too few points"])
def test_no_pair_and_one_pair_lose_nothing_and_stay_connected(name: str, pairs: int) -> None:
    points, maps, superpixels, point_index, pixel_index = batch(0, pairs)
    points.requires_grad_()
    maps.requires_grad_()
    if name == "point-pixel":
        loss = point_pixel_info_nce(points, maps, point_index, pixel_index, pairs=4096)
    else:
        least = 2 if name == "too few points" else 1
        loss = superpixel_info_nce(points, maps, superpixels, point_index, pixel_index, min_points=least)
    assert loss.item() == pytest.approx(0, abs=1e-9)
    loss.backward()
    for leaf in (points, maps):
        assert leaf.grad is not None
        assert leaf.grad.abs().max() < 1e-9


def test_a_superpixel_whose_features_cancel_is_kept() -> None:
    # Two opposite points: the student's mean is 0, but there are two of them.
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    superpixels = torch.tensor([[[0, 0, 1]]])
    pixel = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 2]])
    means = superpixel_means(points, torch.ones(1, 2, 1, 3), superpixels, torch.arange(3), pixel)
    assert means.student_means.tolist() == [[0, 0], [0, 1]]
    assert means.counts.tolist() == [2, 1]


def test_half_precision_does_not_reach_the_logits() -> None:
    student, teacher = (F.normalize(torch.randn(40, 64), dim=1) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(student, teacher)
    assert loss.item() == pytest.approx(info_nce(student, teacher).item(), rel=1e-6)


# --- negatives of all workers ---


def workers_gather(teachers: list[Tensor], rank: int, calls: list[tuple[int, ...]]) -> Gather:
    """What an all-gather with gradients answers on worker `rank`."""

    def gather(rows: Tensor) -> tuple[Tensor, int]:
        calls.append(tuple(rows.shape))
        if rows.shape == (1, 1):
            return rows.new_ones(len(teachers), 1), rank
        assert rows is teachers[rank]
        return torch.cat(teachers), sum(len(teacher) for teacher in teachers[:rank])

    return gather


def over_workers(sizes: list[int], students: Tensor, teachers: Tensor) -> tuple[Tensor, list]:
    """The mean over workers of their losses, rows split by `sizes`, and what each worker gathered."""
    parts = list(teachers.split(sizes))
    calls: list[list[tuple[int, ...]]] = [[] for _ in sizes]
    losses = [
        info_nce(student, parts[rank], 0.2, workers_gather(parts, rank, calls[rank]))
        for rank, student in enumerate(students.split(sizes))
    ]
    return torch.stack(losses).mean(), calls


@pytest.mark.parametrize("sizes", [[12], [6, 6], [3, 9], [0, 12], [5, 0, 7], [11, 1]])
def test_workers_that_share_negatives_lose_what_one_process_loses(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(12, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    results = []
    for loss_of in (lambda s, t: info_nce(s, t, 0.2), lambda s, t: over_workers(sizes, s, t)[0]):
        leaves = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
        loss = loss_of(*leaves)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    for alone, together in zip(*results, strict=True):
        torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("sizes", [[0, 4], [0, 0]])
def test_a_worker_without_superpixels_enters_every_collective(sizes: list[int]) -> None:
    student = torch.randn(sum(sizes), 5, requires_grad=True)
    teacher = torch.randn(sum(sizes), 5, requires_grad=True)
    loss, calls = over_workers(sizes, student, teacher)
    assert len({len(entered) for entered in calls}) == 1
    parts = list(teacher.split(sizes))
    alone = info_nce(student[:0], parts[0], 0.2, workers_gather(parts, 0, []))
    assert alone.item() == 0
    (gradient,) = torch.autograd.grad(alone, teacher)  # reaches the gathered rows: backward enters, too
    assert gradient.abs().sum() == 0
    loss.backward()


# --- segmentation ---


def loop_lovasz(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The Lovasz extension by its definition: errors, from large to small, times what each adds to 1 - IoU."""
    losses = []
    for c in np.unique(labels):
        truth = labels == c
        errors = np.abs(truth - probabilities[:, c])
        wrong = np.zeros(len(labels), bool)
        loss, before = 0.0, 0.0
        for index in np.argsort(-errors, kind="stable"):
            wrong[index] = True
            predicted = truth ^ wrong
            after = 1 - (truth & predicted).sum() / (truth | predicted).sum()
            loss += errors[index] * (after - before)
            before = after
        losses.append(loss)
    return float(np.mean(losses))


def test_segmentation_loss_and_gradient_are_the_originals(golden: Path) -> None:
    file = np.load(golden / "downstream.npz")
    logits = torch.from_numpy(file["logits"]).requires_grad_()
    loss = cross_entropy_lovasz(logits, torch.from_numpy(file["labels"]))
    loss.backward()
    assert loss.item() == pytest.approx(float(file["ce_plus_lovasz"]), rel=1e-6)
    target = torch.from_numpy(file["grad"])
    assert logits.grad is not None
    assert (logits.grad - target).norm() < 1e-6 * target.norm()


@settings(deadline=None, max_examples=50)
@given(seeds, st.integers(1, 30), st.integers(2, 6))
def test_lovasz_is_a_plain_loops(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(count, classes, generator=generator, dtype=torch.float64).softmax(1)
    labels = torch.randint(classes, (count,), generator=generator)
    expected = loop_lovasz(probabilities.numpy(), labels.numpy())
    assert lovasz_softmax(probabilities, labels).item() == pytest.approx(expected)


def test_lovasz_of_hard_predictions_is_one_minus_mean_iou() -> None:
    generator = torch.Generator().manual_seed(0)
    labels, predictions = (torch.randint(4, (200,), generator=generator) for _ in range(2))
    iou = [((labels == c) & (predictions == c)).sum() / ((labels == c) | (predictions == c)).sum() for c in range(4)]
    loss = lovasz_softmax(F.one_hot(predictions, 4).double(), labels)
    assert loss.item() == pytest.approx(1 - float(torch.stack(iou).mean()), abs=1e-6)
    assert lovasz_softmax(F.one_hot(labels, 4).double(), labels).item() == 0


@settings(deadline=None, max_examples=20)
@given(seeds)
def test_ignored_rows_change_neither_loss_nor_gradient(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(5, (40,), generator=generator)
    kept = labels != 3
    loss = cross_entropy_lovasz(logits, labels, ignore_index=3)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[~kept].abs().sum() == 0
    torch.testing.assert_close(cross_entropy_lovasz(logits[kept], labels[kept], ignore_index=-1), loss)


def test_class_weights_weigh_the_cross_entropy_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4, generator=generator)
    labels = torch.randint(1, 4, (50,), generator=generator)
    weights = torch.tensor([9.0, 1.0, 2.0, 0.5])
    nll = -logits.log_softmax(1)[torch.arange(50), labels]
    expected = (nll * weights[labels]).sum() / weights[labels].sum()
    expected = expected + lovasz_softmax(logits.softmax(1), labels)
    torch.testing.assert_close(cross_entropy_lovasz(logits, labels, class_weights=weights), expected)


def test_labels_that_weigh_nothing_leave_the_lovasz_loss_alone() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2, 1, 0, 2, 1])
    loss = cross_entropy_lovasz(logits, labels, class_weights=torch.tensor([1.0, 0.0, 0.0, 1.0]))
    lovasz = lovasz_softmax(logits[labels > 0].softmax(1), labels[labels > 0])
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(loss, lovasz)
    torch.testing.assert_close(gradient, torch.autograd.grad(lovasz, logits)[0])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("count", [0, 6])
def test_without_a_label_the_segmentation_loss_is_a_connected_zero(count: int) -> None:
    logits = torch.randn(count, 4, requires_grad=True)
    loss = cross_entropy_lovasz(logits, torch.zeros(count, dtype=torch.int64))
    assert loss.item() == 0
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("loss", [lambda p, y: lovasz_softmax(p.softmax(1), y), cross_entropy_lovasz])
def test_segmentation_gradients_are_the_numerical_ones(loss: Callable) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(1, 4, (9,), generator=generator)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits)
