"""What stands beside a road: barriers, cones, posts, street furniture and fences."""

from __future__ import annotations

import numpy as np

from slidr.data.synthetic.palette import MACHINES, ORANGE, PAINTS, RUBBER, WHITE, Size, pick
from slidr.data.synthetic.shapes import Kind, Parts, turn
from slidr.data.synthetic.textures import Material


def barrier(parts: Parts, rng: np.random.Generator) -> Size:
    """A concrete wall element, a water-filled plastic one, or a striped board on legs."""
    kind = rng.random()
    parts.reflectivity = rng.uniform(0.1, 0.7)
    length = rng.uniform(1.6, 2.4)
    colour = pick(rng, [ORANGE, (0.75, 0.1, 0.08), WHITE, (0.85, 0.7, 0.15)], 0.04)
    build = _concrete_barrier if kind < 0.35 else _plastic_barrier if kind < 0.6 else _board_barrier
    return build(parts, rng, length, colour)


def _concrete_barrier(parts: Parts, rng: np.random.Generator, length: float, colour: np.ndarray) -> Size:
    grey = np.full(3, rng.uniform(0.45, 0.68), np.float32) * np.array([1, 0.98, 0.94], np.float32)
    striped = rng.random() < 0.4
    foot, wall = (length, 0.62, 0.24), (length, 0.4, 0.64)
    parts.add(Kind.TAPER, (0, 0, 0.12), foot, grey, Material.CONCRETE, pattern=(length, 0), taper=(1, 0.75, 0))
    parts.add(
        Kind.TAPER,
        (0, 0, 0.55),
        wall,
        colour if striped else grey,
        Material.DIAGONAL if striped else Material.CONCRETE,
        accent=WHITE,
        pattern=(0.7, 0),
        taper=(1, 0.5, 0),
    )
    return length, 0.62, 0.87


def _plastic_barrier(parts: Parts, rng: np.random.Generator, length: float, colour: np.ndarray) -> Size:
    size = (length * 0.96, 0.5, 0.9)
    parts.add(Kind.TAPER, (0, 0, 0.45), size, colour, Material.PANEL, pattern=(0.5, 0.0), taper=(0.98, 0.4, 0))
    parts.add(Kind.BOX, (0, 0, 0.06), (length * 0.96, 0.56, 0.12), colour * 0.7)
    return length, 0.56, 0.9


def _board_barrier(parts: Parts, rng: np.random.Generator, length: float, colour: np.ndarray) -> Size:
    height = rng.uniform(0.95, 1.15)
    width = rng.uniform(0.4, 0.8)
    for z, tall in ((height - 0.16, 0.32), (height - 0.62, 0.26)):
        parts.add(
            Kind.BOX,
            (0, 0, z),
            (length, 0.06, tall),
            colour,
            Material.DIAGONAL,
            accent=WHITE,
            pattern=(width, 0),
            reflectivity=min(0.95, parts.reflectivity + 0.25),
        )
    for x in (-0.42 * length, 0.42 * length):
        parts.add(Kind.BOX, (x, 0, height / 2), (0.08, 0.1, height), np.full(3, 0.5, np.float32))
        parts.add(Kind.BOX, (x, 0, 0.04), (0.14, 0.7, 0.08), np.full(3, 0.3, np.float32))
    return length, 0.7, height


def traffic_cone(parts: Parts, rng: np.random.Generator) -> Size:
    parts.reflectivity = rng.uniform(0.12, 0.8)
    height, base = rng.uniform(0.6, 1.05), rng.uniform(0.36, 0.5)
    colour = pick(rng, [ORANGE, (0.85, 0.18, 0.08), (0.9, 0.6, 0.1)], 0.03)
    parts.add(Kind.BOX, (0, 0, 0.03), (base, base, 0.06), RUBBER if rng.random() < 0.5 else colour * 0.8)
    for angle in (0.0, np.pi / 4):
        parts.add(
            Kind.TAPER,
            (0, 0, 0.06 + height / 2),
            (base * 0.76, base * 0.76, height),
            colour,
            Material.BANDS,
            accent=WHITE,
            pattern=(height * rng.uniform(0.4, 0.55), 0.42),
            taper=(0.16, 0.16, 0),
            rotation=turn("z", angle),
        )
    return base, base, height + 0.06


def lamp_post(parts: Parts, rng: np.random.Generator) -> Size:
    """A street lamp, a traffic light or a pole with a sign."""
    parts.reflectivity = rng.uniform(0.1, 0.6)
    grey = pick(rng, [(0.4, 0.41, 0.42), (0.2, 0.22, 0.22), (0.6, 0.6, 0.58), (0.25, 0.3, 0.22)], 0.02)
    kind = rng.random()
    height = rng.uniform(6, 9) if kind < 0.45 else rng.uniform(2.6, 3.6)
    parts.add(Kind.CYLINDER, (0, 0, height / 2), (0.16, 0.16, height), grey)
    parts.add(Kind.CYLINDER, (0, 0, 0.25), (0.3, 0.3, 0.5), grey * 0.9)
    if kind < 0.45:
        parts.add(Kind.BOX, (0, 0.8, height), (0.1, 1.7, 0.1), grey)
        parts.add(Kind.BOX, (0, 1.5, height - 0.08), (0.25, 0.7, 0.12), WHITE)
    elif kind < 0.65:
        parts.add(Kind.BOX, (0.05, 0, height - 0.45), (0.28, 0.36, 1.0), np.full(3, 0.08, np.float32))
        for k, light in enumerate([(0.85, 0.1, 0.05), (0.3, 0.2, 0.02), (0.05, 0.25, 0.12)]):
            parts.add(
                Kind.ELLIPSOID,
                (-0.1, 0, height - 0.15 - 0.3 * k),
                (0.1, 0.22, 0.22),
                np.array(light, np.float32),
            )
    else:
        plate = pick(rng, [(0.08, 0.2, 0.55), (0.75, 0.08, 0.08), (0.85, 0.65, 0.1), (0.1, 0.4, 0.2), WHITE], 0.02)
        parts.add(
            Kind.BOX,
            (-0.1, 0, height - 0.35),
            (0.04, rng.uniform(0.6, 1.0), rng.uniform(0.6, 0.9)),
            plate,
            Material.SIGN,
            accent=WHITE if plate.mean() < 0.6 else RUBBER,
            reflectivity=0.95,
        )
    return 0.3, 0.3, height


