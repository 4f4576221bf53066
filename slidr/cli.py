"""The command line: `slidr COMMAND CONFIG [--section.key value ...]`."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn, TypeVar

import tyro

from slidr.config import Config, ConfigError, WorldConfig, check, decode, load, public_dict, user_path, with_used_paths
from slidr.config.marks import wrong_numbers
from slidr.interrupts import interruptible
from slidr.urls import redact_url

# Foreign libraries must not call home, nor print more than their errors.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Nor take Ctrl-C away from this process: Tune would end a search quietly, after a while.
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")

T = TypeVar("T")


@dataclass(frozen=True)
class Command:
    """A command's help and what runs it on a checked config."""

    help: str
    run: Callable[[Config], object]


def _frames(config: Config) -> object:
    from slidr.stages import make_frames

    return make_frames(config)


def _superpixels(config: Config) -> object:
    from slidr.stages import make_superpixels

    return make_superpixels(config)


def _pretrain(config: Config) -> object:
    from slidr.stages import run_pretraining

    return run_pretraining(config)


def _finetune(config: Config) -> object:
    from slidr.stages import run_finetuning

    return run_finetuning(config)


def _evaluate(config: Config) -> object:
    from slidr.stages import run_evaluation

    return run_evaluation(config)


def _tune(config: Config) -> object:
    from slidr.stages import run_search

    return run_search(config)


def _demo(config: Config) -> object:
    from slidr.demo import run_demo

    return run_demo(config)


def _demo_data(config: Config) -> object:
    from slidr.demo import make_data

    return make_data(config)


def _ui(config: Config) -> object:
    from slidr.tracking import tracking_uri
    from slidr.tracking_page import serve_ui

    return serve_ui(tracking_uri(config), config.tracking.ui_port)


COMMANDS: dict[str, Command] = {
    "frames": Command("read the data set's tables once into a parquet frame table", _frames),
    "superpixels": Command("cut every image into superpixels, on Ray Data; a rerun does what is missing", _superpixels),
    "pretrain": Command("distil image features into a lidar network, on Ray Train", _pretrain),
    "finetune": Command("train a student on labelled sweeps, wholly or its last layer, on Ray Train", _finetune),
    "evaluate": Command("score a fine-tuned student on a split, per point: --checkpoint PATH", _evaluate),
    "tune": Command("search learning rates for each label fraction, on Ray Tune; --fresh starts anew", _tune),
    "demo": Command("the whole way on a synthetic world, minutes on two cores", _demo),
    "demo-data": Command("what the demo trains on: world, frame table, superpixels; only what is missing", _demo_data),
    "ui": Command("MLflow's page over the runs, on loopback, until interrupted", _ui),
}
_SYNTHESIZE = "write a synthetic street world as a nuScenes dataroot: slidr synthesize OUT [--scale 0.25 ...]"
_EXPORT = (
    "write a student for other tools: slidr export CHECKPOINT --format openpcdet|slidr|safetensors [--out PATH] "
    "[--intensity-scale FACTOR] [--spconv 1|2]"
)
_PLAN = (
    "hours, storage and memory of a config's jobs on a cluster: slidr plan CONFIG [--nodes N --cpus C --gpus G] "
    "[--measure] [--costs FILE] [--json] [--section.key value ...]"
)
_DOCTOR = "look whether everything is there that a job needs: slidr doctor [CONFIG] [--json] [--section.key value ...]"
# Commands with options of their own.
OTHERS = {"plan": _PLAN, "doctor": _DOCTOR, "export": _EXPORT, "synthesize": _SYNTHESIZE}


_FULL = (errno.ENOSPC, errno.EDQUOT)
_MAKE_ROOM = "free some space and run the same command again"
_UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)


@dataclass(frozen=True)
class ExportOptions:
    """Options of `slidr export`."""

    format: Literal["openpcdet", "slidr", "safetensors"]
    out: str | None = None  # the file to write; none: beside the checkpoint
    intensity_scale: float | None = None  # openpcdet, VoxelNet: 255 for data of 0..1 after a pretraining on 0..255
    spconv: Literal[1, 2] = 2  # openpcdet, VoxelNet: the version whose layout of kernels is written


