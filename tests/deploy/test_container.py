"""The Dockerfile builds the same environment as the Makefile, from the lock file, of files that are there."""

from __future__ import annotations

import fnmatch
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from slidr.cli import COMMANDS, OTHERS

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("container_steps", ROOT / "tools" / "container_steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps(tool: ModuleType) -> list[tuple[str, str]]:
    return tool.steps(DOCKERFILE)


def pip_installs(text: str) -> list[str]:
    """What pip is told to install, without options on how it talks and caches."""
    found = re.findall(r"pip install ((?:--?[\w-]+ |\S+ ?)+)", text)
    return [re.sub(r"--(quiet|no-cache-dir) ", "", line).strip() for line in found]


def test_the_image_installs_what_make_install_does(steps: list[tuple[str, str]]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    (rule,) = re.findall(r"^\$\(VENV\)/\.installed:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    ours = [line for word, rest in steps if word == "RUN" for line in pip_installs(rest)]
    assert ours == pip_installs(rule) == ["--requirement requirements.lock", "--no-deps --editable ."]


def test_python_is_one_that_the_project_takes(steps: list[tuple[str, str]]) -> None:
    (image,) = [rest for word, rest in steps if word == "FROM"]
    assert re.match(r"python:3\.1[12]-slim", image)
    assert 'requires-python = ">=3.11,<3.13"' in (ROOT / "pyproject.toml").read_text()


def test_everything_is_copied_before_it_is_used_and_let_through_to_the_build(steps: list[tuple[str, str]]) -> None:
    order = [f"{word} {rest}" for word, rest in steps]
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    for source in copied:
        assert (ROOT / source).exists()
        assert f"!{source}" in ignored
    assert not [name for name in (".git", ".venv", "data", "runs") if any(fnmatch.fnmatch(name, c) for c in copied)]
    lock, install = (next(i for i, line in enumerate(order) if text in line) for text in ("COPY req", "--requirement"))
    package, editable = (next(i for i, line in enumerate(order) if text in line) for text in ("COPY slidr", "editable"))
    assert lock < install < package < editable


def test_the_image_is_not_roots_and_asks_for_a_token(steps: list[tuple[str, str]]) -> None:
    assert [rest for word, rest in steps if word == "USER"] == ["ray"]
    environment = " ".join(rest for word, rest in steps if word == "ENV").split()
    assert {"RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= set(environment)


def test_the_dry_run_joins_lines_and_leaves_comments_out(tool: ModuleType) -> None:
    assert tool.steps("# a\nFROM x\nRUN a && \\\n    b\n\n# c\nUSER u\n") == [
        ("FROM", "x"),
        ("RUN", "a &&      b"),
        ("USER", "u"),
    ]


def test_what_is_tried_in_the_image_are_commands_and_files_that_there_are(tool: ModuleType) -> None:
    commands = [shlex.split(trial) for trial in tool.TRIALS]
    for program, what, *rest in commands:
        assert (program == "slidr" and what in (*COMMANDS, *OTHERS)) or (program == "python" and (ROOT / what).exists())
        assert all((ROOT / word).exists() for word in rest if word.endswith(".yaml"))
