"""A run's folder: who owns it, what it was started with, and how it ended.

runs/NAME/config.yaml     what it was started with
runs/NAME/checkpoints/    see `slidr.training.checkpoint`
runs/NAME/metrics.jsonl   one line a logged step
runs/NAME/student.pt      the final student in SLidR's published layout
runs/NAME/method.png      one held-out keyframe through both networks (pretraining)
runs/NAME/result.json     the final scores; its presence says that the run is finished
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from slidr.config import (
    ClusterConfig,
    Config,
    DemoConfig,
    EvaluationConfig,
    RunConfig,
    TrackingConfig,
    WorldConfig,
    decode,
    dump,
    fingerprint,
    parse,
    public_dict,
    to_dict,
)
from slidr.data import storage
from slidr.training.checkpoint import CheckpointFolder


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: str
    keep_checkpoints: int = 3

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.file("checkpoints"), self.keep_checkpoints)

    def file(self, name: str) -> str:
        return storage.join(self.path, name)

    def result(self) -> dict[str, Any] | None:
        """The final scores, or None for a run that is not finished."""
        path = self.file("result.json")
        return json.loads(storage.read_bytes(path)) if storage.exists(path) else None

    def finish(self, result: dict[str, Any]) -> None:
        """Writes the final scores, which makes the run a finished one."""
        storage.write_bytes_atomic(self.file("result.json"), json.dumps(result, indent=2).encode())

    def note(self, name: str, text: str | None = None) -> str | None:
        """Keeps a line of text under a name, or (given none) reads it back; None where there is none."""
        path = self.file(name)
        if text is not None:
            storage.write_bytes_atomic(path, text.encode())
            return text
        return storage.read_bytes(path).decode() if storage.exists(path) else None


def folder_of(config: Config) -> RunFolder:
    """The folder that a config's run lives in."""
    return RunFolder(storage.join(config.run.folder, config.run.name), config.run.keep_checkpoints)


def identity(config: Config) -> str:
    """Fingerprint of everything that shapes a run's result: where files lie and how it logs do not."""
    cluster = replace(ClusterConfig(), num_workers=config.cluster.num_workers, use_gpu=config.cluster.use_gpu)
    defaults = RunConfig()
    run = replace(defaults, seed=config.run.seed, score_frames=config.run.score_frames, name=config.run.name)
    config = decode(public_dict(config))
    return fingerprint(
        replace(
            config,
            data=replace(config.data, root="", frames=""),
            superpixels=replace(config.superpixels, folder=""),
            run=run,
            cluster=cluster,
            tracking=TrackingConfig(),
            world=WorldConfig(),
            demo=DemoConfig(),
            evaluation=EvaluationConfig(),
        )
    )


def claim(config: Config) -> RunFolder:
    """The run's folder, made or taken up again.

    A folder that holds another run, or this one without `run.resume`, is refused: nothing is ever overwritten.
    """
    folder = folder_of(config)
    known = folder.file("config.yaml")
    unproven = not folder.checkpoints.steps() and folder.result() is None
    if not storage.exists(known) or unproven:  # a run that never got to a checkpoint has nothing to lose
        storage.write_bytes_atomic(known, dump(config).encode())
        return folder
    if not config.run.resume:
        raise RunError(
            f"run.name: {folder.path} already holds a run; continue it with --run.resume, or choose another "
            f"--run.name (or remove the folder)"
        )
    earlier = parse(storage.read_bytes(known).decode(), known)
    if identity(earlier) != identity(config):
        raise RunError(
            f"run.resume: {folder.path} was started with other values: {_differences(earlier, config)}; "
            f"resume with the old ones or choose another --run.name"
        )
    return folder


def _differences(before: Config, after: Config) -> str:
    old, new = to_dict(before), to_dict(after)
    skip = {"tracking", "run", "cluster"}
    return ", ".join(_differing(old, new, "", skip)) or "run.seed or cluster"


def _differing(old: dict[str, Any], new: dict[str, Any], prefix: str, skip: set[str]) -> list[str]:
    lines: list[str] = []
    for key in new:
        if key in skip:
            continue
        if isinstance(new[key], dict):
            lines += _differing(old[key], new[key], f"{prefix}{key}.", set())
        elif old[key] != new[key]:
            lines.append(f"{prefix}{key} was {old[key]!r}, now {new[key]!r}")
    return lines
