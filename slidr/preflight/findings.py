"""What the doctor says of one thing, and what it is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from slidr.urls import redact_url

Status = Literal["ok", "warning", "error"]
Stage = Literal["frames", "superpixels", "pretrain", "finetune", "evaluate", "tune"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, how it is, and what to do where it is not well."""

    name: str
    status: Status
    what: str
    next: str = ""

    def __post_init__(self) -> None:
        for name in ("what", "next"):
            object.__setattr__(self, name, redact_url(getattr(self, name)))
