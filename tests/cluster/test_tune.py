"""The search end to end on a tiny synthetic world, in this process."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tune_cases import COMPARED, one_thread, search_config

from slidr.cli import main
from slidr.cluster import executor, tune
from slidr.cluster.tune import SearchFailed, search
from slidr.config import (
    Config,
    ConfigError,
    SpaceConfig,
    TrackingConfig,
    dump,
)
from slidr.data.frames import FrameTable, write_frames
from slidr.data.nuscenes import read_frames
from slidr.tracking import read_journal, record_config, tracking_uri
from slidr.tracking_models import load_registered
from slidr.tracking_search import read_search
from slidr.training.runs import RunError, identity
from slidr.tuning.proposals import Grid

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def config(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Of a world of its own, as its `val` files are taken away."""
    folder = tmp_path_factory.mktemp("tune")
    shutil.copytree(tiny_world, folder / "world")
    return search_config(folder / "world", folder)


@pytest.fixture(scope="module")
def found(config: Config) -> dict[str, Any]:
    """The search's result. Until its finals are asked for, no file of a `val` sweep can be read."""
    frames = read_frames(config.data.root, "v1.0-trainval")
    hidden = [
        Path(config.data.root, path)
        for frame in frames
        if "val" in frame.splits
        for path in (frame.lidar_path, frame.label_path)
        if path is not None
    ]
    assert hidden
    assert all(path.exists() for path in hidden)
    for path in hidden:
        path.rename(path.with_suffix(".hidden"))
    real, trained = tune.finals, []

    def revealing(*arguments: Any) -> Any:
        trained.extend(Path(config.run.folder).glob("search/*/*/*/end.json"))
        for path in hidden:
            path.with_suffix(".hidden").rename(path)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "finals", revealing)
        result = search(config)
    assert len(trained) == 8, "every trial had ended before a sweep of val could be read"
    return result


def parquet(config: Config) -> list[dict[str, Any]]:
    return pq.read_table(Path(str(config.tune.results), "trials.parquet")).to_pylist()


def test_a_search_that_cannot_read_val_finds_winners_and_scores_each_on_val_once(
    config: Config, found: dict[str, Any]
) -> None:
    rows = parquet(config)
    assert [row["kind"] for row in rows].count("trial") == 8
    assert {row["status"] for row in rows} == {"finished"}
    assert [(entry["fraction"], entry["method"]) for entry in found["table"]] == [
        (0.5, "pretrained"),
        (0.5, "random"),
        (1.0, "pretrained"),
        (1.0, "random"),
    ]
    for entry in found["table"]:
        group = [row for row in rows if (row["fraction"], row["method"]) == (entry["fraction"], entry["method"])]
        trials = [row for row in group if row["kind"] == "trial"]
        best = max(trials, key=lambda row: row["score"])
        last = [row for row in group if row["kind"] == "final"]
        assert entry["winner"]["lr"] == best["lr"]
        assert [(row["lr"], row["seed"]) for row in last] == [(best["lr"], 1)]
        assert entry["scores"] == [row["score"] for row in last]
        evaluations = Path(config.run.folder, "search").glob(
            f"{100 * entry['fraction']:g}pct/{entry['method']}/*-evaluate-*"
        )
        assert len(list(evaluations)) == 1


def test_mlflow_holds_the_tree_with_the_same_numbers_as_the_parquet(config: Config, found: dict[str, Any]) -> None:
    from mlflow import MlflowClient

    assert found["recorded"]
    uri = tracking_uri(config)
    read = read_search(uri, found["mlflow_run_id"])
    assert [{key: row[key] for key in COMPARED} for row in read] == [
        {key: row[key] for key in COMPARED} for row in parquet(config)
    ]
    client = MlflowClient(tracking_uri=uri)
    top = client.get_run(found["mlflow_run_id"])
    assert top.info.status == "FINISHED"
    final = client.get_run(next(row["run_id"] for row in read if row["kind"] == "final"))
    assert {"dataset_fingerprint", "split_manifest_sha256"} <= final.data.tags.keys()
    for row in read:  # only a pretrained student has a parent
        tags = client.get_run(row["run_id"]).data.tags
        assert ("parent_sha256" in tags) == (row["method"] == "pretrained")
    names = {file.path for file in client.list_artifacts(final.info.run_id)}
    assert {"evaluation.json", "confusion.png", "course.png"} <= names


