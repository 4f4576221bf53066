"""What a distillation refuses before it builds anything."""

from __future__ import annotations

import pytest

from slidr.config import ConfigError, decode
from slidr.training.distill import DistillTask


def test_a_loss_that_needs_labels_is_refused() -> None:
    config = decode({"loss": {"names": ["cross_entropy_lovasz"]}})
    with pytest.raises(ConfigError, match=r"loss\.names.*slidr finetune"):
        DistillTask(config)
