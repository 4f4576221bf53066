"""A search's own record when it is damaged: named, with a way on; and the pictures that cost no result."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from slidr.cluster import tune
from slidr.cluster.search_records import claim_search
from slidr.config import Config, RunConfig, TuneConfig
from slidr.data.labels import CLASSES
from slidr.data.storage import DataError
from slidr.training.runs import RunError, folder_of
from slidr.tuning.jobs import End, Group, Job, job_config, write_end

TAGS = {"dataset_fingerprint": "0a", "split_manifest_sha256": "1b"}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A search that has been claimed, and has an ended trial."""
    config = Config(
        run=RunConfig(folder=str(tmp_path), name="search"),
        tune=TuneConfig(results=str(tmp_path / "results")),
    )
    claim_search(config, TAGS)
    write_end(folder_of(job_config(config, Job(Group(1.0, "random"), "trial", 0, {}))), End("finished", 0.5))
    return config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not readable JSON"),
        ('{"config": "', "not readable JSON"),
        ("[" * 100_000, "nested too deeply|not readable JSON"),
        ("\xff", "not readable JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "key 'config' is missing"),
        ('{"config": 3, "tune": {}}', "config: expected str, got 3"),
        ('{"config": "a", "tune": []}', "tune: expected dict"),
        ('{"config": "a", "tune": {}, "dataset_fingerprint": NaN}', "dataset_fingerprint: expected str, got nan"),
    ],
)
def test_a_damaged_search_json_is_named_and_fresh_sets_it_aside(
    config: Config, tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "search" / "search.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=says) as refused:
        claim_search(config, TAGS)
    assert str(refused.value).startswith(f"{path}: ")
    assert "remove it to go on with the present values" in str(refused.value)
    assert "--fresh" in str(refused.value)
    assert path.read_text(encoding="latin-1") == text, "nothing is lost"
    claim_search(replace(config, tune=replace(config.tune, fresh=True)), TAGS)
    (aside,) = tmp_path.glob("search.before-*")
    assert (aside / "search.json").read_text(encoding="latin-1") == text
    assert json.loads(path.read_text())["dataset_fingerprint"] == "0a"


def test_without_its_search_json_a_search_goes_on_with_what_it_has(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "search" / "search.json"
    whole = path.read_text()
    path.unlink()
    claim_search(config, TAGS)
    assert path.read_text() == whole
    assert len(list(tmp_path.glob("search/*/*/*/end.json"))) == 1


def test_a_damaged_config_beside_a_changed_search_is_named(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "search" / "config.yaml"
    other = replace(config, optim=replace(config.optim, weight_decay=0.5))
    with pytest.raises(RunError, match=r"holds a search with other values: optim\.weight_decay was"):
        claim_search(other, TAGS)
    for damaged in (b"\xff\xfe\x00", b"optim: [", b"3", b""):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"--fresh \(what is there is set aside\)") as refused:
            claim_search(other, TAGS)
        assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"confusion": 3}', '{"confusion": [[1]]}', '{"confusion": [["a"]]}', "[" * 100_000]
)
def test_a_damaged_evaluation_costs_its_picture_and_nothing_else(
    config: Config, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(Group(1.0, "random"), "final", 0, {}, winner=0)
    folder = Path(folder_of(job_config(config, job)).path)
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(text)
    (folder / "metrics.jsonl").write_text('{"step": 1, "time_ms": 1, "metrics": {"loss": 1.0, "val_miou": 0.5}}\n')
    with caplog.at_level(logging.WARNING):
        files = tune._pictures(config, job)
    assert [Path(file).name for file in files] == ["evaluation.json", "course.png"]
    (message,) = caplog.messages
    assert f"{folder}/confusion.png is not drawn ({folder}/evaluation.json: " in message
    size = len(CLASSES[config.data.dataset])
    (folder / "evaluation.json").write_text(json.dumps({"confusion": [[1] * size] * size}))
    assert f"{folder}/confusion.png" in tune._pictures(config, job)
