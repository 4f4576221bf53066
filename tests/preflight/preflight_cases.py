"""Configs and look-ups that several of these tests share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from slidr.config import Config, EvaluationConfig, LossConfig
from slidr.preflight.findings import Finding


def by_name(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def finetuning(config: Config) -> Config:
    """A config that learns from the labels of the same frames."""
    return replace(
        config,
        student=replace(config.student, out_channels=17),
        loss=LossConfig(names=("cross_entropy_lovasz",)),
        evaluation=EvaluationConfig(checkpoint=str(Path(config.data.root) / "student.pt")),
    )
