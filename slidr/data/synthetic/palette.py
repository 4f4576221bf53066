"""The colours that things come in, in ranges that overlap between classes."""

from __future__ import annotations

import numpy as np

from slidr.shapes import Float32

Size = tuple[float, float, float]  # length, width, height of an object's box, metres

RUBBER = np.array([0.055, 0.055, 0.06], np.float32)
WHITE = np.array([0.86, 0.86, 0.84], np.float32)
ORANGE = np.array([0.93, 0.34, 0.07], np.float32)
PAINTS = [
    (0.8, 0.8, 0.8),
    (0.55, 0.56, 0.58),
    (0.12, 0.12, 0.13),
    (0.3, 0.31, 0.33),
    (0.55, 0.08, 0.07),
    (0.1, 0.18, 0.42),
]
PAINTS += [
    (0.62, 0.6, 0.5),
    (0.12, 0.3, 0.2),
    (0.85, 0.65, 0.1),
    (0.4, 0.25, 0.15),
    (0.35, 0.5, 0.65),
    (0.75, 0.35, 0.1),
]
CAR_PAINTS = PAINTS[:7] * 2 + PAINTS[7:]
LIVERIES = [(0.75, 0.1, 0.1), (0.1, 0.45, 0.25), (0.88, 0.88, 0.86), (0.85, 0.6, 0.1), (0.2, 0.4, 0.7), (0.8, 0.4, 0.3)]
BOXES = [(0.88, 0.88, 0.86), (0.8, 0.78, 0.7), (0.7, 0.72, 0.75), (0.5, 0.62, 0.75), (0.75, 0.45, 0.2)]
CURTAINS = [
    (0.12, 0.22, 0.5),
    (0.1, 0.35, 0.25),
    (0.55, 0.12, 0.12),
    (0.3, 0.32, 0.35),
    (0.2, 0.45, 0.65),
    (0.75, 0.7, 0.6),
]
CLOTHES = [
    (0.1, 0.1, 0.12),
    (0.15, 0.2, 0.35),
    (0.6, 0.58, 0.55),
    (0.55, 0.1, 0.12),
    (0.2, 0.35, 0.22),
    (0.85, 0.83, 0.8),
]
CLOTHES += [
    (0.35, 0.25, 0.18),
    (0.8, 0.6, 0.2),
    (0.25, 0.45, 0.6),
    (0.5, 0.3, 0.45),
    (0.9, 0.45, 0.1),
    (0.3, 0.3, 0.32),
]
MACHINES = [
    (0.9, 0.65, 0.08),
    (0.88, 0.45, 0.06),
    (0.85, 0.7, 0.15),
    (0.9, 0.6, 0.1),
    (0.92, 0.62, 0.05),
    (0.6, 0.32, 0.18),
]
SKINS = [(0.85, 0.65, 0.53), (0.62, 0.43, 0.32), (0.36, 0.24, 0.17), (0.75, 0.55, 0.42)]


def pick(rng: np.random.Generator, colours: list, spread: float = 0.06) -> Float32[np.ndarray, " 3"]:
    """One of the colours, a little changed."""
    colour = np.asarray(colours[rng.integers(len(colours))]) + rng.normal(0, spread, 3) * 0.6
    return np.clip(colour * rng.uniform(0.85, 1.15), 0.02, 0.95).astype(np.float32)
