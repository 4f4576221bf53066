"""The command line: what it prints, what it refuses, how it ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from slidr import cli
from slidr.cli import COMMANDS, main, override, usage
from slidr.config import Config, TeacherConfig, load

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == usage()
    for name in (*COMMANDS, "synthesize"):
        assert f"  {name} " in printed


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    usage_line = f"usage: slidr {name} CONFIG" + (" --checkpoint PATH" if name == "evaluate" else "")
    assert usage_line in capsys.readouterr().out
    assert main([name]) == 2
    with pytest.raises(SystemExit) as ended:
        main([name, str(DEMO), "--help"])
    assert ended.value.code == 0
    assert "--optim.lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "option"), [("synthesize", "--scale"), ("synthesize", "--keyframes"), ("export", "--format")]
)
def test_commands_without_a_config_list_their_options(
    name: str, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert option in capsys.readouterr().out
    assert main([name]) == 2


def test_an_empty_config_is_called_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert main(["frames", str(tmp_path / "empty.yaml")]) == 1
    assert "the file is empty" in capsys.readouterr().err


def test_an_unknown_command_or_option_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distil", "x.yaml"]) == 2
    assert "unknown command 'distil'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["pretrain", str(DEMO), "--optim.learning_rate", "1"])
    assert ended.value.code == 2


def test_a_missing_config_file_is_named_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frames", "nowhere.yaml"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("slidr frames: nowhere.yaml")
    assert "Traceback" not in message


def test_a_missing_dataroot_is_named_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frames", str(DEMO), "--data.root", str(tmp_path / "none")]) == 1
    message = capsys.readouterr().err
    assert str(tmp_path / "none") in message
    assert "Traceback" not in message


def test_booleans_and_null_are_spelled_as_in_yaml() -> None:
    base = Config()
    assert override(base, ["--run.resume"]).run.resume
    assert override(base, ["--run.resume", "true"]).run.resume
    on = override(base, ["--cluster.use_gpu", "True"])
    assert on.cluster.use_gpu
    assert not override(on, ["--cluster.use_gpu", "false", "--optim.lr", "0.3"]).cluster.use_gpu
    assert override(base, ["--teacher.weights", "null"]).teacher == TeacherConfig(weights=None)


def test_tuples_are_overridden_whole() -> None:
    changed = override(load(DEMO), ["--data.voxel.size", "0.2", "2", "0.2"])
    assert changed.data.voxel.size == (0.2, 2.0, 0.2)
    assert changed.data.cameras == load(DEMO).data.cameras


def test_sigterm_is_told_at_once_and_ends_a_command_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[str] = []

    def work(name: str, rest: list[str]) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            ended.append(capsys.readouterr().err)
        raise AssertionError("nothing ended it")

    monkeypatch.setattr(cli, "_dispatch", work)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["pretrain", "any.yaml"]) == 143
    assert ended == ["slidr: stopped by SIGTERM; the same command with --run.resume goes on\n"]
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGTERM) is before
