"""What the cases of `make chaos` ended in, told at the session's end."""

from __future__ import annotations

import pytest

from .cases import table
from .harness import Case, Outcome

OUTCOMES: dict[Case, Outcome] = {}


@pytest.fixture
def fuzz_outcomes() -> dict[Case, Outcome]:
    """Where the outcomes are entered."""
    return OUTCOMES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if OUTCOMES:
        terminalreporter.section("damaged inputs")
        terminalreporter.write_line(table(OUTCOMES))
