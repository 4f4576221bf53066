"""Pretraining as a stage: image-to-lidar distillation, scored without labels."""

from __future__ import annotations

from typing import Any

import torch

from slidr.cluster.loading import RayLoader
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.cluster.train import train
from slidr.config import Config, public_dict
from slidr.data.loading import LocalLoader, PairSource
from slidr.models.export import export_slidr
from slidr.report.method import method_figure
from slidr.report.pictures import save_picture
from slidr.training.checkpoint import write_weights
from slidr.training.distill import DistillTask, build_distiller, evaluate_distiller
from slidr.training.loop import Outcome
from slidr.training.runs import RunFolder


def pretrain(config: Config, progress: bool = True) -> dict[str, Any]:
    """Distils a student as configured; returns its final scores. See `slidr.cluster.train.train`."""
    return train(config, PretrainStage(), progress)


class PretrainStage:
    """Image-to-lidar distillation."""

    name = "pretrain"

    def source(self, config: Config) -> PairSource:
        return PairSource(config, superpixel_folder(config.superpixels))

    def begin(self, config: Config, folder: RunFolder) -> None:
        """Nothing."""

    def task(self, config: Config) -> DistillTask:
        return DistillTask(config)

    def scores(
        self, task: DistillTask, config: Config, loader: RayLoader | LocalLoader, device: torch.device
    ) -> dict[str, float]:
        """Superpixel retrieval on held-out frames: the trained networks', and the same ones' before training."""
        untrained = build_distiller(config).to(device)
        trained = evaluate_distiller(task.model, loader.held_out("score"), config.loss, device)
        before = evaluate_distiller(untrained, loader.held_out("score"), config.loss, device)
        return {"retrieval": trained["val_retrieval"], "retrieval_untrained": before["val_retrieval"]}

    def enough(self, epoch: int, metrics: dict[str, float]) -> bool:
        return False

    def keep(self, task: DistillTask, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
        """Writes the student in SLidR's published layout."""
        student = {name: value.cpu() for name, value in task.model.student.state_dict().items()}
        teacher = {name: value.cpu() for name, value in task.model.teacher.state_dict().items()}
        path = folder.file("student.pt")
        write_weights(path, export_slidr(student, teacher, outcome.epoch, public_dict(config)))
        return {"student": path}

    def prepare(self, task: DistillTask, config: Config, loader: RayLoader | LocalLoader, device: torch.device) -> None:
        """Nothing."""

    def draw(self, task: DistillTask, config: Config, folder: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
        """A picture of what both networks see."""
        picture = save_picture(folder.file("method.png"), lambda: _picture(task, self.source(config)))
        return {} if picture is None else {"picture": picture}


@torch.no_grad()
def _picture(task: DistillTask, source: PairSource) -> bytes:
    """The first frame of the score subset through both networks."""
    batch = source.collate([source.sample("score", 0, 0)])
    task.model.eval()
    device = next(task.model.parameters()).device
    rows, maps = task.model(batch.to(device))
    return method_figure(batch, rows.cpu(), maps.cpu())
