"""What may become a registered model: an intact student, made of numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slidr import tracking_models
from slidr.models.files import WeightsError
from slidr.models.minkunet import MinkUNet14
from slidr.tracking_models import register_student


@pytest.mark.parametrize("damage", ["one flipped bit", "one NaN"])
def test_a_damaged_student_is_refused_before_the_store_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    path = tmp_path / "student.pt"
    state = MinkUNet14(1, 4, width=0.25).state_dict()
    if damage == "one NaN":
        state["final.kernel"].view(-1)[0] = float("nan")
    torch.save({"student": state}, path)
    if damage == "one flipped bit":
        data = bytearray(path.read_bytes())
        data[data.find(state["conv0p1s1.kernel"].numpy().tobytes())] ^= 1
        path.write_bytes(data)

    def asked(uri: str) -> None:
        pytest.fail("the store was asked")

    monkeypatch.setattr(tracking_models, "connect", asked)
    with pytest.raises(WeightsError, match=rf"^{path}: "):
        register_student("sqlite://", "name", "run", tmp_path, ["champion"], {})
