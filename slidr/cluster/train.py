"""Training on Ray Train, whatever is trained: checks first, then a worker group, then the final scores."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch

from slidr import tracking
from slidr.cluster import session
from slidr.cluster.loading import RayLoader
from slidr.cluster.progress import follow, telling_backlog
from slidr.cluster.room import check_room, telling_waits
from slidr.config import ClusterConfig, Config, ConfigError, absolute_path, decode, to_dict, with_used_paths
from slidr.data import storage
from slidr.data.loading import LocalLoader, Source, Subset, train_plan
from slidr.training import workers
from slidr.training.checkpoint import CheckpointError
from slidr.training.locks import await_writer, launching, writing
from slidr.training.loop import Outcome, Task, fit
from slidr.training.optim import total_steps
from slidr.training.runs import (
    RunFolder,
    claim,
    folder_of,
    identity,
    of_the_workers,
    require_same_data,
    require_same_weights,
)
from slidr.urls import RedactedError, redacting_logger

_log = redacting_logger(__name__)
_SEND_SECONDS = 10.0  # between looks at the journal of workers on other machines
HELD_OUT: dict[Subset, str] = {"val": "data.val_split", "score": "run.score_frames"}


class TrainingFailed(RedactedError, RuntimeError):
    """Training ended before its last step; the message says why and how to go on."""


class Stage(Protocol):
    """A kind of training: its data, its task, and what it leaves at the end. Picklable and small."""

    name: str

    def source(self, config: Config) -> Source:
        """The run's data."""

    def begin(self, config: Config, folder: RunFolder) -> None:
        """Writes what is known before the first step. Called once the run is claimed, before any worker starts."""

    def task(self, config: Config) -> Task:
        """What is trained."""

    def scores(
        self, task: Any, config: Config, loader: RayLoader | LocalLoader, device: torch.device
    ) -> dict[str, float]:
        """The final scores; every worker calls it."""

    def prepare(self, task: Any, config: Config, loader: RayLoader | LocalLoader, device: torch.device) -> None:
        """What a run of no steps does before its validation; every worker calls it."""

    def keep(self, task: Any, config: Config, folder: RunFolder, outcome: Outcome) -> dict[str, Any]:
        """Writes what is to be kept besides checkpoints; returns entries of `result.json`. Rank 0 only."""

    def draw(self, task: Any, config: Config, folder: RunFolder, result: dict[str, Any]) -> dict[str, Any]:
        """Draws the pictures of a run whose result is kept already; returns entries to add to it. Rank 0 only."""

    def enough(self, epoch: int, metrics: dict[str, float]) -> bool:
        """Whether to end training after this epoch; every worker asks, and gets the same answer."""


def train(config: Config, stage: Stage, progress: bool = True) -> dict[str, Any]:
    """Runs a stage on `cluster.num_workers` workers; returns its final scores.

    Everything it leaves is in `run.folder`/`run.name` (see `slidr.training.runs`) and in MLflow. A finished run that
    is resumed returns its scores again; one whose driver was killed is taken up once its workers have ended. Raises
    `ClusterError` for a cluster that is too small, `RunError` for a folder in use, `TrainingFailed` when training
    broke off.
    """
    config = with_absolute_paths(config)  # Ray's workers have working folders of their own
    steps = _check_data(config, stage)
    with launching(folder_of(config)):
        return _train(config, stage, steps, progress)


def _train(config: Config, stage: Stage, steps: int, progress: bool) -> dict[str, Any]:
    folder = _claim(config, stage)
    finished = folder.result()
    if finished is not None:
        tracking.finish_again(config, folder, telling_backlog())
        return finished
    if config.cluster.elastic:
        _log.warning("when the number of workers changes: %s", of_the_workers(config))
    run = tracking.open_run(config, stage.name, folder)
    status = "FAILED"
    try:
        journal, theirs = folder.file("metrics.jsonl"), workers_run(config, run)
        sending = contextlib.nullcontext() if theirs is run else _sending(journal, run)
        with follow(journal, steps, enabled=progress), sending, _telling_waits(config.cluster):
            result = _run_to_result(config, stage, folder, theirs)
        status = "FINISHED"
        return result
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracking.finish_run(folder, run, status, telling_backlog())


