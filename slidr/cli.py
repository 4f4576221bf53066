"""The command line: `slidr COMMAND CONFIG [--section.key value ...]`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tyro

from slidr.config import Config, ConfigError, WorldConfig, check, load

# Foreign libraries must not call home, nor print more than their errors.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


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


def _demo(config: Config) -> object:
    from slidr.demo import run_demo

    return run_demo(config)


def _ui(config: Config) -> object:
    from slidr.tracking import serve_ui, tracking_uri

    return serve_ui(tracking_uri(config), config.tracking.ui_port)


COMMANDS: dict[str, Command] = {
    "frames": Command("read the data set's tables once into a parquet frame table", _frames),
    "superpixels": Command("cut every image into superpixels, on Ray Data; a rerun does what is missing", _superpixels),
    "pretrain": Command("distil image features into a lidar network, on Ray Train", _pretrain),
    "demo": Command("the whole way on a synthetic world, about ten minutes on two cores", _demo),
    "ui": Command("MLflow's page over the runs, on loopback, until interrupted", _ui),
}
_SYNTHESIZE = "write a synthetic street world as a nuScenes dataroot: slidr synthesize OUT [--scale 0.25 ...]"


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status (0 done, 1 failed, 2 wrong usage, 130 interrupted)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name != "synthesize" and name not in COMMANDS:
        print(f"slidr: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        if name == "synthesize":
            return _synthesize(rest)
        return _run(name, rest)
    except KeyboardInterrupt:
        print("slidr: interrupted; the same command with --run.resume goes on", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_ours(error):
            raise
        print(f"slidr {name}: {error}", file=sys.stderr)
        return 1


def usage() -> str:
    """The text of `slidr --help`."""
    width = max(len(name) for name in (*COMMANDS, "synthesize"))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    lines.append(f"  {'synthesize':<{width}}  {_SYNTHESIZE.split(':')[0]}")
    return "\n".join(
        [
            "slidr: teach lidar networks with images, on one machine or a Ray cluster",
            "",
            "usage: slidr COMMAND CONFIG [--section.key value ...]",
            "       slidr synthesize OUT [--scale 0.25 ...]",
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
        text = f"slidr {name}: {command.help}\n\nusage: slidr {name} CONFIG [--section.key value ...]\n"
        print(
            text + f"`slidr {name} CONFIG --help` lists the keys with their values in CONFIG.",
            file=sys.stdout if asked else sys.stderr,
        )
        return 0 if asked else 2
    path, *overrides = rest
    config = override(load(path), overrides, prog=f"slidr {name} {path}", description=command.help)
    outcome = command.run(config)
    return outcome if isinstance(outcome, int) else 0


def override(config: Config, arguments: list[str], prog: str = "slidr", description: str = "") -> Config:
    """The config with `--section.key value` arguments applied, checked again."""
    changed = tyro.cli(
        Config,
        default=config,
        args=arguments,
        prog=prog,
        description=description,
        use_underscores=True,
    )
    check(changed, "command line")
    return changed


def _synthesize(rest: list[str]) -> int:
    from slidr.stages import make_world

    if not rest or rest[0].startswith("-"):
        asked = bool(rest) and rest[0] in ("-h", "--help")
        print(f"slidr synthesize: {_SYNTHESIZE}", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    out, *options = rest
    world = tyro.cli(
        WorldConfig,
        args=options,
        prog=f"slidr synthesize {out}",
        description=_SYNTHESIZE,
        use_underscores=True,
    )
    make_world(Path(out), world, workers=os.cpu_count() or 1)
    return 0


def _is_ours(error: Exception) -> bool:
    """True for errors whose message is written for the user; others keep their traceback."""
    return isinstance(error, ConfigError) or type(error).__module__.split(".")[0] == "slidr"


if __name__ == "__main__":
    sys.exit(main())