def main(arguments: list[str] | None = None, own_process: bool = False) -> int:
    """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong usage, 128 + n ended by signal n.

    `own_process`: nothing but the exit comes after it in this process (see `interruptible`).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in OTHERS and name not in COMMANDS:
        print(f"slidr: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    again = " with --run.resume" if name in ("pretrain", "finetune") else ""
    with interruptible(f"the same command{again} goes on", own_process) as interruption:
        try:
            return _dispatch(name, rest)
        except KeyboardInterrupt:
            if interruption.number is None:
                interruption.tell("interrupted")
            return interruption.status
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                text = (
                    f"slidr {name}: {error.filename or 'the disk'}: cannot be written ({error.strerror}); {_MAKE_ROOM}"
                )
            elif isinstance(error, OSError) and error.errno in _UNUSABLE and error.filename and not _is_ours(error):
                path = error.filename2 or error.filename  # of a rename: where to
                text = f"slidr {name}: {path}: cannot be used ({error.strerror}); check the path and its permissions"
            else:
                text = f"slidr {name}: {error}" if _is_ours(error) else traceback.format_exc().rstrip()
            print(redact_url(text), file=sys.stderr)
            return 1


def entry_point(arguments: list[str] | None = None) -> NoReturn:
    """`main` as a process of its own, which ends with its exit status."""
    sys.exit(main(arguments, own_process=True))


def _dispatch(name: str, rest: list[str]) -> int:
    if name == "synthesize":
        return _synthesize(rest)
    if name == "export":
        return _export(rest)
    if name == "plan":
        return _plan(rest)
    if name == "doctor":
        return _doctor(rest)
    return _run(name, rest)


def usage() -> str:
    """The text of `slidr --help`."""
    width = max(len(name) for name in (*COMMANDS, *OTHERS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    lines += [f"  {name:<{width}}  {text.split(':')[0]}" for name, text in OTHERS.items()]
    return "\n".join(
        [
            "slidr: teach lidar networks with images, on one machine or a Ray cluster",
            "",
            "usage: slidr COMMAND CONFIG [--section.key value ...]",
            "       slidr evaluate CONFIG --checkpoint PATH [--section.key value ...]",
            "       slidr tune CONFIG [--fresh] [--section.key value ...]",
            *(f"       {text.split(': ')[1]}" for text in OTHERS.values()),
            "",
            *lines,
            "",
            "CONFIG is a YAML file, such as configs/demo.yaml; every key of it can be overridden, as in",
            "--optim.lr 0.01. `slidr COMMAND CONFIG --help` lists the keys with their values in CONFIG.",
        ]
    )


def _run(name: str, rest: list[str]) -> int:
    command = COMMANDS[name]
    if not rest or rest[0].startswith("-"):
        asked = bool(rest) and rest[0] in ("-h", "--help")
        more = " --checkpoint PATH" if name == "evaluate" else ""
        text = f"slidr {name}: {command.help}\n\nusage: slidr {name} CONFIG{more} [--section.key value ...]\n"
        print(
            text + f"`slidr {name} CONFIG --help` lists the keys with their values in CONFIG.",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    path, *overrides = rest
    if name == "evaluate":
        overrides = [re.sub(r"^--checkpoint(?==|$)", "--evaluation.checkpoint", word) for word in overrides]
    if name == "tune":
        overrides = ["--tune.fresh" if word == "--fresh" else word for word in overrides]
    config = override(load(path), overrides, prog=f"slidr {name} {path}", description=command.help)
    outcome = command.run(config)
    return outcome if isinstance(outcome, int) else 0


def override(config: Config, arguments: list[str], prog: str = "slidr", description: str = "") -> Config:
    """The config with `--section.key value` arguments applied, checked again."""
    words = _from_yaml_spelling(arguments)
    changed = _parsed(Config, words, default=config, prog=prog, description=description, use_underscores=True)
    changed = with_used_paths(changed, "command line")
    check(changed, "command line")
    return changed


def _from_yaml_spelling(arguments: list[str]) -> list[str]:
    """Arguments with YAML's true, false and null as tyro spells them; a bare `--run.resume` stays true."""
    spelled: list[str] = []
    for argument in arguments:
        key = spelled[-1] if spelled and spelled[-1].startswith("--") else ""
        if key and argument.lower() == "false":
            section, _, name = key.rpartition(".")
            spelled[-1] = f"{section}.no_{name}"
        elif argument == "null":
            spelled.append("None")
        elif not (key and argument.lower() == "true"):
            spelled.append(argument)
    return spelled


