"""Segmentation: what a step of fine-tuning computes, and the exact counts that its scores come from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slidr.config import Config, ConfigError
from slidr.data.labels import CLASSES
from slidr.losses import cross_entropy_lovasz
from slidr.metrics import ConfusionMatrix
from slidr.models.students import build_student, student_rows
from slidr.models.weights import LoadReport, WeightsError, load_student, voxel_expectation
from slidr.shapes import Float, Int64
from slidr.training import workers
from slidr.training.norms import NormLag
from slidr.types import ScanBatch
from slidr.urls import redacting_logger

HEAD = "final."  # the last layer's parameters, in every student
BANDS = (20.0, 40.0)  # m from the sensor: near, middle and far points are scored apart
BAND_NAMES = ("0-20 m", "20-40 m", "40+ m")
_log = redacting_logger(__name__)


class Segmenter(nn.Module):
    """A student that answers with one row of class scores a voxel.

    `frozen` leaves the last layer alone to train: everything else keeps its weights and, in eval mode whatever the
    module is told, its norms' statistics.
    """

    def __init__(self, student: nn.Module, frozen: bool = False) -> None:
        super().__init__()
        self.student = student
        self.frozen = frozen
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(not frozen or name.startswith(HEAD))
        self.train()

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if self.frozen:
            self.student.eval()  # the last layer is linear: it has no mode
        return self

    def forward(self, batch: ScanBatch) -> Float[Tensor, "V K"]:
        return student_rows(self.student, batch)


def build_segmenter(config: Config) -> tuple[Segmenter, LoadReport | None]:
    """The configured student with a new last layer of one output a class, and what was loaded from `student.weights`.

    What is not loaded is drawn from `run.seed`. Raises `ConfigError` for a config that cannot be fine-tuned and
    `WeightsError` for weights that do not fit.
    """
    require_segmentation(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        student = build_student(config.student, normalize=False, azimuth_cells=config.data.voxel.azimuth_cells)
    report = None
    if config.student.weights is not None:
        expect = voxel_expectation(config.data.voxel)
        report = load_student(student, config.student.weights, expect=expect, head="skip")
    return Segmenter(student, config.student.freeze), report


def require_segmentation(config: Config) -> None:
    """Raises `ConfigError` for a config that names no segmentation of its data set's classes."""
    dataset, student = config.data.dataset, config.student
    classes = len(CLASSES[dataset])
    if student.name == "voxelnet":
        raise ConfigError("student.name: voxelnet has no score per point; segment with a MinkUNet")
    if student.out_channels != classes:
        raise ConfigError(
            f"student.out_channels: got {student.out_channels}, {dataset} has {classes} classes (the ignored one "
            f"included); set student.out_channels: {classes}"
        )
    if config.loss.names != ("cross_entropy_lovasz",):
        raise ConfigError(
            f"loss.names: got {list(config.loss.names)}, segmentation learns from labels; "
            "set loss.names: [cross_entropy_lovasz]"
        )


def predict(scores: Float[Tensor, "M K"]) -> Int64[Tensor, " M"]:
    """The class of highest score in each row, never the ignored class 0."""
    return scores[:, 1:].argmax(1) + 1


