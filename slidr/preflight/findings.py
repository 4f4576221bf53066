"""What the doctor says of one thing, and what it is asked about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]
Stage = Literal["frames", "superpixels", "pretrain", "finetune", "evaluate", "tune"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor: what was looked at, how it is, and what to do where it is not well."""

    name: str
    status: Status
    what: str
    next: str = ""
