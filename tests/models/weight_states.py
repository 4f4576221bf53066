"""State dicts that several tests of weights share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slidr.models.minkunet import MinkUNet14

State = dict[str, Tensor]


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def same(module: nn.Module, state: State, except_for: str = "-") -> bool:
    own = module.state_dict()
    return all(torch.equal(own[name], state[name]) for name in own if not name.startswith(except_for))


def student(out_channels: int = 64, seed: int = 0) -> MinkUNet14:
    torch.manual_seed(seed)
    return MinkUNet14(out_channels=out_channels, width=0.25)
