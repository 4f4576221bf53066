"""One job of a search: an ordinary fine-tuning that ends in a record, whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from slidr.cluster.evaluate import EvaluateStage, evaluation_config
from slidr.cluster.failures import WouldFailAgain
from slidr.cluster.finetune import FinetuneStage, keep_last
from slidr.cluster.loading import RayLoader
from slidr.cluster.train import TrainingFailed, train_untracked
from slidr.config import Config
from slidr.data import storage
from slidr.data.loading import LocalLoader
from slidr.tracking import JournalError, RunHandle, read_journal
from slidr.training import locks
from slidr.training.checkpoint import CheckpointError
from slidr.training.loop import Diverged, Outcome
from slidr.training.runs import RunError, RunFolder, folder_of
from slidr.training.segment import SegmentTask
from slidr.tuning.jobs import End, Job, ended, job_config, read_end, write_end
from slidr.tuning.rungs import falls_short
from slidr.urls import RedactedError

LOST = "lost"  # the note on why a job last came to no end


class NotTrained(RedactedError, RuntimeError):
    """A job that came to no end for a reason that lies outside it, such as a full disk; the message says which."""


def run_job(config: Config, job: Job, run: RunHandle | None = None) -> End:
    """Trains a job, from its newest checkpoint if it has one, and records its end; a recorded one is only read.

    `config` is the search's. Metrics go to the MLflow `run`, if any. Any error of the training is an end ("failed");
    those that say nothing of it are raised: Ray's errors and `TrainingFailed` where a worker died, `NotTrained` where
    the disk is full or the folder in use.
    """
    own = job_config(config, job)
    folder = folder_of(own)
    with _alone(folder, job):
        known = read_end(folder)
        if known is not None:
            return known
        storage.delete(folder.file(LOST))  # an earlier try's reason is not this one's
        try:
            end = _trial(own, job, run, config.tune.max_loss) if job.kind == "trial" else _final(config, own, run)
        except RayError:
            raise
        except (RunError, OSError, JournalError, CheckpointError) as error:
            raise NotTrained(str(error)) from error
        except Exception as error:
            if isinstance(error.__cause__, OSError | JournalError | CheckpointError) or _outside(error):
                raise NotTrained(str(error)) from error
            if _worker_died(error):
                folder.note(LOST, str(error))  # Tune tries again, and keeps no reason if that was the last time
                raise
            end = End("failed", reason=_reason(error), **_course(folder))
        write_end(folder, end)
        # What is left to do needs no weights but a final's student.
        shutil.rmtree(folder.checkpoints.path, ignore_errors=True)
    return end


@contextlib.contextmanager
def _alone(folder: RunFolder, job: Job) -> Iterator[None]:
    """Waits for a process of an earlier, killed search to let go of the job."""
    try:
        with locks.held(folder.file("lock"), job.name, locks.WAIT_S):
            yield
    except RunError as error:
        raise NotTrained(str(error)) from error


class TrialStage(FinetuneStage):
    """Fine-tuning that ends at a rung whose bound it misses, and leaves its scores only."""

    name = "tune"

    def __init__(self, job: Job, max_loss: float) -> None:
        self.bounds, self.max_loss = dict(job.bounds), max_loss

    def enough(self, epoch: int, metrics: dict[str, float]) -> bool:
        # The validation loss would not do: while batch norm's running statistics lag behind a high rate, it rises to
        # many times chance and comes down again.
        if metrics["loss"] > self.max_loss:
            raise Diverged(f"epoch {epoch}: the training loss is {metrics['loss']:.3g}, above {self.max_loss:g}")
        return falls_short(epoch, metrics["val_miou"], self.bounds)

    def scores(
        self, task: SegmentTask, config: Config, loader: RayLoader | LocalLoader, device: torch.device
    ) -> dict[str, float]:
        """The last validation's, unless norms are to be taken again. Nothing says how far they lag: finals do."""
        return super().scores(task, config, loader, device) if config.evaluation.reestimate_norms else {}

    def keep(self, task: SegmentTask, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
        return {}


class FinalStage(FinetuneStage):
    """Fine-tuning to its last epoch; the student of its last epoch is the result."""

    name = "tune"

    def keep(self, task: SegmentTask, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
        return keep_last(task, config, folder, outcome)


def _trial(own: Config, job: Job, run: RunHandle | None, max_loss: float) -> End:
    result = train_untracked(own, TrialStage(job, max_loss), run)
    end = ended(result["val_miou"], seconds=result["seconds"], **_course(folder_of(own)))
    epoch = end.curve[-1][0] if end.curve else 0.0  # of the score: a fraction where the last step was within an epoch
    if end.score is not None and falls_short(epoch, end.score, job.bounds):
        bound = job.bounds[int(epoch)]
        return replace(end, status="pruned", reason=f"epoch {epoch:g}: {end.score:.4f} < {bound:.4f}")
    return end


def _final(config: Config, own: Config, run: RunHandle | None) -> End:
    """Retrains, then scores once on the final split, all of it."""
    result = train_untracked(own, FinalStage(), run)
    wanted = replace(config.evaluation, checkpoint=result["student"], split=config.tune.final_split, submission=None)
    evaluated = evaluation_config(replace(own, evaluation=wanted))
    scores = train_untracked(evaluated, EvaluateStage(), None)["evaluation"]
    folder = folder_of(own)
    storage.write_bytes_atomic(folder.file("evaluation.json"), json.dumps(scores, indent=2).encode())
    score = float("nan") if scores["miou"] is None else scores["miou"]
    return ended(score, seconds=result["seconds"], **_course(folder))


def _course(folder: RunFolder) -> dict[str, Any]:
    """How far a job came and what its validations said, from its journal."""
    journal = sorted(read_journal(folder.file("metrics.jsonl")).items())
    curve = tuple((m["epoch"], m["val_miou"]) for _, m in journal if "val_miou" in m and "epoch" in m)
    return {"curve": curve, "steps": journal[-1][0] if journal else 0}


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text if type(error).__module__.startswith("slidr.") and text else f"{type(error).__name__}: {text}"


def _outside(error: Exception) -> bool:
    """Whether a worker of several ended its run for a reason that lies outside it, such as a full disk."""
    ended = getattr(error.__cause__, "controller_failure", None)
    return isinstance(ended, WouldFailAgain) and ended.outside


def _worker_died(error: Exception) -> bool:
    """Whether a group of workers ended by losing one, not by what its training raised."""
    if not isinstance(error, TrainingFailed) or error.__cause__ is None:
        return False
    if isinstance(getattr(error.__cause__, "controller_failure", None), WouldFailAgain):
        return False
    failures = getattr(error.__cause__, "worker_failures", {0: error.__cause__})
    return any(not isinstance(failure, UserExceptionWithTraceback) for failure in failures.values())
