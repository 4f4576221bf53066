"""Distillation: what a step of image-to-lidar pretraining computes, and the scores that need no labels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slidr.config import Config, ConfigError, LossConfig
from slidr.losses import ImageFeatures, point_pixel_info_nce, superpixel_info_nce, superpixel_means
from slidr.metrics import superpixel_retrieval
from slidr.models.students import build_student, student_rows
from slidr.models.teachers import Teacher, build_teacher
from slidr.models.weights import load_student, voxel_expectation
from slidr.ops.upsampled import UpsampledMap
from slidr.shapes import Float
from slidr.training import workers
from slidr.types import PairBatch


class Distiller(nn.Module):
    """Student and teacher side by side, answering with the features that a loss compares."""

    student: nn.Module
    teacher: Teacher

    def __init__(self, student: nn.Module, teacher: Teacher) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher

    def forward(self, batch: PairBatch) -> tuple[Float[Tensor, "R C"], UpsampledMap]:
        """(student rows, teacher feature maps), both of unit length over channels."""
        return student_rows(self.student, batch), self.teacher.coarse(batch.images)


def build_distiller(config: Config) -> Distiller:
    """Student and teacher as configured; what is not loaded from weights comes from `run.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        student = build_student(config.student, azimuth_cells=config.data.voxel.azimuth_cells)
        teacher = build_teacher(
            config.teacher.name,
            out_channels=config.student.out_channels,
            weights=config.teacher.weights,
            sha256=config.teacher.sha256,
        )
    if config.student.weights is not None:
        load_student(student, config.student.weights, expect=voxel_expectation(config.data.voxel))
    return Distiller(student, teacher)


def distill_loss(
    outputs: tuple[Float[Tensor, "R C"], ImageFeatures], batch: PairBatch, config: LossConfig
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The mean of the configured losses of one batch, and each by its name where there are several."""
    rows, maps = outputs
    gather = workers.gather_rows if config.gather_negatives else None
    losses: dict[str, Tensor] = {}
    for name in config.names:
        if name == "superpixel_info_nce":
            losses[name] = superpixel_info_nce(
                rows,
                maps,
                batch.superpixels,
                batch.point_index,
                batch.pixel_index,
                temperature=config.temperature,
                min_points=config.min_points,
                gather=gather,
            )
        else:
            losses[name] = point_pixel_info_nce(
                rows,
                maps,
                batch.point_index,
                batch.pixel_index,
                temperature=config.temperature,
                pairs=config.pairs,
                gather=gather,
            )
    loss = torch.stack(list(losses.values())).mean()
    extra = {name: float(value.detach()) for name, value in losses.items()} if len(losses) > 1 else {}
    return loss, extra


def evidence_of(batch: PairBatch, config: LossConfig) -> int:
    """How many rows of a batch the loss contrasts: superpixels with enough points, or pairs.

    A single row has no negatives, unless other workers' rows are negatives, too: it counts as 0.
    """
    rows = len(batch.point_index)
    if config.names == ("superpixel_info_nce",):
        image, row, column = batch.pixel_index.unbind(1)
        segments = int(batch.superpixels.max()) + 1 if rows else 1
        counts = torch.bincount(batch.superpixels[image, row, column] + image * segments)
        rows = int((counts >= config.min_points).sum())
    return rows if rows > 1 or config.gather_negatives else 0


def no_pairs(frames: str) -> str:
    """The error for batches in which no camera sees enough points."""
    return (
        f"no camera sees points that make pairs (frames {frames}), so there is nothing to learn from. Are the poses "
        f"and intrinsics in the frame table metres, pixels and camera_from_lidar, z forward? Look at data.min_depth, "
        f"data.cameras and loss.min_points, too; slidr doctor CONFIG counts the points that each camera sees"
    )


class DistillTask:
    """Image-to-lidar distillation, for the trainer skeleton."""

    kind = "pretrain"
    objective = ("val_loss", -1)

    def __init__(self, config: Config) -> None:
        if "cross_entropy_lovasz" in config.loss.names:
            raise ConfigError("loss.names: cross_entropy_lovasz needs labels; use it with `slidr finetune`")
        self.config = config
        self.distiller = build_distiller(config)

    @property
    def model(self) -> Distiller:
        return self.distiller

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.model.parameters() if p.requires_grad]}]

    def loss(self, outputs: Any, batch: PairBatch) -> tuple[Tensor, dict[str, float]]:
        return distill_loss(outputs, batch, self.config.loss)

    def evidence(self, batch: PairBatch) -> int:
        return evidence_of(batch, self.config.loss)

    def nothing_to_learn(self, frames: str) -> str:
        return no_pairs(frames)

    def validate(self, batches: Iterable[PairBatch]) -> dict[str, float]:
        """Validation loss (mean over batches) and superpixel retrieval, over the batches of all workers."""
        device = next(self.model.parameters()).device
        return evaluate_distiller(self.model, batches, self.config.loss, device)

    def state(self) -> dict[str, Any]:
        """The student under the published names, and the teacher's trained head."""
        return {"student": self.model.student.state_dict(), "head": self.model.teacher.head.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.student.load_state_dict(state["student"])
        self.model.teacher.head.load_state_dict(state["head"])


@torch.no_grad()
def evaluate_distiller(
    model: Distiller, batches: Iterable[PairBatch], config: LossConfig, device: torch.device
) -> dict[str, float]:
    """Loss and superpixel retrieval of held-out batches, merged over the workers.

    Retrieval is the share of superpixels whose student mean is nearer (cosine) to its own teacher mean than to
    that of any other superpixel of its image. Negatives stay within a batch, whatever the number of workers. Batches
    without anything to contrast are left out of the loss. Raises `ConfigError`, on every worker, where all are so: a
    loss of 0 would be the best.
    """
    model.eval()
    sums = {"loss": 0.0, "batches": 0.0, "hits": 0.0, "superpixels": 0.0}
    tokens: list[str] = []
    alone = LossConfig(**{**vars(config), "gather_negatives": False})
    for batch in batches:
        batch = batch.to(device)
        torch.manual_seed(0)  # the pairs a point-pixel loss draws
        outputs = model(batch)
        loss, _ = distill_loss(outputs, batch, alone)
        rows, maps = outputs
        means = superpixel_means(rows, maps, batch.superpixels, batch.point_index, batch.pixel_index, config.min_points)
        hits, total = superpixel_retrieval(means.student_means, means.teacher_means, means.image_of_superpixel)
        counts = evidence_of(batch, alone) > 0
        for name, value in zip(sums, (float(loss) * counts, counts, hits, total), strict=True):
            sums[name] += value
        tokens += batch.tokens
    sums = workers.sum_over_workers(sums, device)
    if sums["batches"] == 0:
        raise ConfigError(f"data.val_split: {no_pairs(', '.join(tokens[:4]) or 'of other workers')}")
    return {
        "val_loss": sums["loss"] / sums["batches"],
        "val_retrieval": sums["hits"] / max(sums["superpixels"], 1),
    }