class SegmentTask:
    """Fine-tuning or a linear probe, for the trainer skeleton."""

    kind = "finetune"
    objective = ("val_miou", 1)

    def __init__(self, config: Config) -> None:
        self.config = config
        self.segmenter, self.report = build_segmenter(config)
        self.classes = CLASSES[config.data.dataset]
        weights = config.loss.class_weights
        self.norm_lag: NormLag | None = None  # of the last student, once it was measured
        self._class_weights = None if weights is None else torch.tensor(weights)

    @property
    def model(self) -> Segmenter:
        return self.segmenter

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone (unless it is frozen) and the last layer, which has the rate `optim.head_lr` if given."""
        head: list[Tensor] = []
        backbone: list[Tensor] = []
        for name, parameter in self.model.student.named_parameters():
            (head if name.startswith(HEAD) else backbone).append(parameter)
        rate = {} if self.config.optim.head_lr is None else {"lr": self.config.optim.head_lr}
        groups: list[dict[str, Any]] = [{"params": head, **rate}]
        return groups if self.model.frozen else [{"params": backbone}, *groups]

    def loss(self, outputs: Any, batch: ScanBatch) -> tuple[Tensor, dict[str, float]]:
        weights = self._class_weights
        if weights is not None:
            weights = weights.to(outputs.device)
        return cross_entropy_lovasz(outputs, batch.voxel_labels, class_weights=weights), {}

    def evidence(self, batch: ScanBatch) -> int:
        """Voxels with a label that counts."""
        return int((batch.voxel_labels != 0).sum())

    def nothing_to_learn(self, frames: str) -> str:
        data = self.config.data
        return (
            f"no point of {data.train_split} has a label other than the ignored one (frames {frames}); do the labels "
            f"in {data.root} belong to {data.dataset}?"
        )

    @torch.no_grad()
    def validate(self, batches: Iterable[ScanBatch]) -> dict[str, float]:
        """Scores per point over the batches of all workers, and the mean loss of a batch."""
        device = next(self.model.parameters()).device
        self.model.eval()
        confusion = ConfusionMatrix(len(self.classes))
        sums = {"loss": 0.0, "batches": 0.0}
        for batch in batches:
            batch = batch.to(device)
            scores = self.model(batch)
            confusion.update(predict(scores).index_select(0, batch.voxel_of_point), batch.point_labels)
            sums["loss"] += float(self.loss(scores, batch)[0])
            sums["batches"] += 1
        confusion.counts = workers.sum_counts(confusion.counts, device)
        sums = workers.sum_over_workers(sums, device)
        if int(confusion.counts.sum()) == 0:
            raise ConfigError(
                f"data.val_split: no point of {self.config.data.val_split} has a label other than the ignored one"
            )
        iou = zip(self.classes, confusion.iou().tolist(), strict=True)
        return {
            "val_miou": confusion.miou(),
            "val_accuracy": confusion.accuracy(),
            "val_loss": sums["loss"] / max(sums["batches"], 1),
            **{f"val_iou_{name.replace(' ', '_')}": value for name, value in iou if value == value},  # absent: nan
        }

    def state(self) -> dict[str, Any]:
        """The student under the published names."""
        return {"student": self.model.student.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.student.load_state_dict(state["student"])


@dataclass
class ScanCounts:
    """Counts of (truth, prediction) for every frame, and for all frames in every band of distance."""

    frames: Int64[Tensor, "F K K"]
    bands: Int64[Tensor, "D K K"]

    def sum_over_workers(self, device: torch.device) -> ScanCounts:
        """The counts of all workers; each frame's come from the one that saw it."""
        return ScanCounts(workers.sum_counts(self.frames, device), workers.sum_counts(self.bands, device))


@torch.no_grad()
def count_scans(
    model: Segmenter,
    batches: Iterable[ScanBatch],
    row_of_token: dict[str, int],
    classes: int,
    write: Callable[[str, Int64[Tensor, " N"]], None] | None = None,
) -> ScanCounts:
    """This worker's counts over its batches, per point and without the points of the ignored class.

    A sweep may be several neighbouring scans of a batch (see `ScanSource.votes`): then each point takes the class of
    highest mean probability over them. The probabilities are those among the classes that count: no loss teaches what
    to give to the ignored one, so it must not weaken a vote. `row_of_token` says which row a frame has. `write` is
    called with each frame's token and the classes of its points.
    """
    device = next(model.parameters()).device
    model.eval()
    counts = ScanCounts(
        torch.zeros(len(row_of_token), classes, classes, dtype=torch.int64),
        torch.zeros(len(BAND_NAMES), classes, classes, dtype=torch.int64),
    )
    for batch in batches:
        batch = batch.to(device)
        scores = model(batch).float()
        if not bool(torch.isfinite(scores).all()):
            raise WeightsError(
                f"scores of {', '.join(sorted(set(batch.tokens))[:3])}: {int((~torch.isfinite(scores)).sum())} of "
                f"{scores.numel()} are NaN or infinite; the checkpoint's weights do not fit these sweeps: take another"
            )
        probabilities = scores[:, 1:].softmax(1).index_select(0, batch.voxel_of_point)
        for token, rows in _sweeps(batch):
            mean = torch.stack([probabilities[first:last] for first, last in rows]).mean(0)
            predicted = mean.argmax(1) + 1
            first, last = rows[0]
            labels, distance = batch.point_labels[first:last], batch.distance[first:last]
            if write is not None:
                write(token, predicted.cpu())
            counts.frames[row_of_token[token]] += _counts(predicted, labels, classes)
            band_of_point = torch.bucketize(distance, torch.tensor(BANDS, device=device), right=True)
            for band in range(len(BAND_NAMES)):
                inside = band_of_point == band
                counts.bands[band] += _counts(predicted[inside], labels[inside], classes)
    return counts


def _sweeps(batch: ScanBatch) -> list[tuple[str, list[tuple[int, int]]]]:
    """The batch's distinct sweeps: each one's token, and the ranges of point rows of its votes."""
    rows: dict[str, list[tuple[int, int]]] = {}
    first = 0
    for token, points in zip(batch.tokens, batch.points_per_scan, strict=True):
        rows.setdefault(token, []).append((first, first + points))
        first += points
    return list(rows.items())


def _counts(predictions: Tensor, labels: Tensor, classes: int) -> Int64[Tensor, "K K"]:
    confusion = ConfusionMatrix(classes)
    confusion.update(predictions, labels)
    return confusion.counts
