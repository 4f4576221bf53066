"""What a user writes for a file or folder: `~` and file:// mean the same in every key, option and argument."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from config_keys import TEXTS, Key
from hypothesis import given
from hypothesis import strategies as st

from slidr.cli import main, override
from slidr.cluster.train import with_absolute_paths
from slidr.cluster.tune import results_folder
from slidr.config import Config, ConfigError, absolute_path, decode, fingerprint, load, parse, user_path
from slidr.data import storage
from slidr.training.runs import folder_of, identity

# Every text key is a path or named here: a new one has to say which it is.
NOT_PATHS = {"data.cameras", "teacher.sha256", "run.name", "cluster.address", "tracking.experiment", "tracking.uri"}
PATHS = [key for key in TEXTS if key.name not in NOT_PATHS]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, and a working folder beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def value_of(config: Any, key: Key) -> Any:
    for part in key.name.split("."):
        config = getattr(config, part)
    return config


def test_the_path_keys_are_those_of_the_schema() -> None:
    assert {key.name for key in PATHS} == {
        "data.root",
        "data.frames",
        "superpixels.folder",
        "student.weights",
        "teacher.weights",
        "evaluation.checkpoint",
        "evaluation.submission",
        "run.folder",
        "tune.results",
    }


@pytest.mark.parametrize("key", PATHS, ids=lambda key: key.name)
def test_every_path_key_takes_a_home_and_a_file_uri(key: Key, home: Path) -> None:
    for written, used in (
        ("~/my data/a", f"{home}/my data/a"),
        ("~", str(home)),
        ("file:///data/my%20logs/100%25", "/data/my logs/100%"),
        ("file://localhost/data/a#1?b", "/data/a#1?b"),
        ("file:/data/a", "/data/a"),
        ("/data/~/a%20b", "/data/~/a%20b"),
        ("a/~b", "a/~b"),
        ("moco_v2", "moco_v2"),
    ):
        assert value_of(decode(key.raw(written)), key) == used
        assert value_of(override(Config(), [f"--{key.name}={written}"]), key) == used


@pytest.mark.parametrize("key", PATHS, ids=lambda key: key.name)
def test_every_path_key_leaves_uris_of_other_storages_alone(key: Key) -> None:
    for uri in ("s3://bucket/~/a%20b?endpoint_override=127.0.0.1:9000&scheme=http", "https://host/~user/a.pt?sig=%2F"):
        raw = key.raw(uri) | {"tracking": {"uri": "http://127.0.0.1:5000"}}
        assert value_of(decode(raw), key) == uri


@pytest.mark.parametrize("key", PATHS, ids=lambda key: key.name)
@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("file://machine/data", ["names the machine 'machine'", "file:///machine/data"]),
        ("~nobody-of-that-name/data", ["no user 'nobody-of-that-name'", "./~nobody"]),
        ("data\0root", ["zero byte"]),
    ],
    ids=["another machine", "unknown user", "zero byte"],
)
def test_what_no_path_can_be_is_refused_by_key(key: Key, written: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        decode(key.raw(written), "file.yaml")
    assert str(caught.value).startswith(f"file.yaml: {key.name}: ")
    for word in words:
        assert word in str(caught.value)


def test_the_tracking_files_path_is_expanded_and_other_tracking_uris_are_mlflows(home: Path) -> None:
    for written, used in (
        ("sqlite:///~/mlflow.db", f"sqlite:///{home}/mlflow.db"),
        ("sqlite:////abs/a%20b.db", "sqlite:////abs/a%20b.db"),
        ("sqlite:///relative.db", "sqlite:///relative.db"),
        ("~/mlruns", f"{home}/mlruns"),
        ("http://host:5000/~me", "http://host:5000/~me"),
        ("databricks", "databricks"),
    ):
        assert decode({"tracking": {"uri": written}}).tracking.uri == used


@given(st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=30))
def test_a_path_that_is_used_is_not_changed_again(text: str) -> None:
    try:
        once = user_path(text)
    except ValueError:
        return
    assert user_path(once) == once
    assert absolute_path(absolute_path(text)) == absolute_path(text)


def test_a_config_made_in_python_leads_to_the_same_folders(home: Path) -> None:
    written = Config(
        data=replace(Config().data, root="~/nuscenes", frames="file:///f%20r/a.parquet"),
        run=replace(Config().run, folder="~/runs"),
        tune=replace(Config().tune, results="~/results"),
    )
    used = with_absolute_paths(written)
    assert used.data.root == f"{home}/nuscenes"
    assert used.data.frames == "/f r/a.parquet"
    assert folder_of(used).path == f"{home}/runs/slidr_minkunet"
    assert results_folder(written).path == f"{home}/results"


def test_runs_keep_their_identity_and_superpixels_their_folder() -> None:
    # As computed before paths were rewritten.
    assert (fingerprint(Config()), identity(Config())) == ("6d818c2dec", "6f58c4f9a0")
    for folder in ("file:///x/runs", "~/runs", "/x/runs"):
        assert identity(decode({"run": {"folder": folder}})) == "6f58c4f9a0"
    assert identity(parse("student: {weights: /x/student.pt}")) == identity(
        parse("student: {weights: 'file:///x/student.pt'}")
    )


def test_storage_reads_a_file_uri_as_the_config_does(tmp_path: Path) -> None:
    file = tmp_path / "a b%"
    file.write_bytes(b"x")
    assert storage.read_bytes(file.as_uri()) == b"x"
    assert storage.join(tmp_path.as_uri() + "/a%20b%25", "c%20d") == f"{tmp_path}/a b%/c%20d"


def test_the_commands_write_where_the_user_says(
    home: Path, tiny_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(__file__).parents[1] / "configs/demo.yaml"
    os.symlink(tiny_world, home / "my world")
    (home / "demo.yaml").write_text(config.read_text())
    words = ["--data.root=~/my world", f"--data.frames={(home / 'my frames.parquet').as_uri()}"]
    assert main(["frames", "~/demo.yaml", *words]) == 0, capsys.readouterr().err
    assert (home / "my frames.parquet").is_file()
    out = (home / "my export.safetensors").as_uri()
    assert main(["export", "~/no checkpoint.pt", "--format", "safetensors", "--out", out]) == 1
    assert str(home / "no checkpoint.pt") in capsys.readouterr().err
    assert main(["plan", "~/demo.yaml", *words, "--nodes", "1", "--costs", "file://other/costs.json"]) == 1
    assert re.search(r"command line: file://other/costs.json: names the machine", capsys.readouterr().err)
    assert main(["synthesize", "~nobody-of-that-name/world"]) == 1
    assert list(Path.cwd().iterdir()) == []
    assert load("file://" + str(home / "demo.yaml").replace(" ", "%20")) == load(config)
