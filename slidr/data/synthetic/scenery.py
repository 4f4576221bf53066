"""Trees, shrubs and buildings."""

from __future__ import annotations

import numpy as np

from slidr.data.synthetic.palette import MACHINES, PAINTS, WHITE, Size, pick
from slidr.data.synthetic.shapes import Kind, Parts, turn
from slidr.data.synthetic.textures import Material


def tree(parts: Parts, rng: np.random.Generator) -> Size:
    """A trunk with branches and a crown of leaf clumps, or a conifer."""
    parts.reflectivity = rng.uniform(0.15, 0.6)
    parts.roughness = 0.12
    gaps = float(rng.uniform(0.35, 0.65))
    leaf = pick(
        rng,
        [(0.2, 0.36, 0.12), (0.28, 0.42, 0.14), (0.14, 0.28, 0.12), (0.4, 0.4, 0.14), (0.5, 0.3, 0.1)],
        0.04,
    )
    tip = np.clip(leaf * 1.7, 0, 0.9).astype(np.float32)
    bark = pick(rng, [(0.3, 0.23, 0.17), (0.4, 0.36, 0.32), (0.22, 0.18, 0.15)], 0.03)
    height, crown = rng.uniform(4.5, 9.0), rng.uniform(2.4, 4.4)
    trunk, thick = height * rng.uniform(0.28, 0.4), rng.uniform(0.2, 0.45)
    parts.add(
        Kind.CYLINDER,
        (0, 0, trunk * 0.65),
        (thick, thick, trunk * 1.3),
        bark,
        Material.BARK,
        reflectivity=rng.uniform(0.1, 0.4),
    )
    if rng.random() < 0.2:
        for k in range(4):
            share = 1 - k * 0.24
            parts.add(
                Kind.ELLIPSOID,
                (0, 0, trunk + (height - trunk) * (0.12 + 0.24 * k)),
                (crown * share * 0.9, crown * share * 0.9, (height - trunk) * 0.42),
                leaf * (0.85 + 0.1 * k),
                Material.FOLIAGE,
                accent=tip,
                inner=gaps,
            )
        return crown, crown, height
    for side in (-1, 1):
        parts.add(
            Kind.CYLINDER,
            (0, side * 0.35, trunk * 1.15),
            (thick * 0.5, thick * 0.5, trunk * 0.8),
            bark,
            Material.BARK,
            rotation=turn("x", -side * 0.6),
        )
    for _ in range(int(rng.integers(7, 12))):
        angle, out = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.32) * crown
        size = rng.uniform(0.38, 0.62) * crown
        z = trunk + (height - trunk) * rng.uniform(0.22, 0.85) - 0.25 * out
        parts.add(
            Kind.ELLIPSOID,
            (out * np.cos(angle), out * np.sin(angle), z),
            (size, size * rng.uniform(0.8, 1.1), size * rng.uniform(0.6, 0.85)),
            leaf * rng.uniform(0.8, 1.15),
            Material.FOLIAGE,
            accent=tip,
            inner=gaps,
        )
    return crown, crown, height


def shrub(parts: Parts, rng: np.random.Generator) -> Size:
    """A bush, or a clipped hedge."""
    parts.reflectivity = rng.uniform(0.15, 0.6)
    parts.roughness = 0.08
    gaps = float(rng.uniform(0.2, 0.5))
    leaf = pick(rng, [(0.2, 0.34, 0.12), (0.27, 0.4, 0.15), (0.16, 0.27, 0.12), (0.4, 0.36, 0.16)], 0.04)
    tip = np.clip(leaf * 1.6, 0, 0.9).astype(np.float32)
    if rng.random() < 0.4:
        length, height = rng.uniform(2.0, 4.5), rng.uniform(0.7, 1.4)
        parts.add(Kind.BOX, (0, 0, height / 2), (length, 0.8, height), leaf, Material.FOLIAGE, accent=tip)
        return length, 0.8, height
    for _ in range(int(rng.integers(2, 5))):
        x, y, size = rng.uniform(-0.6, 0.6), rng.uniform(-0.4, 0.4), rng.uniform(0.7, 1.4)
        parts.add(
            Kind.ELLIPSOID,
            (x, y, size * 0.35),
            (size, size, size * 0.9),
            leaf * rng.uniform(0.85, 1.15),
            Material.FOLIAGE,
            accent=tip,
            inner=gaps,
        )
    return 2.0, 1.6, 1.2


