"""Numbers in a config: every key refuses what is not a number of its range, however the config is given."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import yaml
from config_keys import NUMBERS, Key

from slidr.cli import main, override
from slidr.config import Config, ConfigError, check, decode, parse
from slidr.data.plan import epoch_order
from slidr.data.samples import sample_rng
from slidr.training.loop import _step_seed
from slidr.tuning.jobs import Group, Job, job_config
from slidr.tuning.proposals import PROPOSERS, build_proposer

# No key takes a negative number; 2**70 is a fine float.
NONSENSE = [
    pytest.param(key, value, id=f"{key.name} {value}")
    for key in NUMBERS
    for value in (math.nan, math.inf, -math.inf, -1, *([2**70] if int in key.types else []))
]


def test_the_walk_over_the_schema_finds_its_numbers() -> None:
    names = {key.name for key in NUMBERS}
    assert len(names) > 70
    assert {"optim.lr", "data.voxel.size", "run.seed", "cluster.num_workers", "tune.pretrained.epochs"} <= names
    assert not names & {"run.resume", "run.name", "data.cameras"}


@pytest.mark.parametrize("key", NUMBERS, ids=lambda key: key.name)
def test_every_number_has_a_range_beside_its_key(key: Key) -> None:
    hint = get_type_hints(key.section, include_extras=True)[key.name.rpartition(".")[2]]
    assert "Limits(" in repr(hint), f"{key.name}: give it a range, such as Count or Positive"


@pytest.mark.parametrize(("key", "value"), NONSENSE)
def test_a_number_out_of_its_range_is_refused_by_key_in_yaml_and_checkpoints(key: Key, value: float) -> None:
    raw = key.raw(value)
    with pytest.raises(ConfigError, match=re.escape(key.name)):
        decode(raw, "checkpoint.pt")
    with pytest.raises(ConfigError, match=re.escape(f"file.yaml: {key.name}")):
        parse(yaml.safe_dump(raw), "file.yaml")


@pytest.mark.parametrize("key", [key for key in NUMBERS if key.hint in (int, float)], ids=lambda key: key.name)
def test_a_config_made_in_python_is_checked_by_the_same_rule(key: Key) -> None:
    *sections, name = key.name.split(".")
    config: Any = Config()
    chain = [config := getattr(config, section) for section in sections]
    for value in (-1, 2**64) if key.hint is int else (-1.0, math.nan, math.inf):
        _require_refusal(key, value, sections, name, chain)


def _require_refusal(key: Key, value: float, sections: list[str], name: str, chain: list[Any]) -> None:
    changed = replace(chain[-1], **{name: value})
    for section, outer in zip(reversed(sections), [*reversed(chain[:-1]), Config()], strict=True):
        changed = replace(outer, **{section: changed})
    with pytest.raises(ConfigError, match=re.escape(key.name)):
        check(changed)


@pytest.mark.parametrize(
    "words",
    [
        ["--optim.lr", "nan"],
        ["--optim.lr", "1e999"],
        ["--data.min_depth", "-5"],
        ["--data.min_depth", "nan"],
        ["--student.bn_momentum", "-5"],
        ["--tracking.ui_port", "-1"],
        ["--tracking.ui_port", "65536"],
        ["--optim.epochs", str(2**63)],
        ["--run.seed", str(2**63)],
        ["--run.seed", "-1"],
        ["--data.voxel.size", "0.1", "nan", "0.1"],
        ["--cluster.num_workers", "1", str(2**70)],
        ["--tune.pretrained.lr", "0.1", "inf"],
    ],
    ids=lambda words: " ".join(words),
)
def test_the_command_line_is_checked_by_the_same_rule(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=re.escape("command line: " + words[0].removeprefix("--"))):
        override(Config(), words)


def test_a_trials_values_are_checked_by_the_same_rule() -> None:
    for values in ({"lr": math.nan}, {"epochs": 0}, {"batch_size": 2**70}):
        with pytest.raises(ConfigError, match=rf"random/trial-003: optim\.{next(iter(values))}: got"):
            job_config(Config(), Job(Group(0.01, "random"), "trial", 3, values))


def test_messages_say_what_was_got_and_what_is_expected() -> None:
    def message(raw: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            decode(raw, "f")
        return str(caught.value)

    assert message({"optim": {"lr": math.nan}}) == "f: optim.lr: got nan, expected a finite number, a positive number"
    assert message({"student": {"bn_momentum": -5}}) == (
        "f: student.bn_momentum: got -5.0, expected at least 0 and at most 1"
    )
    assert (
        message({"tracking": {"ui_port": -1}}) == "f: tracking.ui_port: got -1, expected at least 1 and at most 65535"
    )
    assert message({"run": {"seed": 2**70}}).startswith("f: run.seed: got a whole number of 71 bits, expected ")
    both = message({"optim": {"lr": 0.0}, "run": {"seed": -1}})
    assert "optim.lr" in both
    assert "run.seed" in both


def test_commands_with_options_of_their_own_check_numbers_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["synthesize", str(tmp_path / "world"), "--seed", "-1"]) == 1
    assert main(["synthesize", str(tmp_path / "world"), "--scale", "nan"]) == 1
    assert main(["plan", "configs/demo.yaml", "--nodes", str(2**70)]) == 1
    errors = capsys.readouterr().err
    assert "--seed: got -1" in errors
    assert "--scale: got nan" in errors
    assert "--nodes: got a whole number of 71 bits" in errors
    assert not (tmp_path / "world").exists()


# ------------------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize("seed", [20261128120000, 2**63 - 1])
def test_every_seed_that_the_config_takes_seeds_every_generator(seed: int) -> None:
    config = decode({"run": {"seed": seed}})
    torch.manual_seed(config.run.seed)
    assert sorted(epoch_order(5, seed, 10**6)) == list(range(5))
    assert sample_rng(seed, 3, "token").random() != sample_rng(seed - 1, 3, "token").random()
    for step in (0, 1, 10**9):
        torch.manual_seed(_step_seed(seed, step))
    assert len({_step_seed(seed, step) for step in range(1000)}) == 1000
    for searcher in PROPOSERS:
        assert build_proposer(searcher, config.tune.pretrained, seed, Group(1.0, "pretrained")).propose(1)
    final = job_config(config, Job(Group(1.0, "random"), "final", 2, {}))
    check(final)
    assert np.int64(final.run.seed) == (seed + 3) % 2**63


def test_the_seeds_of_steps_are_those_that_runs_have_always_had() -> None:
    for seed in (0, 1, 7, 12345, 10**9):
        for step in (0, 1, 500, 10**7):
            assert _step_seed(seed, step) == seed * 1_000_003 + step


# ------------------------------------------------------------------------------------------------- keys given twice


def test_a_key_or_section_given_twice_is_refused_with_both_lines() -> None:
    text = "optim:\n  lr: 0.1\n  epochs: 3\n  lr: 0.2\nrun: {name: a}\noptim:\n  epochs: 4\n"
    with pytest.raises(ConfigError) as caught:
        parse(text, "file.yaml")
    assert str(caught.value).splitlines() == [
        "file.yaml: optim: is given twice, in lines 1 and 6; keep one of them",
        "file.yaml: optim.lr: is given twice, in lines 2 and 4; keep one of them",
    ]
    with pytest.raises(ConfigError, match=r"run\.seed: is given twice, in line 1; "):
        parse('run: {seed: 1, "seed": 1}')


def test_aliases_work_and_do_not_unfold_without_end() -> None:
    config = parse("tune: {pretrained: &space {lr: [0.1, 0.2]}, random: *space}")
    assert config.tune.random.lr == (0.1, 0.2)
    # A merge key and one that overrides it are not the same key twice.
    merged = parse("tune: {pretrained: &space {lr: [0.1, 0.2]}, random: {<<: *space, lr: [0.3]}}")
    assert merged.tune.random.lr == (0.3,)
    bomb = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(ConfigError, match="unfolds to more than"):
        parse(bomb)
    with pytest.raises(ConfigError, match="unfolds to more than"):
        parse("run: &run {name: *run}")


@pytest.mark.parametrize(
    "text",
    ["run: {seed: " + "9" * 5000 + "}", "run: {name: 2026-99-99}", "[" * 5000, "run: {name: !!python/object:os.x ''}"],
)
def test_a_yaml_text_that_cannot_be_read_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^odd: "):
        parse(text, "odd")
