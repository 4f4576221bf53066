"""What several tests of weights share."""

from __future__ import annotations

import pytest
from weight_states import State, student


@pytest.fixture(scope="module")
def student_state() -> State:
    return student(seed=1).state_dict()
