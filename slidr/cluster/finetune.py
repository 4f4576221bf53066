"""Fine-tuning and linear probing as a stage: labelled sweeps, scored per point."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from slidr.cluster.loading import RayLoader
from slidr.cluster.train import train
from slidr.config import Config, public_dict
from slidr.data import storage
from slidr.data.loading import LocalLoader, ScanSource, require_labels, subset_frames
from slidr.data.splits import published_fraction
from slidr.models.export import export_slidr
from slidr.training import norms
from slidr.training.checkpoint import CheckpointError, write_weights
from slidr.training.loop import Outcome
from slidr.training.runs import RunFolder
from slidr.training.schema import weights_misfit
from slidr.training.segment import SegmentTask, require_segmentation
from slidr.urls import redacting_logger

_log = redacting_logger(__name__)


def finetune(config: Config, progress: bool = True) -> dict[str, Any]:
    """Fine-tunes a student as configured; returns its final scores. See `slidr.cluster.train.train`.

    Raises `DataError` where a frame to train or validate on has no labels.
    """
    require_segmentation(config)
    require_labels(config)
    return train(config, FinetuneStage(), progress)


class FinetuneStage:
    """Segmentation with point labels: every layer, or with `student.freeze` the last one."""

    name = "finetune"

    def source(self, config: Config) -> ScanSource:
        return ScanSource(config)

    def begin(self, config: Config, folder: RunFolder) -> None:
        """Writes what is labelled."""
        names, _ = labelled_part(config)
        storage.write_bytes_atomic(folder.file("labelled.txt"), ("\n".join(names) + "\n").encode())

    def task(self, config: Config) -> SegmentTask:
        return SegmentTask(config)

    def scores(
        self, task: SegmentTask, config: Config, loader: RayLoader | LocalLoader, device: torch.device
    ) -> dict[str, float]:
        """How far batch norm's statistics lag; the validation again where they are taken again."""
        batches = config.evaluation.reestimate_norms
        if task.model.frozen:  # its norms keep the statistics that they came with, and the last layer learned on them
            return {}
        task.norm_lag = norms.lag(task.model, norms.some_batches(loader, norms.LOOKED_AT, config.optim), device)
        if batches == 0:
            return {}
        norms.reestimate(task.model, norms.some_batches(loader, batches, config.optim), device)
        return task.validate(loader.validation())

    def prepare(self, task: SegmentTask, config: Config, loader: RayLoader | LocalLoader, device: torch.device) -> None:
        """Nothing."""

    def enough(self, epoch: int, metrics: dict[str, float]) -> bool:
        return False

    def keep(self, task: SegmentTask, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
        """Writes the last and the best student in SLidR's published layout; warns where batch norm lags."""
        kept = keep_last(task, config, folder, outcome)
        best = _best(task, folder)
        if best is not None:
            kept["best_student"] = folder.file("student_best.pt")
            write_weights(kept["best_student"], export_slidr(best["student"], None, best["epoch"], public_dict(config)))
            kept |= {"best_val_miou": best["metrics"]["val_miou"], "best_epoch": best["epoch"]}
        return kept

    def draw(self, task: SegmentTask, config: Config, folder: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
        return {}


def _best(task: SegmentTask, folder: RunFolder) -> dict[str, Any] | None:
    """The best checkpoint; a damaged one is left out with a warning: it must not cost the run its other results."""
    parts, (objective, _) = task.state(), task.objective

    def misfit(state: dict[str, Any]) -> str | None:
        lacks = None if objective in state["metrics"] else f"metrics: lacks {objective}"
        return lacks or weights_misfit(state, parts)

    try:
        return folder.checkpoints.best(misfit)
    except (CheckpointError, storage.DataError) as error:
        _log.warning("%s; the best student is not kept, the last one is", error)
        return None


def keep_last(task: SegmentTask, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
    """Writes the last student in SLidR's published layout; returns entries of `result.json`.

    Warns where its batch norm's statistics lag behind its weights and were not taken again.
    """
    path = folder.file("student.pt")
    found, again = task.norm_lag, config.evaluation.reestimate_norms
    if found is not None and found.worst > norms.WARN_ABOVE and again == 0:
        _log.warning("%s", norms.advice(found, config.student.bn_momentum, path))
    write_weights(path, export_slidr(task.state()["student"], None, outcome.epoch, public_dict(config)))
    names, published = labelled_part(config)
    return {
        "student": path,
        "weights": str(task.report) if task.report else "random",
        "labelled": len(names),
        "labelled_as_published": published,
        "norm_lag": None if found is None else asdict(found),
        "reestimated_norms": 0 if task.model.frozen else again,
    }


def labelled_part(config: Config) -> tuple[list[str], bool]:
    """The scenes (SemanticKITTI: scans) that training takes labels from, and whether they are a published list."""
    frames, data = subset_frames(config, "train"), config.data
    names = sorted(frames.tokens) if data.dataset == "semantic_kitti" else frames.scenes
    try:
        published = published_fraction(data.dataset, data.train_fraction)
    except ValueError:  # no list is published for this fraction
        return names, False
    return names, data.train_split == "train" and names == published