def building(parts: Parts, rng: np.random.Generator, length: float, depth: float, style: str) -> Size:
    """A block, a house with a roof, or a hall; its street side is the one towards +y, at y = depth / 2."""
    parts.reflectivity = rng.uniform(0.1, 0.6)
    colour = pick(
        rng,
        [
            (0.62, 0.55, 0.46),
            (0.5, 0.28, 0.22),
            (0.58, 0.57, 0.56),
            (0.75, 0.7, 0.6),
            (0.4, 0.42, 0.46),
            (0.68, 0.5, 0.38),
            (0.8, 0.79, 0.75),
        ],
    )
    dark = colour * rng.uniform(0.5, 0.8)
    return {"house": _house, "hall": _hall, "block": _block}[style](parts, rng, length, depth, colour, dark)


def _house(
    parts: Parts, rng: np.random.Generator, length: float, depth: float, colour: np.ndarray, dark: np.ndarray
) -> Size:
    height = rng.uniform(3.2, 6.2)
    brick = rng.random() < 0.4
    parts.add(
        Kind.BOX,
        (0, 0, height / 2),
        (length, depth, height),
        colour,
        Material.FACADE,
        accent=dark,
        pattern=(rng.uniform(2.0, 3.2), rng.uniform(2.8, 3.1)),
    )
    roof = pick(rng, [(0.45, 0.2, 0.14), (0.25, 0.25, 0.27), (0.4, 0.32, 0.25)], 0.03)
    parts.add(
        Kind.TAPER,
        (0, 0, height + 1.2),
        (length + 0.6, depth + 0.6, 2.4),
        roof,
        Material.ROOF,
        pattern=(0.35, 0),
        taper=(0.7 if brick else 0.95, 0.05, 0),
    )
    parts.add(
        Kind.BOX,
        (length * 0.25, depth * 0.1, height + 2.2),
        (0.7, 0.7, 1.6),
        dark,
        Material.BRICK,
        accent=colour,
        pattern=(0.25, 0.1),
    )
    return length, depth, height + 2.4


def _hall(
    parts: Parts, rng: np.random.Generator, length: float, depth: float, colour: np.ndarray, dark: np.ndarray
) -> Size:
    height = rng.uniform(5, 9)
    material = Material.PANEL if rng.random() < 0.3 else Material.CONCRETE
    parts.add(
        Kind.BOX,
        (0, 0, height / 2),
        (length, depth, height),
        colour,
        material,
        accent=pick(rng, PAINTS),
        pattern=(rng.uniform(0.5, 2.5), 0.12),
    )
    for k in range(int(length // 8)):
        parts.add(
            Kind.BOX,
            (-length / 2 + 4 + 8 * k, depth / 2 + 0.02, 1.8),
            (3.4, 0.12, 3.6),
            pick(rng, PAINTS),
            Material.BANDS,
            accent=colour * 0.6,
            pattern=(0.5, 0.12),
        )
    return length, depth, height


def _block(
    parts: Parts, rng: np.random.Generator, length: float, depth: float, colour: np.ndarray, dark: np.ndarray
) -> Size:
    height = rng.uniform(8, 26)
    brick = rng.random() < 0.3
    parts.add(
        Kind.BOX,
        (0, 0, height / 2),
        (length, depth, height),
        colour,
        Material.FACADE,
        accent=dark,
        pattern=(rng.uniform(1.6, 4.0), rng.uniform(2.8, 3.8)),
    )
    if brick:
        parts.add(
            Kind.BOX,
            (0, depth / 2, 1.6),
            (length, 0.25, 3.2),
            dark,
            Material.BRICK,
            accent=colour,
            pattern=(0.6, 0.3),
        )
    if rng.random() < 0.6:
        awning = pick(rng, PAINTS + MACHINES)
        for k in range(int(length // 6)):
            parts.add(
                Kind.TAPER,
                (-length / 2 + 3 + 6 * k, depth / 2 + 0.6, 3.0),
                (4.2, 1.4, 0.5),
                awning,
                Material.DIAGONAL,
                accent=WHITE if rng.random() < 0.5 else awning * 0.7,
                pattern=(0.8, 0),
                taper=(0.95, 0.3, 0),
            )
    parts.add(Kind.BOX, (0, 0, height + 0.3), (length * 1.01, depth * 1.01, 0.6), dark)
    return length, depth, height
