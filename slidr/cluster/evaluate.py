"""Evaluation as a stage without a training step: exact scores of one checkpoint on a whole split, and submissions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slidr.cluster.loading import RayLoader
from slidr.cluster.train import train
from slidr.config import Config, ConfigError, absolute_path, fingerprint
from slidr.data import storage
from slidr.data.completeness import lacking_of_split
from slidr.data.frames import open_table
from slidr.data.loading import LocalLoader, ScanSource, require_labels, subset_frames
from slidr.data.submission import Submission
from slidr.models.weights import load_student, voxel_expectation, weights_digest
from slidr.report.pictures import save_picture
from slidr.report.scores import bar_chart, markdown, scores_of
from slidr.shapes import Int64
from slidr.training import norms
from slidr.training.locks import launching
from slidr.training.loop import Outcome
from slidr.training.runs import RunFolder, folder_of, identity
from slidr.training.segment import BAND_NAMES, ScanCounts, SegmentTask, count_scans, require_segmentation
from slidr.types import ScanBatch
from slidr.urls import redact_url


def evaluate(config: Config, progress: bool = False) -> dict[str, Any]:
    """Scores `evaluation.checkpoint` on `evaluation.split`; returns the run's result, scores under "evaluation".

    The run's folder is named by what was evaluated, and how: the same evaluation asked for again returns its scores,
    unless a file of its submission is gone: then everything is predicted again. A split without labels (test) has no
    scores, only a submission. Raises `ConfigError` where the config names no segmentation or no checkpoint,
    `WeightsError` where the checkpoint does not fit it, `DataError` where a frame to score has no labels,
    `RunError` where another process evaluates the same.
    """
    checked = evaluation_config(config)
    if is_scored(config):
        require_labels(checked)
    _check_checkpoint(checked)
    _require_whole_submission(checked)
    return train(checked, EvaluateStage(), progress)


def evaluation_config(config: Config) -> Config:
    """The config of the run that an evaluation is: one split, whole, and no training step."""
    require_segmentation(config)
    wanted = config.evaluation
    if wanted.checkpoint is None:
        raise ConfigError("evaluation.checkpoint: nothing to evaluate; pass --checkpoint PATH")
    if not is_scored(config) and wanted.submission is None:
        raise ConfigError(
            "evaluation.split: test has no public labels to score; set evaluation.submission to a folder for its "
            "predictions"
        )
    path = absolute_path(wanted.checkpoint)  # workers have another working directory
    submission = None if wanted.submission is None else absolute_path(wanted.submission)
    table = open_table(config.data.frames, config.data.dataset)
    # A sweep's votes stay together, and as many sweeps as fit into the config's validation batch share a pass.
    sweeps = max(1, config.data.val_batch_size // wanted.votes)
    workers = min(config.cluster.min_workers, -(-len(table.select(wanted.split)) // sweeps))
    again = wanted.reestimate_norms > 0
    if again:  # the batches are those that training took, whatever the number of workers
        shares = config.optim.batch_size // config.optim.accumulate
        workers = max((n for n in range(1, workers + 1) if shares % n == 0), default=workers)
    evaluated = replace(
        config,
        data=replace(
            config.data,
            train_split=config.data.train_split if again else wanted.split,
            val_split=wanted.split,
            train_fraction=config.data.train_fraction if again else 1.0,
            max_val_frames=None,
            val_batch_size=wanted.votes * sweeps,
        ),
        student=replace(config.student, weights=None, freeze=False),
        # No step is taken; the smallest batch that every worker has a part in fits into any split.
        optim=replace(config.optim, max_steps=0)
        if again
        else replace(config.optim, max_steps=0, accumulate=1, batch_size=max(1, workers)),
        evaluation=replace(wanted, checkpoint=path, submission=submission),
        cluster=replace(config.cluster, num_workers=workers),
        run=replace(config.run, resume=True),
    )
    what = [
        weights_digest(path),
        identity(evaluated),
        fingerprint(evaluated.evaluation),
        table.fingerprint,
        absolute_path(config.data.root),
    ]
    digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:8]
    name = f"{config.run.name}-evaluate-{wanted.split}-{digest}"
    return replace(evaluated, run=replace(evaluated.run, name=name))


def is_scored(config: Config) -> bool:
    """Whether `evaluation.split` has labels: both benchmarks keep those of their test splits to themselves."""
    return config.evaluation.split != "test"


def lacking_of_submission(config: Config) -> str:
    """What the frame table lacks of `evaluation.split`, so that predictions for it are not whole; empty: nothing."""
    data, split = config.data, config.evaluation.split
    frames = open_table(data.frames, data.dataset).select(split)
    return lacking_of_split(data.dataset, split, frames.tokens, frames.scenes)


class EvaluateStage:
    """A trained student's scores and predictions on one split."""

    name = "evaluate"

    def source(self, config: Config) -> ScanSource:
        return ScanSource(config, votes=config.evaluation.votes, labelled=is_scored(config))

    def begin(self, config: Config, folder: RunFolder) -> None:
        """Nothing."""

    def task(self, config: Config) -> EvaluateTask:
        return EvaluateTask(config)

    def scores(
        self, task: EvaluateTask, config: Config, loader: RayLoader | LocalLoader, device: torch.device
    ) -> dict[str, float]:
        """The summary, for the tracking server."""
        scores = task.scores
        return {name: scores[name] for name in ("miou", "fwiou", "accuracy") if scores and scores[name] is not None}

    def enough(self, epoch: int, metrics: dict[str, float]) -> bool:
        return False

    def keep(self, task: EvaluateTask, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
        """Writes the scores as JSON and as a page, and ends a submission."""
        kept: dict[str, Any] = {"checkpoint": redact_url(config.evaluation.checkpoint or "")}
        if config.evaluation.submission is not None:
            task.submission().close()
            kept["submission"] = config.evaluation.submission
            lacking = lacking_of_submission(config)
            kept |= {"submission_lacks": lacking} if lacking else {}
        scores = task.scores
        if not scores:
            return kept
        files = {
            "evaluation.json": json.dumps(scores, indent=2).encode(),
            "evaluation.md": markdown(scores, _title(config)).encode(),
        }
        for name, data in files.items():
            storage.write_bytes_atomic(folder.file(name), data)
        return {**kept, "evaluation": scores, "files": [folder.file(name) for name in files]}

    def prepare(
        self, task: EvaluateTask, config: Config, loader: RayLoader | LocalLoader, device: torch.device
    ) -> None:
        """Takes batch norm's statistics again, where that is asked for."""
        batches = config.evaluation.reestimate_norms
        if batches > 0:
            norms.reestimate(task.model, norms.some_batches(loader, batches, config.optim), device)

    def draw(self, task: EvaluateTask, config: Config, folder: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
        """The scores as a bar chart."""
        if not task.scores:
            return {}
        chart = save_picture(folder.file("evaluation.png"), lambda: bar_chart(task.scores, _title(config)))
        return {} if chart is None else {"files": [*result["files"], chart]}


class EvaluateTask(SegmentTask):
    """Counts the predictions of a checkpoint; there is nothing to train."""

    kind = "evaluate"
    objective = ("frames", 1)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.evaluation.checkpoint is not None
        expect = voxel_expectation(config.data.voxel)
        load_student(self.model.student, config.evaluation.checkpoint, expect=expect)
        self.frames = subset_frames(config, "val")
        self.counts: ScanCounts | None = None

    def validate(self, batches: Iterable[ScanBatch]) -> dict[str, float]:
        """Keeps the counts of all workers' frames for `scores`; answers with how many frames there are."""
        device = next(self.model.parameters()).device
        row_of_token = {token: row for row, token in enumerate(self.frames.tokens)}
        submission = self.submission() if self.config.evaluation.submission is not None else None

        def write(token: str, classes: Int64[Tensor, " N"]) -> None:
            if submission is not None:
                submission.write(self.frames[row_of_token[token]], classes.numpy())

        counts = count_scans(self.model, batches, row_of_token, len(self.classes), write)
        self.counts = counts.sum_over_workers(device)
        return {"frames": float(len(self.frames))}

    @cached_property
    def scores(self) -> dict[str, Any]:
        """All scores of the counts; none for a split without labels."""
        if not is_scored(self.config):
            return {}
        assert self.counts is not None, "validate first"
        bands = dict(zip(BAND_NAMES, self.counts.bands.numpy(), strict=True))
        seed, draws = self.config.run.seed, self.config.evaluation.bootstrap
        return scores_of(self.counts.frames.numpy(), bands, self.classes, seed, draws)

    def submission(self) -> Submission:
        """Where predictions go."""
        wanted = self.config.evaluation
        assert wanted.submission is not None
        return Submission(self.config.data.dataset, wanted.submission, wanted.split)


def _title(config: Config) -> str:
    votes, again = config.evaluation.votes, config.evaluation.reestimate_norms
    title = f"{config.data.dataset} {config.evaluation.split}" + (f", {votes} votes a sweep" if votes > 1 else "")
    return title + (f", norms taken again over {again} batches" if again > 0 else "")


def _check_checkpoint(config: Config) -> None:
    """Raises `WeightsError` before any worker is started."""
    EvaluateTask(config)


def _require_whole_submission(config: Config) -> None:
    """Makes a finished evaluation an unfinished one where predictions that it should have left are not there."""
    folder = folder_of(config)
    wanted = config.evaluation
    if wanted.submission is None:
        return
    submission = Submission(config.data.dataset, wanted.submission, wanted.split)
    with launching(folder):  # another launch may be ending, with a result and predictions of its own
        if folder.result() is not None and submission.missing(subset_frames(config, "val")):
            storage.delete(folder.file("result.json"))
