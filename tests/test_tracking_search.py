"""What a search asks of MLflow's store and of its own records: as much for each trial, however many there are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slidr import tracking, tracking_search
from slidr.config import Config, RunConfig, SpaceConfig, TrackingConfig, TuneConfig
from slidr.data import storage
from slidr.tracking_errors import TrackingError
from slidr.tracking_search import SearchTracker
from slidr.training.runs import folder_of
from slidr.tuning.agenda import SearchAgenda
from slidr.tuning.jobs import End, Group, Job, job_config, read_end, write_end

GROUP = Group(1.0, "random")


class Store:
    """An MLflow store in memory that counts what it is asked; `broken`: the next new run is made, its answer lost."""

    def __init__(self) -> None:
        self.runs: dict[str, Any] = {}
        self.calls: Counter[str] = Counter()
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        """What a tracker asks besides: nothing comes of it."""

        def call(*arguments: Any, **options: Any) -> None:
            self.calls[name] += 1

        return call

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="1", lifecycle_stage="active")

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        self.calls["create_run"] += 1
        run_id = f"{len(self.runs):032x}"
        info = SimpleNamespace(run_id=run_id, run_name=run_name, experiment_id=experiment, status="RUNNING")
        self.runs[run_id] = SimpleNamespace(info=info, data=SimpleNamespace(params={}, tags=tags))
        if self.broken:
            self.broken = False
            raise TrackingError("sqlite:///x", "is away (the answer got lost)", "wait")
        return self.runs[run_id]

    def set_terminated(self, run_id: str, status: str) -> None:
        self.calls["set_terminated"] += 1
        self.runs[run_id].info.status = status

    def update_run(self, run_id: str, status: str) -> None:
        self.calls["update_run"] += 1
        self.runs[run_id].info.status = status

    def get_run(self, run_id: str) -> Any:
        self.calls["get_run"] += 1
        return self.runs[run_id]

    def search_runs(self, experiments: list[str], query: str, page_token: str | None = None) -> Any:
        self.calls["search_runs"] += 1
        parent = query.split("'")[1]
        below = [run for run in self.runs.values() if run.data.tags.get("mlflow.parentRunId") == parent]
        self.calls["runs listed"] += len(below)
        page = type("Page", (list,), {"token": None})(below)
        return page


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store()
    for module in (tracking, tracking_search):
        monkeypatch.setattr(module, "connect", lambda uri: store)
    return store


def search(folder: Path, trials: int) -> Config:
    space = SpaceConfig(lr=(1e-3, 1e-1))
    return Config(
        run=RunConfig(folder=str(folder), name="search"),
        tracking=TrackingConfig(uri="http://127.0.0.1:1"),
        tune=TuneConfig(methods=("random",), fractions=(1.0,), trials=trials, round_size=5, random=space),
    )


def jobs(count: int) -> list[Job]:
    return [Job(GROUP, "trial", index, {"lr": 0.01}) for index in range(count)]


def asked(store: Store, folder: Path, trials: int, restarts: int = 0) -> Counter[str]:
    """What the store was asked for the trials of a search, of which each launch does its part."""
    config = search(folder, trials)
    before = store.calls.copy()
    each = trials // (restarts + 1)
    for launch in range(restarts + 1):
        tracker = SearchTracker(config, {})
        for job in jobs(trials)[: (launch + 1) * each]:
            assert tracker.start(job) is not None
            assert tracker.end(job, End("finished", 0.5))
    return store.calls - before


def test_a_trial_asks_the_store_for_as_much_whatever_the_number_of_trials(store: Store, tmp_path: Path) -> None:
    few, more, many = (asked(store, tmp_path / str(trials), trials) for trials in (10, 20, 40))
    assert few["create_run"] == 12, "the search's, its fraction's and the trials' own"
    assert few["search_runs"] == more["search_runs"] == many["search_runs"] == 2, "once below each parent"
    assert many["runs listed"] == 0
    for call in many:
        assert (many[call] - more[call]) == 2 * (more[call] - few[call]), call


def test_a_search_taken_up_again_lists_what_is_there_once(store: Store, tmp_path: Path) -> None:
    once, again = (asked(store, tmp_path / str(restarts), 40, restarts) for restarts in (0, 3))
    assert again["create_run"] == once["create_run"] == 42
    assert again["search_runs"] <= 4 * 2
    assert again["runs listed"] <= 10 + 20 + 30 + 3, "each launch those of the earlier ones"


def test_a_run_whose_answer_got_lost_is_found_again_and_gets_no_twin(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = SearchTracker(search(tmp_path, 3), {})
    first, second, _ = jobs(3)
    assert tracker.start(first) is not None
    store.broken = True
    assert tracker.start(second) is None
    tracker.hurry()
    handle = tracker.start(second)
    assert handle is not None
    named = [run.info.run_id for run in store.runs.values() if run.info.run_name.endswith(second.name)]
    assert named == [handle.run_id]


@pytest.mark.parametrize("trials", [10, 40])
def test_each_record_is_read_once_and_no_folder_is_listed(
    trials: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = search(tmp_path, trials)
    for job in jobs(trials):
        write_end(folder_of(job_config(config, job)), End("finished", 0.1 + job.index / 100))
    reads: Counter[str] = Counter()
    real = storage.read_bytes

    def reading(path: Any, *limit: Any) -> bytes:
        reads[str(path)] += 1
        return real(path, *limit)

    monkeypatch.setattr(storage, "read_bytes", reading)
    monkeypatch.setattr(storage, "list_names", lambda folder: pytest.fail(f"{folder} is listed"))
    agenda = SearchAgenda(
        [GROUP], config.tune, 0, lambda job: read_end(folder_of(job_config(config, job))), lambda j: 2
    )
    assert agenda.exhausted
    assert [end.score for end in agenda.ends.values()] == [0.1 + index / 100 for index in range(trials)]
    assert len(reads) == trials
    assert set(reads.values()) == {1}


def test_an_interrupted_search_leaves_no_run_running_and_takes_them_up_again(store: Store, tmp_path: Path) -> None:
    def statuses() -> dict[str, str]:
        return {run.info.run_name.split()[-1]: run.info.status for run in store.runs.values()}

    tracker = SearchTracker(search(tmp_path, 3), {})
    ended, under_way, waiting = jobs(3)
    for job in (ended, under_way):
        tracker.start(job)
    tracker.end(ended, End("finished", 0.5))
    tracker.close("KILLED")
    killed = {"tune-search": "KILLED", "100pct": "KILLED", under_way.name: "KILLED"}
    assert statuses() == {**killed, ended.name: "FINISHED"}

    again = SearchTracker(search(tmp_path, 3), {})
    again.start(under_way)
    assert statuses()[under_way.name] == "RUNNING"
    again.end(under_way, End("pruned", 0.1))
    again.close("FINISHED")
    assert statuses() == {
        "tune-search": "FINISHED", "100pct": "FINISHED", under_way.name: "KILLED", ended.name: "FINISHED"
    }  # fmt: skip
    assert waiting.name not in statuses()


def test_a_journal_that_cannot_be_read_costs_a_search_nothing_but_its_mirror(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = search(tmp_path, 1)
    tracker, (job,) = SearchTracker(config, {}), jobs(1)
    tracker.start(job)
    journal = Path(folder_of(job_config(config, job)).file("metrics.jsonl"))
    journal.mkdir()
    assert not tracker.end(job, End("finished", 0.5))
    assert str(journal) in caplog.text
    journal.rmdir()
    again = SearchTracker(config, {})
    assert again.end(job, End("finished", 0.5))
