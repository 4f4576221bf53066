"""One job of a search: resuming after a rung, blame, and the lock."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tune_cases import one_thread, search_config

from slidr.cluster import trial
from slidr.cluster.trial import NotTrained, run_job
from slidr.config import Config
from slidr.training.locks import held
from slidr.training.runs import RunError, folder_of
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


def test_a_job_in_another_process_is_waited_for_and_then_left_to_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(GROUP, "trial", 2, {"lr": 0.01})
    monkeypatch.setattr(trial, "LOCK_WAIT_S", 0.1)
    with held(folder_of(job_config(config, job)).file("lock"), "this"), pytest.raises(NotTrained, match="in use"):
        run_job(config, job)


def test_a_lock_ends_with_its_block(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    with held(path, "it"), pytest.raises(RunError, match="it is in use"), held(path, "it"):
        pass
    with held(path, "it"):
        pass
