"""Runs an agenda's jobs: on Ray Tune, as many at a time as there is room for, or here, one by one.

Tune does what it is good at: it places trials, counts resources, restarts what died. It proposes, compares and
remembers nothing; those are the agenda's and the records', which do not depend on what runs when.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # jobs write journals of their own
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # else Tune prints a box that no verbosity turns off

import torch
from ray import tune
from ray.tune.search import Searcher

from slidr.cluster import session
from slidr.cluster.room import check_room, of_one_job, telling_waits
from slidr.cluster.train import workers_run
from slidr.cluster.trial import LOST, NotTrained, run_job
from slidr.config import ClusterConfig, Config
from slidr.tracking import RunHandle, tracking_uri
from slidr.training.runs import folder_of
from slidr.tuning.agenda import Agenda, run_here
from slidr.tuning.jobs import End, Job, end_from_json, end_to_json, job_config, search_folder

Start = Callable[[Job], RunHandle | None]
Ended = Callable[[Job, End], None]


def run_agenda(agenda: Agenda, config: Config, start: Start, ended: Ended) -> None:
    """Runs every job of the agenda; `config` is the search's, with absolute paths.

    `start` is called in this process as a job begins and gives its MLflow run, `ended` as it has ended. Raises
    `ClusterError` where the cluster has no room for a single job, `NotTrained` (here) where a job could not
    be trained, `KeyboardInterrupt` where the user broke it off.
    """
    if config.cluster.max_workers == 0:

        def run(job: Job) -> End:
            end = run_job(config, job, start(job))
            ended(job, end)
            return end

        run_here(agenda, run)
    elif not agenda.exhausted:
        session.start(config.cluster)
        check_trial_room(config.cluster)
        # What a job may not send itself, the driver sends when it has ended.
        _run_on_tune(agenda, config, lambda job: workers_run(config, start(job)), ended)


def check_trial_room(cluster: ClusterConfig) -> int:
    """How many jobs the cluster holds at a time. Raises `ClusterError`, with the numbers, where it holds none."""
    cluster = of_one_job(cluster)
    check_room(cluster)
    nodes = session.nodes()
    places = sum(node.cpus // cluster.reserved_cpus for node in nodes)
    if cluster.use_gpu:
        places = min(places, sum(node.gpus for node in nodes))
    cpus = cluster.min_workers * cluster.reserved_cpus + (0 if cluster.elastic else cluster.loader_cpus)
    return max(1, min(places // cluster.min_workers, sum(node.cpus for node in nodes) // cpus))


def _run_on_tune(agenda: Agenda, config: Config, start: Start, ended: Ended) -> None:
    cluster = config.cluster
    if cluster.max_workers > 1:
        # A run of many workers reserves its own places. The trial around it takes no CPU, or it would take one of them.
        resources = tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    else:
        resources = tune.PlacementGroupFactory([{"CPU": cluster.cpus_per_worker, "GPU": int(cluster.use_gpu)}])
    searcher = _AgendaSearcher(agenda, start, ended, lambda job: folder_of(job_config(config, job)).note(LOST))
    scratch = search_folder(config).file("ray")
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_trial, config=config), resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            max_concurrent_trials=check_trial_room(cluster),
            # A GPU that failed fails whatever its process does next.
            reuse_actors=not cluster.use_gpu,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns()}",  # Tune takes up whatever bears the same name; resuming is ours
            storage_path=scratch,
            failure_config=tune.FailureConfig(max_failures=cluster.max_failures),
            verbose=0,
        ),
    )
    try:
        with telling_waits(of_one_job(cluster), "end this with Ctrl-C: the same command goes on later"):
            tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if searcher.running or not agenda.exhausted:
        raise KeyboardInterrupt  # Tune ends quietly on a first Ctrl-C


def _trial(params: dict[str, Any], config: Config) -> dict[str, Any]:
    """What Tune runs for a job, in a process of its own."""
    torch.set_num_threads(config.cluster.cpus_per_worker)
    job = Job.from_json(params["job"])
    run = None if params["run_id"] is None else RunHandle(tracking_uri(config), params["run_id"])
    try:
        return {"end": end_to_json(run_job(config, job, run))}
    except NotTrained as error:
        return {"refused": str(error)}


def _trial_name(trial: Any) -> str:
    job = Job.from_json(trial.config["job"])
    return f"{job.group.name.replace('/', '-')}-{job.name}"


class _AgendaSearcher(Searcher):
    """An agenda as Tune wants to be asked."""

    def __init__(self, agenda: Agenda, start: Start, ended: Ended, why_lost: Callable[[Job], str | None]) -> None:
        super().__init__()
        self._agenda, self._start, self._ended, self._why_lost = agenda, start, ended, why_lost
        self.running: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> Any:
        if self._agenda.exhausted:
            return Searcher.FINISHED
        job = self._agenda.next()
        if job is None:
            return None
        self.running[trial_id] = job
        run = self._start(job)
        return {"job": job.to_json(), "run_id": None if run is None else run.run_id}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        job = self.running.pop(trial_id)
        if error or result is None or "end" not in result:
            reason = (result or {}).get("refused") or self._why_lost(job) or "its process died"
            self._agenda.lose(job, reason)
            return
        end = end_from_json(result["end"])
        self._agenda.end(job, end)
        self._ended(job, end)

    def save(self, checkpoint_path: str) -> None:
        """Leaves an empty file where Tune wants one: the records are what a search is continued from."""
        Path(checkpoint_path).touch()

    def __getstate__(self) -> dict[str, Any]:
        return {}