def train_untracked(config: Config, stage: Stage, run: tracking.RunHandle | None) -> dict[str, Any]:
    """`train` for a caller who keeps the MLflow run himself: metrics go to `run`, nothing is started or ended.

    Without a run they wait in the folder's journal. The caller keeps other launches away, too.
    """
    config = with_absolute_paths(config)
    _check_data(config, stage)
    folder = _claim(config, stage)
    finished = folder.result()
    return finished if finished is not None else _run_to_result(config, stage, folder, run)


def _check_data(config: Config, stage: Stage) -> int:
    """The run's number of steps, once its data have been found fit."""
    source = stage.source(config)
    plan = train_plan(source)  # refuses a split smaller than a batch
    for subset, key in HELD_OUT.items():
        if source.count(subset) == 0:
            raise ConfigError(f"{key}: {config.data.frames} has no such frame to validate on")
    return total_steps(config.optim, plan.steps_per_epoch)


def _claim(config: Config, stage: Stage) -> RunFolder:
    """The run's folder, once the cluster has been found fit and nobody writes there any more."""
    if config.cluster.max_workers > 0:
        session.start(config.cluster)
        check_room(config.cluster)
    await_writer(folder_of(config))
    folder = claim(config)
    require_same_data(config, folder)
    if folder.result() is None:
        stage.begin(config, folder)
    return folder


def _run_to_result(config: Config, stage: Stage, folder: RunFolder, run: tracking.RunHandle | None) -> dict[str, Any]:
    try:
        _run_workers(config, stage, run)
    except TrainingFailed as error:
        if folder.result() is None:
            raise
        _log.warning("%s: the result is kept, but a worker ended while it drew pictures: %s", folder.path, error)
    result = folder.result()
    if result is None:
        raise TrainingFailed(f"{folder.path}: the workers ended without writing result.json")
    return result


def with_absolute_paths(config: Config) -> Config:
    """The config with its local paths made absolute, so that they mean the same in every process."""

    absolute = absolute_path
    config = with_used_paths(config)  # one that was made in Python was not decoded

    def absolute_file(weights: str | None) -> str | None:
        """Published names and URLs stay what they are."""
        return absolute(weights) if weights is not None and os.path.exists(weights) else weights

    def tracking_uri(uri: str | None) -> str | None:
        sqlite = "sqlite:///"
        return sqlite + absolute(uri.removeprefix(sqlite)) if uri is not None and uri.startswith(sqlite) else uri

    return replace(
        config,
        data=replace(config.data, root=absolute(config.data.root), frames=absolute(config.data.frames)),
        superpixels=replace(config.superpixels, folder=absolute(config.superpixels.folder)),
        student=replace(config.student, weights=absolute_file(config.student.weights)),
        teacher=replace(config.teacher, weights=absolute_file(config.teacher.weights)),
        run=replace(config.run, folder=absolute(config.run.folder)),
        tracking=replace(config.tracking, uri=tracking_uri(config.tracking.uri)),
    )


def workers_run(config: Config, run: tracking.RunHandle | None) -> tracking.RunHandle | None:
    """The MLflow run that workers send their metrics to; None where they must leave that to this process.

    That is so where MLflow's store is a file, which one process may write, and workers may run on other machines.
    """
    alone = config.cluster.max_workers == 0 or len(session.machines()) == 1
    return run if alone or not tracking.tracking_uri(config).startswith("sqlite:") else None


def _telling_waits(cluster: ClusterConfig) -> contextlib.AbstractContextManager[None]:
    if cluster.max_workers == 0:
        return contextlib.nullcontext()
    fewer = "with fewer cluster.num_workers, or [min, max] of them"
    return telling_waits(cluster, f"end this with Ctrl-C and run it again with --run.resume and {fewer}")


