"""One job of a search: resuming after a rung, blame, and the lock."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from tune_cases import one_thread, search_config

from slidr.cluster import trial
from slidr.cluster.failures import EndAtOnce, WouldFailAgain
from slidr.cluster.train import TrainingFailed
from slidr.cluster.trial import NotTrained, TrialStage, run_job
from slidr.config import Config
from slidr.training import locks
from slidr.training.locks import held
from slidr.training.loop import Diverged
from slidr.training.runs import folder_of
from slidr.tuning import jobs
from slidr.tuning.jobs import End, Group, Job, job_config

__all__ = ["one_thread"]
GROUP = Group(1.0, "random")


@pytest.fixture(scope="module")
def config(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = search_config(tiny_world, tmp_path_factory.mktemp("trial"))
    return replace(config, optim=replace(config.optim, epochs=3))


def test_a_trial_killed_before_its_record_ends_at_the_same_rung_when_run_again(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(GROUP, "trial", 0, {"lr": 0.01}, bounds={1: 1.0})

    def killed(folder: object, end: End) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trial, "write_end", killed)
    monkeypatch.setattr("slidr.training.runs.RunFolder.finish", killed)
    with pytest.raises(KeyboardInterrupt):
        run_job(config, job)
    monkeypatch.undo()
    end = run_job(config, job)
    assert (end.status, len(end.curve), end.steps) == ("pruned", 1, 2)
    assert not folder_of(job_config(config, job)).checkpoints.steps(), "an ended trial keeps no weights"
    assert run_job(config, job) == end


def test_a_full_disk_is_not_the_trials_fault(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(GROUP, "trial", 1, {"lr": 0.01})

    def full(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slidr.training.checkpoint.storage.write_bytes_atomic", full)
    with pytest.raises(NotTrained, match="No space left"):
        run_job(config, job)
    monkeypatch.undo()
    assert jobs.read_end(folder_of(job_config(config, job))) is None


@pytest.mark.parametrize(("kind", "outside"), [("JournalError", True), ("OSError", True), ("DataError", False)])
def test_of_several_workers_too_a_full_disk_is_not_the_trials_fault(
    config: Config, monkeypatch: pytest.MonkeyPatch, kind: str, outside: bool
) -> None:
    class ControllerError(Exception):
        controller_failure = pickle.loads(pickle.dumps(WouldFailAgain("worker 1: no space left", kind)))

    def broken(*arguments: object) -> None:
        raise TrainingFailed("broke off: worker 1: no space left") from ControllerError()

    job = Job(GROUP, "trial", 4 if outside else 5, {"lr": 0.01})
    monkeypatch.setattr(trial, "train_untracked", broken)
    if outside:
        with pytest.raises(NotTrained, match="no space left"):
            run_job(config, job)
        assert jobs.read_end(folder_of(job_config(config, job))) is None
    else:
        assert run_job(config, job).status == "failed"


def test_a_workers_error_keeps_its_class_on_the_way_to_the_driver() -> None:
    lines = "Traceback:\n  ...\nslidr.tracking.JournalError: s3://b/metrics.jsonl: cannot be written (no space)"
    with pytest.raises(WouldFailAgain, match=r"worker 3: s3://b/metrics\.jsonl: cannot be written") as raised:
        EndAtOnce().after_exception(None, {3: RuntimeError(lines)})
    assert raised.value.outside
    with pytest.raises(WouldFailAgain) as raised:
        EndAtOnce().after_exception(None, {0: Diverged("step 3: the loss is nan")})
    assert not raised.value.outside


def test_an_exploding_training_loss_is_a_failure_with_its_number(config: Config) -> None:
    strict = replace(config, tune=replace(config.tune, max_loss=1e-6))
    end = run_job(strict, Job(GROUP, "trial", 6, {"lr": 0.01}))
    assert end.status == "failed"
    assert "epoch 1: the training loss is" in str(end.reason)
    assert len(end.curve) == 1


def test_a_validation_loss_far_above_chance_is_none() -> None:
    # As seen in a sound trial, whose batch statistics ran behind its rate for three epochs.
    stage = TrialStage(Job(GROUP, "trial", 0, {"lr": 0.01}), max_loss=100.0)
    assert not stage.enough(3, {"loss": 2.1, "val_loss": 122.0, "val_miou": 0.1})


def test_a_trial_that_ends_within_an_epoch_is_not_compared_at_the_rung_it_passed(config: Config) -> None:
    # Two steps an epoch: the third ends one and a half.
    longer = replace(config, optim=replace(config.optim, max_steps=3))
    free = run_job(longer, Job(GROUP, "trial", 7, {"lr": 0.01}))
    assert [epoch for epoch, _ in free.curve] == [1.0, 1.5]
    after_one, at_the_end = (score for _, score in free.curve)
    assert at_the_end == free.score
    # A bound that the score after one epoch meets and, were it compared with it, the last one could not.
    monotone = Job(GROUP, "trial", 8, {"lr": 0.01}, bounds={1: after_one})
    end = run_job(longer, monotone)
    assert (end.status, end.score, end.curve) == ("finished", free.score, free.curve)


def test_a_job_in_another_process_is_waited_for_and_then_left_to_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(GROUP, "trial", 2, {"lr": 0.01})
    monkeypatch.setattr(locks, "WAIT_S", 0.1)
    with held(folder_of(job_config(config, job)).file("lock"), "this"), pytest.raises(NotTrained, match="in use"):
        run_job(config, job)
