"""`slidr doctor`, and the look around that every job begins with."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rich.console import Console

from slidr.config import Config
from slidr.preflight.checks import cheap, thorough
from slidr.preflight.findings import Finding, Stage, Status
from slidr.urls import RedactedError

_COLOURS: dict[Status, str] = {"ok": "green", "warning": "yellow", "error": "red"}


class PreflightError(RedactedError, RuntimeError):
    """A job that cannot succeed as things are; the message lists what is wrong and what to do."""


@dataclass(frozen=True)
class DoctorOptions:
    """Options of `slidr doctor`."""

    json: bool = False  # print JSON


def run_doctor(config: Config | None, options: DoctorOptions) -> int:
    """Prints every finding; returns 1 where one is an error, else 0."""
    findings = cheap(config)
    if config is not None:
        # What was looked at again, and closer, replaces the quick look.
        closer = thorough(config)
        findings = [f for f in findings if f.name not in {c.name for c in closer}] + closer
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console = Console(highlight=False, soft_wrap=True)
        for finding in findings:
            console.print(_line(finding), markup=True)
    return int(any(finding.status == "error" for finding in findings))


def preflight(config: Config, stage: Stage, console: Console) -> None:
    """The cheap checks before a job: warnings are printed, errors raise `PreflightError`."""
    findings = cheap(config, stage)
    errors = [finding for finding in findings if finding.status == "error"]
    for finding in findings:
        if finding.status == "warning":
            console.print(_line(finding), markup=True)
    if errors:
        raise PreflightError("\n".join(f"{e.name}: {e.what}\n  next: {e.next}" for e in errors))


def _line(finding: Finding) -> str:
    colour = _COLOURS[finding.status]
    text = f"[{colour}]{finding.status:<8}[/{colour}]{finding.name:<26}{_plain(finding.what)}"
    return text if finding.status == "ok" else f"{text}\n{'':<34}next: {_plain(finding.next)}"


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