@contextlib.contextmanager
def _sending(journal: str, run: tracking.RunHandle) -> Iterator[None]:
    """Until the block ends, sends what workers log: from this process, every few seconds."""
    stop = threading.Event()

    def send() -> None:
        sender = tracking.Journal(journal, run)
        while not stop.wait(_SEND_SECONDS):
            if storage.is_remote(journal):  # there a journal holds what it read when it was opened
                sender = tracking.Journal(journal, run)
            try:
                while sender.send_slice() and sender.pending() and not stop.is_set():
                    continue
            except storage.DataError as error:  # the journal cannot be read
                _log.warning("%s", error)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _run_workers(config: Config, stage: Stage, run: tracking.RunHandle | None) -> None:
    """Runs `_work` in every worker of a Ray Train group, or in this process for `cluster.num_workers: 0`."""
    folder = folder_of(config)
    # Ray takes up whatever bears the same name; resuming is ours, so every launch has its own.
    launch = f"{identity(config)}-{time.time_ns()}"
    if config.cluster.max_workers == 0:
        # A GPU leaves its process's CPUs idle but for the one that drives it.
        threads = max(1, config.cluster.cpus_per_worker - 1) if config.cluster.use_gpu else 0
        loader, device = LocalLoader(stage.source(config), threads=threads), _local_device(config)
        journal = tracking.Journal(folder.file("metrics.jsonl"), run)
        try:
            with writing(folder, launch):
                _work(config, stage, journal, loader, device)
        # A full disk, a folder that went away, no checkpoint that can be read: as from a worker on Ray.
        except (OSError, tracking.JournalError, CheckpointError) as error:
            raise TrainingFailed(_broke_off(folder, str(error))) from error
        return
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from slidr.cluster.elastic import impatient, take_back_requests
    from slidr.cluster.failures import EndAtOnce, cause
    from slidr.cluster.trainer import InterruptibleTrainer

    cluster = config.cluster
    filesystem, path = storage.filesystem(folder.file("ray"))
    trainer = InterruptibleTrainer(
        _ray_worker,
        train_loop_config={"config": to_dict(config), "stage": stage, "run": run},
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,  # type: ignore[arg-type]  # the older Ray Train's stub
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.reserved_cpus, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=launch,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[EndAtOnce()],  # type: ignore[list-item]
        ),
    )
    try:
        take_back_requests(folder, trainer)
        with impatient() if cluster.elastic else contextlib.nullcontext():
            trainer.fit()
    except Exception as error:
        raise TrainingFailed(_broke_off(folder, cause(error))) from error


def _broke_off(folder: RunFolder, reason: str) -> str:
    newest = folder.checkpoints.steps()
    where = f"from step {newest[-1]} with --run.resume" if newest else "by starting again: nothing was trained yet"
    return (
        f"{folder.path}: training broke off: {reason}\n"
        f"Once the cause is mended, continue {where}; with other values of the method, under another --run.name"
    )


def _ray_worker(payload: dict[str, Any]) -> None:
    """What each Ray Train worker runs; a restarted one goes on from the run's newest checkpoint."""
    import ray.train
    from ray.train.torch import get_device

    config = decode(payload["config"])
    folder = folder_of(config)
    folder.require_visible()
    require_same_weights(config, folder)
    context = ray.train.get_context()
    loader = RayLoader(
        payload["stage"].source(config), config.cluster, context.get_world_rank(), context.get_world_size()
    )
    device = get_device() if config.cluster.use_gpu else torch.device("cpu")
    # More threads than CPUs reserved would spin at each other's barriers.
    torch.set_num_threads(config.cluster.cpus_per_worker)
    journal = tracking.Journal(folder.file("metrics.jsonl"), payload["run"])
    with contextlib.ExitStack() as stack:
        if workers.rank() == 0:
            stack.enter_context(journal.warnings())
            # Where this launch lost a worker, or another's driver was killed, that worker may still be ending.
            stack.enter_context(writing(folder, context.get_experiment_name()))
        _work(config, payload["stage"], journal, loader, device)


def _work(
    config: Config,
    stage: Stage,
    journal: tracking.Journal,
    loader: RayLoader | LocalLoader,
    device: torch.device,
) -> None:
    """One worker's part: train, score, and (rank 0) write what is left to keep."""
    folder = folder_of(config)
    task = stage.task(config)
    started = time.time()
    outcome = fit(
        task,
        loader,
        config,
        folder.checkpoints,
        device,
        journal.log,
        journal.flush,
        stage.enough,
        journal.note,
        lambda: stage.prepare(task, config, loader, device),
    )
    scores = stage.scores(task, config, loader, device)
    if workers.rank() != 0:
        return
    journal.log(outcome.step, scores)
    journal.flush()
    journal.send_slice()  # a longer rest is sent by the driver once there is a result
    result = {
        **outcome.metrics,
        **scores,
        **stage.keep(task, config, folder, outcome),
        "steps": outcome.step,
        "epochs": outcome.epoch,
        "seconds": round(time.time() - started, 1),
        "seed": config.run.seed,
        "config": identity(config),
    }
    folder.finish(result)
    drawn = stage.draw(task, config, folder, result)  # last: no picture may cost a result
    if drawn:
        folder.finish({**result, **drawn})


def _local_device(config: Config) -> torch.device:
    return torch.device("cuda" if config.cluster.use_gpu else "cpu")
