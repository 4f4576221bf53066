"""Fine-tuning and linear probing as a stage: labelled sweeps, scored per point."""

from __future__ import annotations

import logging
from typing import Any

import torch

from slidr.cluster.loading import RayLoader
from slidr.cluster.train import train
from slidr.config import Config, public_dict
from slidr.data import storage
from slidr.data.loading import LocalLoader, ScanSource, require_labels, subset_frames
from slidr.data.splits import published_fraction
from slidr.models.export import export_slidr
from slidr.training.checkpoint import CheckpointError, write_weights
from slidr.training.loop import Outcome
from slidr.training.runs import RunFolder
from slidr.training.schema import weights_misfit
from slidr.training.segment import SegmentTask, require_segmentation

_log = logging.getLogger(__name__)


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
        """None besides the last validation's: `slidr evaluate` takes them on the whole split."""
        return {}

    def enough(self, epoch: int, metrics: dict[str, float]) -> bool:
        return False

    def keep(self, task: SegmentTask, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
        """Writes the last and the best student in SLidR's published layout."""
        kept = keep_last(task, config, folder, outcome)
        best = _best(task, folder)
        if best is not None:
            kept["best_student"] = folder.file("student_best.pt")
            write_weights(kept["best_student"], export_slidr(best["student"], None, best["epoch"], public_dict(config)))
            kept |= {"best_val_miou": best["metrics"]["val_miou"], "best_epoch": best["epoch"]}
        return kept


def _best(task: SegmentTask, folder: RunFolder) -> dict[str, Any] | None:
    """The best checkpoint; a damaged one is told of and left out, since it must not cost the run its other results."""
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
    """Writes the last student in SLidR's published layout; returns entries of `result.json`."""
    path = folder.file("student.pt")
    write_weights(path, export_slidr(task.state()["student"], None, outcome.epoch, public_dict(config)))
    names, published = labelled_part(config)
    return {
        "student": path,
        "weights": str(task.report) if task.report else "random",
        "labelled": len(names),
        "labelled_as_published": published,
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