def _synthesize(rest: list[str]) -> int:
    from slidr.stages import make_world

    if rest and rest[0] in ("-h", "--help"):
        rest = ["OUT", "--help"]
    elif not rest or rest[0].startswith("-"):
        print(f"slidr synthesize: {_SYNTHESIZE}", file=sys.stderr)
        return 2
    out, *options = rest
    prog = f"slidr synthesize {out}"
    world = _parsed(WorldConfig, options, prog=prog, description=_SYNTHESIZE, use_underscores=True)
    _check_numbers(world)
    make_world(_path(out), world, workers=os.cpu_count() or 1)
    return 0


def _export(rest: list[str]) -> int:
    from slidr.stages import export_student

    if rest and rest[0] in ("-h", "--help"):
        rest = ["CHECKPOINT", "--help"]
    elif not rest or rest[0].startswith("-"):
        print(f"slidr export: {_EXPORT}", file=sys.stderr)
        return 2
    checkpoint, *words = rest
    prog = f"slidr export {checkpoint}"
    options = _parsed(ExportOptions, words, prog=prog, description=_EXPORT)
    out = None if options.out is None else _path(options.out)
    export_student(_path(checkpoint), options.format, out, options.intensity_scale, options.spconv)
    return 0


def _plan(rest: list[str]) -> int:
    if not rest or rest[0].startswith("-"):
        asked = bool(rest) and rest[0] in ("-h", "--help")
        print(f"slidr plan: {_PLAN}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    from slidr.preflight.plan import PlanOptions, run_plan
    from slidr.stages import console

    path, *words = rest
    options, overrides = _own_options(PlanOptions, words, f"slidr plan {path}", _PLAN)
    _check_numbers(options)
    if options.costs is not None:
        options = replace(options, costs=_path(options.costs))
    config = override(load(path), overrides, prog=f"slidr plan {path}", description=_PLAN)
    run_plan(config, options, shlex.join(["slidr", "plan", *map(redact_url, rest)]), console)
    return 0


def _doctor(rest: list[str]) -> int:
    if rest and rest[0] in ("-h", "--help"):
        print(f"slidr doctor: {_DOCTOR}")
        return 0
    from slidr.preflight.doctor import DoctorOptions, run_doctor

    path, words = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else (None, rest)
    prog = f"slidr doctor {path}" if path else "slidr doctor"
    options, overrides = _own_options(DoctorOptions, words, prog, _DOCTOR)
    if path is None and overrides:
        print(f"slidr doctor: {redact_url(overrides[0])} needs a CONFIG before it", file=sys.stderr)
        return 2
    return run_doctor(None if path is None else override(load(path), overrides, prog=prog), options)


def _check_numbers(options: object) -> None:
    """Raises `ConfigError` for a command's own options that are out of their range."""
    problems = [f"--{name}: {fault}" for name, fault in wrong_numbers(options)]
    if problems:
        raise ConfigError("\n".join(problems))


def _path(text: str) -> str:
    """An argument that names a file or folder, as a path."""
    try:
        return user_path(text)
    except ValueError as error:
        raise ConfigError(f"command line: {error}") from None


def _own_options(schema: type[T], words: list[str], prog: str, description: str) -> tuple[T, list[str]]:
    """A command's own options, and the words that are left: overrides of the config."""
    asks = [word for word in words if word in ("-h", "--help")]
    mine = [word for word in words if word not in asks]
    options, overrides = _parsed(
        schema, mine, prog=prog, description=description, return_unknown_args=True, use_underscores=True
    )
    return options, [*overrides, *asks]


def _parsed(schema: Any, words: list[str], **options: Any) -> Any:
    """What `tyro.cli` makes of the words of a command line; its help and its errors show no secret of a URL."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(schema, args=words, **options)
    except SystemExit:  # help was asked for, or a word is wrong: again, for the terminal
        if isinstance(options.get("default"), Config):
            options["default"] = decode(public_dict(options["default"]))
        options["prog"] = redact_url(options["prog"])
        tyro.cli(schema, args=[redact_url(word) for word in words], **options)
        raise


def _is_ours(error: Exception) -> bool:
    """True for errors whose message is written for the user; others keep their traceback."""
    return isinstance(error, ConfigError) or type(error).__module__.split(".")[0] == "slidr"


if __name__ == "__main__":
    entry_point()
