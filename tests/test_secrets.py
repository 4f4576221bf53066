"""No secret of a URL gets out: of any key, in what any command prints, logs, writes or records."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import yaml
from config_keys import TEXTS, Key

import slidr
from slidr import cli
from slidr.cluster.pretrain import pretrain
from slidr.config import Config, to_dict
from slidr.data import storage
from slidr.preflight import machine
from slidr.preflight.findings import Finding
from slidr.stages import export_student
from slidr.urls import RedactedError, redacting_logger

SECRET = "PlantedSecret123"
COMMANDS = ("frames", "superpixels", "pretrain", "finetune", "evaluate", "tune", "plan", "doctor")


def planted(bucket: str) -> tuple[str, str]:
    """A URI of an object store that answers, and one of a server that does not; each holds the secret twice."""
    store = bucket.replace("s3://", f"s3://AKIA{SECRET}:{SECRET}%2F@")
    return store.replace("/data?", "/planted/file?"), f"https://someone:{SECRET}@127.0.0.1:9/file.pt?token={SECRET}"


def lists(key: Key) -> bool:
    return "tuple" in str(key.hint)


def test_every_error_and_every_logger_of_the_package_redacts() -> None:
    names = [module.name for module in pkgutil.walk_packages(slidr.__path__, "slidr.")]
    errors: set[Any] = set()
    for name in names:
        if name == "slidr.__main__" or "triton" in name:
            continue
        module = importlib.import_module(name)
        errors |= {c for _, c in inspect.getmembers(module, inspect.isclass) if issubclass(c, Exception)}
    sources = {path: path.read_text() for path in Path(slidr.__path__[0]).rglob("*.py")}
    assert [str(path) for path, source in sources.items() if "logging.getLogger(__name__)" in source] == []
    ours = {error for error in errors if error.__module__.startswith("slidr.")}
    assert len(ours) > 15
    assert [error for error in ours if not issubclass(error, RedactedError)] == []
    for error in ours - {RedactedError}:
        if error.__name__ not in ("TrackingError",):
            assert SECRET not in str(error(f"s3://KEY:{SECRET}@bucket/file: cannot be read"))


def test_a_log_line_shows_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    redacting_logger("slidr.of_a_test").warning("%s: cannot be read", f"s3://KEY:{SECRET}@bucket/file")
    assert caplog.messages == ["s3://bucket/file: cannot be read"]


def tell(config: dict[str, Any], command: str, folder: Path, more: tuple[str, ...] = ()) -> int:
    (folder / "config.yaml").write_text(yaml.dump(config))
    try:
        return cli.main([command, str(folder / "config.yaml"), *more])
    except SystemExit as error:  # wrong usage
        return int(error.code or 0)


def leaks(folder: Path, shown: str, log: str) -> list[str]:
    files = [str(path) for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    return [*(["output"] if SECRET in shown else []), *(["log"] if SECRET in log else []), *files]


@pytest.mark.parametrize("key", [key for key in TEXTS if not lists(key)], ids=lambda key: key.name)
def test_a_secret_in_any_key_stays_secret(
    key: Key,
    bucket: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(machine, "cluster", lambda config, search: Finding("cluster", "ok", "not asked"))
    (tmp_path / "given").mkdir()
    for uri in planted(bucket):
        for command in ("pretrain", "doctor"):
            statuses = [
                tell(key.raw(uri), command, tmp_path / "given"),
                tell({}, command, tmp_path / "given", (f"--{key.name}", uri)),
            ]
            assert set(statuses) <= {0, 1, 2}, statuses
    shutil.rmtree(tmp_path / "given")
    captured = capfd.readouterr()
    assert captured.out + captured.err
    assert leaks(tmp_path, captured.out + captured.err, caplog.text) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_secrets_in_all_keys_at_once_stay_secret_in_every_command(
    command: str,
    bucket: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setattr(machine, "cluster", lambda config, search: Finding("cluster", "ok", "not asked"))
    (tmp_path / "given").mkdir()
    store, web = planted(bucket)
    raw: dict[str, Any] = {"student": {"weights": web}, "teacher": {"weights": web}, "tracking": {"uri": web}}
    raw |= {"data": {"root": store, "frames": store}, "superpixels": {"folder": store}, "run": {"folder": store}}
    raw |= {"evaluation": {"checkpoint": web}, "tune": {"results": store}}
    statuses = [tell(raw, command, tmp_path / "given", more) for more in ((), ("--help",), ("--data.rot", store))]
    assert statuses[1:] == [0, 2]
    shutil.rmtree(tmp_path / "given")
    captured = capfd.readouterr()
    assert captured.out + captured.err
    assert leaks(tmp_path, captured.out + captured.err, caplog.text) == []


@pytest.mark.parametrize("which", [0, 1])
def test_an_exported_checkpoints_secret_stays_secret(
    which: int, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    uri = planted(bucket)[which]
    assert cli.main(["export", uri, "--format", "slidr", "--out", str(tmp_path / "out.pt")]) == 1
    captured = capfd.readouterr()
    assert leaks(tmp_path, captured.out + captured.err, "") == []


def test_an_unforeseen_error_shows_its_traceback_without_secrets(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(config: Config) -> None:
        raise KeyError(f"s3://KEY:{SECRET}@bucket/file")

    monkeypatch.setitem(cli.COMMANDS, "frames", cli.Command("", fail))
    assert tell({}, "frames", tmp_path) == 1
    shown = capfd.readouterr().err
    assert "KeyError: 's3://bucket/file'" in shown
    assert SECRET not in shown


def test_a_run_that_ends_well_leaves_no_secret_and_its_paths_still_lead_to_its_files(
    trainable: Config, bucket: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "slidr")
    runs = planted(bucket)[0].replace("/planted/file?", "/planted/runs?")
    config = replace(
        trainable,
        run=replace(trainable.run, folder=runs, name="kept"),
        tracking=replace(trainable.tracking, uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    result = pretrain(config)
    again = pretrain(replace(config, run=replace(config.run, resume=True)))
    assert again == result
    assert SECRET in result["student"], "the caller's own path, which leads to the file"
    path = export_student(result["student"], "safetensors", tmp_path / "student.safetensors")
    assert Path(path).stat().st_size > 0
    captured = capfd.readouterr()
    assert leaks(tmp_path, captured.out + captured.err, caplog.text) == []
    filesystem, key = storage.filesystem(storage.join(runs, "kept"))
    assert filesystem is not None
    files = [f for f in filesystem.get_file_info(pyarrow.fs.FileSelector(key, recursive=True)) if f.is_file]
    assert len(files) > 5
    for file in files:
        with filesystem.open_input_file(file.path) as opened:
            assert SECRET.encode() not in opened.read(), file.path
    assert to_dict(config)["run"]["folder"] == runs
