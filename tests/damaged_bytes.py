"""Damage as disks and networks cause it, for files of weights and checkpoints."""

from __future__ import annotations

import random


def damage(data: bytes, rng: random.Random) -> bytes:
    """`data` with one flipped bit or up to 64 scrambled bytes."""
    spoiled, at = bytearray(data), rng.randrange(len(data))
    if rng.random() < 0.5:
        spoiled[at] ^= 1 << rng.randrange(8)
    else:
        scrambled = rng.randbytes(min(64, len(data) - at))
        spoiled[at : at + len(scrambled)] = scrambled
    return bytes(spoiled)
