"""Scores: a streaming confusion matrix, superpixel retrieval, and intervals over frames."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor

from slidr.shapes import Float, Float64, Int64, Real

Labels = Tensor | np.ndarray

# The fewest frames that make an interval. A percentile bootstrap is too narrow for few: of 95 % intervals over frames
# drawn alike, 0 % hold the score with one frame, 50 % with two, 83 % with five, 90 % with ten, 92 % with twenty.
LEAST_FRAMES = 10


class ConfusionMatrix:
    """Counts of (truth, prediction) over any number of updates; rows whose truth is `ignore_index` never count.

    ``counts[t, p]`` is int64 on the CPU, so it sums and merges exactly. `classes` counts the ignored one,
    too; None ignores nothing. A point predicted as the ignored class is a miss for its true class.
    """

    def __init__(self, classes: int, ignore_index: int | None = 0) -> None:
        if classes < 1:
            raise ValueError(f"ConfusionMatrix: got {classes} classes, expected at least 1")
        self.classes = classes
        self.ignore_index = ignore_index
        self.counts: Int64[Tensor, "K K"] = torch.zeros(classes, classes, dtype=torch.int64)

    def update(self, predictions: Labels, labels: Labels) -> None:
        """Adds a batch of class indices. Raises `ValueError` for unequal lengths and classes out of range."""
        prediction, truth = (torch.as_tensor(x).reshape(-1) for x in (predictions, labels))
        if prediction.is_floating_point() or truth.is_floating_point():
            raise ValueError(
                f"ConfusionMatrix: got {prediction.dtype} predictions and {truth.dtype} labels, "
                "expected class indices; pass logits.argmax(1)"
            )
        prediction, truth = prediction.to(torch.int64), truth.to(prediction.device, torch.int64)
        if len(prediction) != len(truth):
            raise ValueError(f"ConfusionMatrix: {len(prediction)} predictions but {len(truth)} labels")
        if self.ignore_index is not None:
            counted = truth != self.ignore_index
            prediction, truth = prediction[counted], truth[counted]
        for name, values in (("predictions", prediction), ("labels", truth)):
            if len(values) > 0 and not (int(values.min()) >= 0 and int(values.max()) < self.classes):
                raise ValueError(
                    f"ConfusionMatrix: {name} span {int(values.min())} to {int(values.max())}, "
                    f"expected 0 to {self.classes - 1}; check the label map or the number of classes"
                )
        pair = truth * self.classes + prediction
        self.counts += torch.bincount(pair, minlength=self.classes**2).reshape(self.classes, self.classes).cpu()

    def merge(self, other: ConfusionMatrix) -> Self:
        """Adds another matrix's counts; returns itself."""
        if (self.classes, self.ignore_index) != (other.classes, other.ignore_index):
            raise ValueError(
                f"ConfusionMatrix: cannot merge {other.classes} classes ignoring {other.ignore_index} into "
                f"{self.classes} classes ignoring {self.ignore_index}"
            )
        self.counts += other.counts
        return self

    def iou(self) -> Float64[Tensor, " K"]:
        """Per class, intersection over union in [0, 1]; nan where neither truth nor prediction has the class.

        The ignored class is nan as well.
        """
        return torch.from_numpy(_iou(self.counts.numpy(), self.ignore_index))

    def miou(self) -> float:
        """Mean IoU over the classes that truth or prediction has; nan when there is none."""
        iou = self.iou()
        return float(iou.nanmean())

    def accuracy(self) -> float:
        """Share of counted points whose prediction is right; nan when there is none."""
        total = int(self.counts.sum())
        return int(self.counts.diagonal().sum()) / total if total > 0 else float("nan")

    def frequency_weighted_iou(self) -> float:
        """Sum over classes of their share of true labels times their IoU; nan when nothing was counted."""
        total = int(self.counts.sum())
        if total == 0:
            return float("nan")
        share = self.counts.sum(1).double() / total
        return float((share * self.iou().nan_to_num()).sum())

    def absent(self) -> list[int]:
        """The classes in neither truth nor prediction, which the mean leaves out; not the ignored one."""
        missing = torch.nonzero(self.iou().isnan()).squeeze(1).tolist()
        return [index for index in missing if index != self.ignore_index]


def _iou(counts: Real[np.ndarray, "*F K K"], ignore_index: int | None) -> Float64[np.ndarray, "*F K"]:
    hits = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    union = counts.sum(-1) + counts.sum(-2) - hits
    iou = np.divide(hits, union, out=np.full_like(hits, np.nan), where=union > 0)
    if ignore_index is not None and 0 <= ignore_index < iou.shape[-1]:
        iou[..., ignore_index] = np.nan
    return iou


def superpixel_retrieval(
    student_means: Float[Tensor, "M C"],
    teacher_means: Float[Tensor, "M C"],
    image_of_superpixel: Int64[Tensor, " M"],
) -> tuple[int, int]:
    """How many superpixels find themselves, and how many there are.

    A superpixel is a hit when, among the teacher means of its image, the one of highest cosine with its
    student mean is its own (the first of equals). A lone superpixel of an image is a hit.
    """
    student = torch.nn.functional.normalize(student_means.float(), dim=1)
    teacher = torch.nn.functional.normalize(teacher_means.float(), dim=1)
    hits = 0
    for image in image_of_superpixel.unique():
        own = torch.nonzero(image_of_superpixel == image).squeeze(1)
        found = (student[own] @ teacher[own].T).argmax(1)
        hits += int((found == torch.arange(len(own), device=found.device)).sum())
    return hits, len(image_of_superpixel)


def bootstrap_interval(
    per_frame_confusions: Int64[np.ndarray, "F K K"],
    seed: int,
    level: float = 0.95,
    draws: int = 1000,
    ignore_index: int | None = 0,
) -> tuple[float, float]:
    """A percentile bootstrap interval of mIoU, in which frames are drawn with replacement and their counts summed.

    (nan, nan) where no point counts.

    Raises `ValueError` without frames or for a level outside (0, 1).
    """
    counts = np.asarray(per_frame_confusions)
    if counts.ndim != 3 or counts.shape[1] != counts.shape[2] or len(counts) == 0:
        raise ValueError(f"bootstrap_interval: got shape {counts.shape}, expected (F, K, K) with at least one frame")
    if not 0 < level < 1:
        raise ValueError(f"bootstrap_interval: got level {level}, expected 0 < level < 1, such as 0.95")
    frames = len(counts)
    times = np.random.default_rng(seed).multinomial(frames, np.full(frames, 1 / frames), size=draws)
    resampled = np.tensordot(times.astype(np.float64), counts.astype(np.float64), axes=1)  # exact below 2^53
    iou = _iou(resampled, ignore_index)
    iou = iou[~np.isnan(iou).all(1)]  # a draw may hold no counted point
    if len(iou) == 0:
        return float("nan"), float("nan")
    low, high = np.quantile(np.nanmean(iou, axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