def street_furniture(parts: Parts, rng: np.random.Generator) -> Size:
    """A bench, a bin, a cabinet, a bollard row, an advertising column or a bus shelter."""
    parts.reflectivity = rng.uniform(0.08, 0.6)
    colour = pick(rng, PAINTS + MACHINES)
    return FURNITURE[int(rng.integers(len(FURNITURE)))](parts, rng, colour)


def _bench(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    for z, y in ((0.45, 0.0), (0.8, -0.25)):
        parts.add(
            Kind.BOX,
            (0, y, z),
            (1.8, 0.45 if y == 0 else 0.08, 0.08 if y == 0 else 0.4),
            pick(rng, [(0.45, 0.3, 0.18), (0.3, 0.3, 0.3)]),
            Material.PANEL,
            pattern=(0.2, 0),
        )
    for x in (-0.7, 0.7):
        parts.add(Kind.BOX, (x, 0, 0.2), (0.1, 0.4, 0.42), np.full(3, 0.2, np.float32))
    return 1.8, 0.6, 1.0


def _bin(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    parts.add(
        Kind.CYLINDER,
        (0, 0, 0.5),
        (0.55, 0.55, 1.0),
        colour,
        Material.BANDS,
        accent=colour * 0.6,
        pattern=(0.4, 0.2),
    )
    return 0.55, 0.55, 1.0


def _cabinet(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    parts.add(Kind.BOX, (0, 0, 0.65), (1.2, 0.5, 1.3), colour, Material.PANEL, pattern=(0.6, 0.0))
    return 1.2, 0.5, 1.3


def _bollards(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    for k in range(4):
        parts.add(
            Kind.CYLINDER,
            (1.3 * (k - 1.5), 0, 0.45),
            (0.16, 0.16, 0.9),
            colour,
            Material.BANDS,
            accent=WHITE,
            pattern=(0.9, 0.25),
        )
    return 4.2, 0.2, 0.9


def _column(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    parts.add(
        Kind.CYLINDER,
        (0, 0, 1.4),
        (1.2, 1.2, 2.8),
        colour,
        Material.FACADE,
        accent=pick(rng, PAINTS),
        pattern=(1.2, 1.1),
    )
    return 1.2, 1.2, 2.8


def _shelter(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    parts.add(Kind.BOX, (0, -0.6, 1.2), (3.4, 0.06, 2.2), np.full(3, 0.2, np.float32), Material.GLASS)
    parts.add(Kind.BOX, (0, 0, 2.4), (3.7, 1.5, 0.14), colour)
    for x in (-1.65, 1.65):
        parts.add(Kind.BOX, (x, -0.1, 1.2), (0.08, 1.1, 2.3), pick(rng, PAINTS), Material.SIGN, accent=WHITE)
    parts.add(Kind.BOX, (0, -0.3, 0.5), (2.2, 0.35, 0.08), pick(rng, [(0.45, 0.3, 0.18), (0.3, 0.3, 0.3)]))
    return 3.7, 1.5, 2.5


FURNITURE = (_bench, _bin, _cabinet, _bollards, _column, _shelter)


def fence(parts: Parts, rng: np.random.Generator) -> Size:
    """A garden wall, a plank fence or a railing."""
    parts.reflectivity = rng.uniform(0.1, 0.6)
    length, height = rng.uniform(4, 8), rng.uniform(0.9, 1.7)
    kind = rng.random()
    if kind < 0.45:
        colour = pick(rng, [(0.5, 0.27, 0.2), (0.55, 0.5, 0.42), (0.6, 0.58, 0.55)])
        parts.add(
            Kind.BOX,
            (0, 0, height / 2),
            (length, 0.25, height),
            colour,
            Material.BRICK,
            accent=colour * 0.7 + 0.15,
            pattern=(0.4, 0.18),
        )
    elif kind < 0.75:
        colour = pick(rng, [(0.42, 0.3, 0.2), (0.7, 0.7, 0.66), (0.3, 0.4, 0.3)])
        parts.add(Kind.BOX, (0, 0, height / 2), (length, 0.08, height), colour, Material.PANEL, pattern=(0.16, 0.0))
    else:
        colour = pick(rng, [(0.15, 0.15, 0.16), (0.5, 0.5, 0.5), (0.2, 0.3, 0.22)])
        for z in (0.15, 0.5 * height, height):
            parts.add(Kind.BOX, (0, 0, z), (length, 0.06, 0.08), colour)
        for k in range(int(length / 0.5) + 1):
            parts.add(Kind.BOX, (-length / 2 + 0.5 * k, 0, height / 2), (0.05, 0.05, height), colour)
    return length, 0.25, height