def test_mlflows_own_client_finds_every_job_below_its_fraction_below_the_search(
    config: Config, found: dict[str, Any]
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking_uri(config))

    def below(run_id: str) -> list[Any]:
        experiment = client.get_run(run_id).info.experiment_id
        return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'")

    fractions = {run.data.params["data.train_fraction"]: run for run in below(found["mlflow_run_id"])}
    assert fractions.keys() == {"0.5", "1.0"}
    for fraction, top in fractions.items():
        rows = {
            (row["method"], row["kind"], row["index"]): row
            for row in parquet(config)
            if row["fraction"] == float(fraction)
        }
        runs = {
            (r.data.tags["method"], r.data.tags["kind"], int(r.data.tags["index"])): r for r in below(top.info.run_id)
        }
        assert len(below(top.info.run_id)) == 6
        assert runs.keys() == rows.keys()
        for key, run in runs.items():
            row = rows[key]
            assert run.data.metrics["score"] == row["score"]
            assert run.data.params["optim.lr"] == str(row["lr"])
            assert run.data.params["run.seed"] == str(row["seed"])
            history = client.get_metric_history(run.info.run_id, "val_miou")
            assert [metric.value for metric in sorted(history, key=lambda metric: metric.step)] == row["curve"]
            losses = client.get_metric_history(run.info.run_id, "loss")
            assert sorted(metric.step for metric in losses) == list(range(1, row["steps"] + 1))


def test_the_registered_student_is_the_first_finals(config: Config, found: dict[str, Any]) -> None:
    assert "models:/search-50pct@champion" in found["models"]
    entries = {entry["method"]: entry for entry in found["table"] if entry["fraction"] == 0.5}
    best = max(entries, key=lambda method: entries[method]["search_score"])
    for alias, method in (("pretrained", "pretrained"), ("random", "random"), ("champion", best)):
        student = load_registered(f"models:/search-50pct@{alias}", tracking_uri(config))
        (path,) = Path(config.run.folder, "search/50pct", method).glob("final-of-*-000/student.pt")
        expected = torch.load(path, weights_only=True)["model_points"]
        assert not student.training
        for name, value in student.student.state_dict().items():
            assert torch.equal(value, expected[name]), (alias, name)


def test_a_finished_search_asked_for_again_trains_nothing_and_finds_the_same(
    config: Config, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise AssertionError("an ended job was run again")

    monkeypatch.setattr(executor, "run_job", refuse)
    again = search(config)
    assert again["table"] == found["table"]
    assert again["mlflow_run_id"] == found["mlflow_run_id"]


def test_results_hold_the_table_and_its_pictures(config: Config, found: dict[str, Any]) -> None:
    folder = Path(str(config.tune.results))
    assert json.loads((folder / "table.json").read_text())["table"] == found["table"]
    page = (folder / "table.md").read_text()
    assert f"| {100 * found['table'][0]['mean']:.1f} |" in page
    for name in ("rates.png", "fractions.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_other_values_under_the_same_name_are_refused_by_key(config: Config, found: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"tune\.round_size was 1, now 2.*--fresh"):
        search(replace(config, tune=replace(config.tune, round_size=2)))
    with pytest.raises(RunError, match=r"optim\.epochs was 2, now 3"):
        search(replace(config, optim=replace(config.optim, epochs=3)))


def small(config: Config, name: str, **changes: Any) -> Config:
    """A search of random weights at one fraction: a grid of learning rates, one epoch, one seed."""
    space = SpaceConfig(lr=changes.pop("lr", (1e-2,)))
    wanted = replace(
        config.tune,
        fractions=(1.0,),
        methods=("random",),
        searcher="grid",
        trials=None,
        random=space,
        seeds=1,
        results=str(Path(config.run.folder, f"{name}-results")),
        **changes,
    )
    return replace(
        config,
        run=replace(config.run, name=name),
        optim=replace(config.optim, epochs=1),
        student=replace(config.student, weights=None),
        tune=wanted,
    )


def test_a_diverging_trial_is_recorded_with_its_reason_and_the_search_goes_on(config: Config) -> None:
    result = search(small(config, "partly", lr=(1e-2, 1e30)))
    rows = pq.read_table(result["files"][0]).to_pylist()
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert "the loss is" in rows[1]["reason"]
    assert rows[1]["score"] is None
    assert result["table"][0]["trials"] == {"finished": 1, "pruned": 0, "failed": 1}


def test_a_search_whose_every_trial_failed_says_why_and_fails_and_fresh_starts_anew(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump(small(config, "doomed", lr=(1e29, 1e30))))
    assert main(["tune", str(path)]) == 1
    assert "all 2 trials failed" in capsys.readouterr().err
    folder = Path(config.run.folder, "doomed")
    assert json.loads((folder / "100pct/random/trial-001/end.json").read_text())["status"] == "failed"
    path.write_text(dump(small(config, "doomed")))
    assert main(["tune", str(path)]) == 1
    assert "tune.random" in capsys.readouterr().err
    known = json.loads((folder / "search.json").read_text())
    (folder / "search.json").write_text(json.dumps({**known, "tune": {}}))  # as of a version without these options
    assert main(["tune", str(path)]) == 1
    assert "tune.max_loss was unknown, now 100.0" in capsys.readouterr().err
    results = Path(config.run.folder, "doomed-results")
    results.mkdir()
    (results / "table.md").write_text("the old one's")
    (results / "notes.txt").write_text("somebody's")
    assert main(["tune", str(path), "--fresh"]) == 0
    (aside,) = results.parent.glob("doomed-results.before-*")
    assert [file.name for file in aside.iterdir()] == ["table.md"]
    assert (results / "notes.txt").read_text() == "somebody's"
    assert json.loads((folder / "100pct/random/trial-000/end.json").read_text())["status"] == "finished"
    assert len(list(folder.parent.glob("doomed.before-*"))) == 1


def test_a_store_that_is_away_stops_nothing_and_is_sent_everything_later(config: Config) -> None:
    away = replace(small(config, "alone"), tracking=TrackingConfig(uri="http://127.0.0.1:9"))
    result = search(away)
    assert not result["recorded"]
    assert result["table"][0]["mean"] is not None
    later = search(replace(away, tracking=TrackingConfig()))
    assert later["recorded"]
    assert later["table"] == result["table"]
    rows = pq.read_table(later["files"][0]).to_pylist()
    read = read_search(tracking_uri(config), later["mlflow_run_id"])
    assert [{key: row[key] for key in COMPARED} for row in read] == [
        {key: row[key] for key in COMPARED} for row in rows
    ]


def test_a_search_that_grew_and_has_another_winner_trains_and_shows_the_new_ones_finals(config: Config) -> None:
    one = small(config, "grows", lr=(1e-3, 1e-2))
    one = replace(one, tune=replace(one.tune, searcher="random", trials=1, round_size=1))
    first = search(one)
    # The second trial wins, whatever it reaches: the first one's record is made worse.
    folder = Path(config.run.folder, "grows/100pct/random")
    record = json.loads((folder / "trial-000/end.json").read_text())
    (folder / "trial-000/end.json").write_text(json.dumps({**record, "score": 0.0}))
    grown = search(replace(one, tune=replace(one.tune, trials=2)))
    winner = grown["table"][0]["winner"]
    assert winner["index"] == 1
    assert winner["lr"] != first["table"][0]["winner"]["lr"]
    last = [row for row in pq.read_table(grown["files"][0]).to_pylist() if row["kind"] == "final"]
    assert [row["lr"] for row in last] == [winner["lr"]]
    students = sorted(path.parent.name for path in folder.glob("final-*/student.pt"))
    assert students == ["final-of-000-000", "final-of-001-000"]


def test_a_search_that_grew_by_a_fraction_and_a_seed_keeps_what_there_was(config: Config) -> None:
    one = small(config, "wider")
    first = search(one)
    folder = Path(config.run.folder, "wider")
    kept = {path: path.stat() for path in folder.glob("*/*/*/end.json")}
    assert len(kept) == 2
    search(replace(one, tune=replace(one.tune, fractions=(0.5, 1.0), seeds=2)))
    for path, before in kept.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    rows = pq.read_table(first["files"][0]).to_pylist()
    assert [(row["fraction"], row["kind"], row["seed"]) for row in rows] == [
        (fraction, kind, seed) for fraction in (0.5, 1.0) for kind, seed in (("trial", 0), ("final", 1), ("final", 2))
    ]
    read = read_search(tracking_uri(config), (folder / "mlflow_run_id").read_text())
    assert [{key: row[key] for key in COMPARED} for row in read] == [
        {key: row[key] for key in COMPARED} for row in rows
    ]


def test_a_record_of_other_values_than_are_proposed_is_refused_and_not_relabelled(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = small(config, "relabelled", lr=(1e-3,))
    search(one)
    propose = Grid.propose
    monkeypatch.setattr(Grid, "propose", lambda self, count: [{"lr": 2 * v["lr"]} for v in propose(self, count)])
    with pytest.raises(RunError, match=r"trial-000 was trained with other values .*optim\.lr was 0\.001, now 0\.002"):
        search(one)


def test_a_run_that_a_kill_left_without_parameters_gets_them_from_the_next_process(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, calls = small(config, "half-made"), []

    def killed(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 3:  # the search's, the fraction's, the first trial's
            raise KeyboardInterrupt
        record_config(*arguments)

    monkeypatch.setattr("slidr.tracking.record_config", killed)
    with pytest.raises(KeyboardInterrupt):
        search(one)
    monkeypatch.undo()
    assert not Path(config.run.folder, "half-made/100pct/random/trial-000/mlflow_run_id").exists()
    result = search(one)
    read = read_search(tracking_uri(config), result["mlflow_run_id"])
    assert [(row["kind"], row["lr"]) for row in read] == [("trial", 1e-2), ("final", 1e-2)]


def test_a_search_mended_before_its_first_checkpoint_leaves_nothing_of_the_mistake(config: Config) -> None:
    wrong = small(config, "typo", lr=(5.0,))
    path = Path(config.run.folder, "typo/100pct/random/trial-000")
    path.mkdir(parents=True)
    (path.parents[2] / "search.json").write_text(json.dumps({"config": identity(wrong), "tune": {}}))
    (path / "metrics.jsonl").write_text('{"step": 1, "time_ms": 1, "metrics": {"mistake": 1.0}}\n')
    search(small(config, "typo"))
    journal = read_journal(path / "metrics.jsonl")
    assert journal
    assert not any("mistake" in metrics for metrics in journal.values())
    assert len(list(path.parents[3].glob("typo.before-*"))) == 1


def test_finals_that_all_fail_are_an_error_and_not_a_table_of_dashes(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise ValueError("no such class")

    monkeypatch.setattr("slidr.cluster.trial._final", broken)
    with pytest.raises(SearchFailed, match="all 1 finals failed: 1 x ValueError: no such class"):
        search(small(config, "dashes"))


def test_a_final_split_without_labels_is_refused_before_anything_is_trained(config: Config, tmp_path: Path) -> None:
    table = FrameTable.open(config.data.frames)
    frames = [replace(frame, label_path=None) if "val" in frame.splits else frame for frame in table]
    path = str(tmp_path / "frames.parquet")
    write_frames(frames, path)
    with pytest.raises(ConfigError, match=r"tune: 2 of 2 frames of val .* have no point labels"):
        search(replace(small(config, "blind"), data=replace(config.data, frames=path)))
    assert not Path(config.run.folder, "blind").exists()


def test_a_run_whose_id_was_not_noted_is_found_again_in_the_store(config: Config, found: dict[str, Any]) -> None:
    folder = Path(config.run.folder, "search/50pct/random/trial-000")
    before = (folder / "mlflow_run_id").read_text()
    (folder / "mlflow_run_id").unlink()
    search(config)
    assert (folder / "mlflow_run_id").read_text() == before
    assert len(read_search(tracking_uri(config), found["mlflow_run_id"])) == len(parquet(config))


def test_what_cannot_be_searched_is_refused_before_anything_is_trained(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"student\.weights: .*pretrained"):
        search(replace(config, student=replace(config.student, weights=None)))
    with pytest.raises(ConfigError, match=r"tune\.final_split: got verify"):
        search(replace(config, tune=replace(config.tune, final_split="verify")))
    with pytest.raises(ConfigError, match=r"tune: all and val share \d+ frames"):
        search(replace(config, tune=replace(config.tune, final_train_split="all")))
    with pytest.raises(ConfigError, match=r"optim\.batch_size of 64"):
        search(replace(small(config, "huge"), optim=replace(config.optim, batch_size=64)))
    assert not Path(config.run.folder, "huge").exists()
