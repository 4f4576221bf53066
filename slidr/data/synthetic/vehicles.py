"""Vehicles on four wheels and more: cars, buses, trucks, trailers and construction vehicles."""

from __future__ import annotations

import numpy as np

from slidr.data.synthetic.palette import BOXES, CAR_PAINTS, CURTAINS, LIVERIES, MACHINES, PAINTS, RUBBER, Size, pick
from slidr.data.synthetic.shapes import Kind, Parts, turn
from slidr.data.synthetic.textures import Material

DARK = np.full(3, 0.13, np.float32)
GREASE = np.array([0.22, 0.17, 0.12], np.float32)


def wheels(
    parts: Parts, rng: np.random.Generator, axles: list[float], width: float, radius: float, thick: float
) -> None:
    hub = np.full(3, rng.uniform(0.25, 0.7), np.float32)
    for x in axles:
        for side in (-1, 1):
            parts.add(
                Kind.CYLINDER,
                (x, side * (width / 2 - thick / 2 + 0.01), radius),
                (2 * radius, 2 * radius, thick),
                RUBBER,
                Material.TRACK,
                accent=hub,
                pattern=(rng.uniform(0.5, 0.68), 0),
                rotation=turn("x", np.pi / 2),
                reflectivity=rng.uniform(0.02, 0.12),
            )


def car(parts: Parts, rng: np.random.Generator) -> Size:
    """Hatchback, saloon, estate, van or pick-up by proportion."""
    parts.reflectivity = rng.uniform(0.04, 0.6)
    colour = pick(rng, CAR_PAINTS)
    van = rng.random() < 0.2
    length = rng.uniform(4.4, 5.3) if van else rng.uniform(3.7, 4.9)
    width = rng.uniform(1.7, 1.95)
    height = rng.uniform(1.8, 2.15) if van else rng.uniform(1.38, 1.75)
    belt = rng.uniform(0.5, 0.56) * height if not van else 0.5 * height
    floor = rng.uniform(0.18, 0.3)
    parts.add(
        Kind.TAPER,
        (0, 0, (floor + belt) / 2),
        (length, width, belt - floor),
        colour,
        Material.CAR_BODY,
        taper=(rng.uniform(0.94, 0.98), rng.uniform(0.92, 0.98), 0.0),
    )
    if van:
        cabin, middle, lean = length * 0.86, -0.05 * length, (0.82, 0.86, -0.25)
    else:
        cabin = length * rng.uniform(0.55, 0.72)
        middle = -rng.uniform(0.02, 0.1) * length
        lean = (rng.uniform(0.58, 0.78), rng.uniform(0.74, 0.86), rng.uniform(-0.2, 0.05))
    parts.add(
        Kind.TAPER,
        (middle, 0, (belt + height) / 2),
        (cabin, width * 0.94, height - belt),
        colour,
        Material.CABIN,
        taper=lean,
        pattern=(rng.uniform(0.8, 1.15), rng.uniform(0.07, 0.14)),
        reflectivity=parts.reflectivity * 0.5,
    )
    if rng.random() < 0.25:
        rack = np.full(3, 0.12, np.float32)
        parts.add(Kind.BOX, (middle, 0, height + 0.06), (cabin * 0.5, width * 0.6, 0.1), rack)
    for side in (-1, 1):
        parts.add(
            Kind.BOX,
            (0.22 * length, side * (width / 2 + 0.06), belt + 0.05),
            (0.12, 0.16, 0.12),
            colour * 0.8,
        )
    radius = rng.uniform(0.3, 0.36)
    wheels(parts, rng, [0.31 * length, -0.31 * length], width, radius, 0.22)
    return length, width, height


def bus(parts: Parts, rng: np.random.Generator) -> Size:
    parts.reflectivity = rng.uniform(0.08, 0.6)
    length, width, height = rng.uniform(8.0, 11.0), rng.uniform(2.45, 2.6), rng.uniform(2.9, 3.4)
    parts.add(
        Kind.TAPER,
        (0, 0, (0.32 + height) / 2),
        (length, width, height - 0.32),
        pick(rng, LIVERIES),
        Material.BUS,
        accent=pick(rng, LIVERIES),
        pattern=(rng.uniform(1.1, 1.9), rng.uniform(0.38, 0.55)),
        taper=(0.985, 0.97, 0),
    )
    unit = np.full(3, rng.uniform(0.5, 0.85), np.float32)
    parts.add(Kind.BOX, (-0.1 * length, 0, height + 0.1), (length * 0.3, width * 0.6, 0.25), unit)
    for side in (-1, 1):
        parts.add(Kind.BOX, (length / 2 + 0.1, side * (width / 2 + 0.12), height * 0.68), (0.12, 0.18, 0.4), RUBBER)
    wheels(parts, rng, [0.32 * length, -0.28 * length], width, 0.48, 0.3)
    return length, width, height + 0.2


def truck(parts: Parts, rng: np.random.Generator) -> Size:
    """A cab and a box, a tipper or a flatbed with a load."""
    parts.reflectivity = rng.uniform(0.05, 0.6)
    length, width = rng.uniform(6.0, 8.5), rng.uniform(2.2, 2.5)
    colour = pick(rng, PAINTS)
    cab, tall = rng.uniform(1.7, 2.1), rng.uniform(2.3, 2.9)
    front = length / 2 - cab / 2
    parts.add(Kind.BOX, (front, 0, 0.85), (cab, width * 0.96, 0.9), colour, Material.CAR_BODY)
    parts.add(
        Kind.TAPER,
        (front, 0, (1.3 + tall) / 2),
        (cab, width * 0.95, tall - 1.3),
        colour,
        Material.CABIN,
        taper=(0.84, 0.93, -0.12),
        pattern=(cab * 0.9, 0.35),
    )
    parts.add(Kind.BOX, (-cab / 2, 0, 0.8), (length - cab, 0.9, 0.3), np.full(3, 0.1, np.float32))
    top = _truck_body(parts, rng, -cab / 2 - 0.1, length - cab - 0.2, width)
    wheels(parts, rng, [length / 2 - 1.1, -length / 2 + 1.2, -length / 2 + 2.3], width, 0.48, 0.3)
    return length, width, max(top, tall)


def _truck_body(parts: Parts, rng: np.random.Generator, middle: float, bed: float, width: float) -> float:
    """What a truck carries on its bed; returns how high it reaches."""
    top = rng.uniform(2.6, 3.5)
    kind = rng.random()
    if kind < 0.55:
        body = pick(rng, BOXES)
        pattern = (rng.uniform(0.2, 0.5), 0.0)
        centre, size = (middle, 0, (1.0 + top) / 2), (bed, width, top - 1.0)
        parts.add(Kind.BOX, centre, size, body, Material.BOX_BODY, accent=pick(rng, PAINTS), pattern=pattern)
        return top
    body = pick(rng, MACHINES if kind < 0.65 else BOXES + PAINTS[1:6])
    top = 2.0 if kind < 0.8 else 1.5
    parts.add(
        Kind.TAPER,
        (middle, 0, (1.0 + top) / 2),
        (bed * 0.94, width * 0.92, top - 1.0),
        body,
        Material.PANEL,
        pattern=(0.6, 0.0),
        taper=(1.06, 1.08, 0),
    )
    load = pick(rng, [(0.45, 0.36, 0.26), (0.5, 0.5, 0.48), (0.55, 0.42, 0.28)])
    heap = (bed * 0.85, width * 0.8, 1.1)
    parts.add(Kind.ELLIPSOID, (middle, 0, top), heap, load, Material.GRASS, accent=load * 0.8)
    return top + 0.5


def trailer(parts: Parts, rng: np.random.Generator) -> Size:
    """A parked semi-trailer, a small tarpaulin trailer, or a flat one with a load."""
    parts.reflectivity = rng.uniform(0.05, 0.6)
    kind = rng.random()
    colour, accent = pick(rng, CURTAINS), pick(rng, BOXES)
    if kind < 0.6:
        size, axles, radius = _semi_trailer(parts, rng, colour, accent)
    elif kind < 0.88:
        size, axles, radius = _covered_trailer(parts, rng, colour)
    else:
        size, axles, radius = _flat_trailer(parts, rng)
    parts.add(Kind.BOX, (size[0] / 2 + 0.5, 0, 0.6), (1.1, 0.12, 0.12), DARK)
    wheels(parts, rng, axles, size[1], radius, 0.25)
    return size


def _semi_trailer(
    parts: Parts, rng: np.random.Generator, colour: np.ndarray, accent: np.ndarray
) -> tuple[Size, list[float], float]:
    length, width, top = rng.uniform(6.0, 9.0), rng.uniform(2.3, 2.5), rng.uniform(3.0, 3.7)
    parts.add(
        Kind.BOX,
        (0, 0, (1.15 + top) / 2),
        (length, width, top - 1.15),
        colour,
        Material.CURTAIN,
        accent=accent,
        pattern=(rng.uniform(0.6, 0.9), rng.uniform(0.1, 0.3)),
    )
    parts.add(Kind.BOX, (0, 0, 1.05), (length * 0.96, 1.0, 0.22), DARK)
    for side in (-1, 1):
        parts.add(Kind.BOX, (0.28 * length, side * 0.6, 0.5), (0.14, 0.14, 1.0), DARK)
        parts.add(Kind.BOX, (-0.02 * length, side * width * 0.46, 0.75), (length * 0.3, 0.05, 0.5), DARK + 0.25)
    return (length, width, top), [-0.3 * length, -0.3 * length - 1.15], 0.48


def _covered_trailer(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> tuple[Size, list[float], float]:
    length, width, top = rng.uniform(3.0, 4.4), rng.uniform(1.6, 2.0), rng.uniform(1.7, 2.2)
    parts.add(Kind.BOX, (0, 0, 0.72), (length, width, 0.4), DARK + 0.3, Material.PANEL, pattern=(0.5, 0.0))
    cover = (length, width, top - 0.92)
    parts.add(Kind.TAPER, (0, 0, (0.92 + top) / 2), cover, colour, Material.CLOTH, taper=(0.96, 0.86, 0))
    return (length, width, top), [-0.1], 0.33


def _flat_trailer(parts: Parts, rng: np.random.Generator) -> tuple[Size, list[float], float]:
    length, width = rng.uniform(4.5, 6.0), rng.uniform(2.0, 2.4)
    bed = pick(rng, [(0.4, 0.28, 0.18), (0.3, 0.3, 0.3)])
    parts.add(Kind.BOX, (0, 0, 0.8), (length, width, 0.25), bed, Material.PANEL, pattern=(0.3, 0.0))
    for k in range(3):
        pipe = pick(rng, [(0.5, 0.5, 0.48), (0.45, 0.33, 0.22)])
        size = (0.56, 0.56, length * 0.85)
        lying = turn("y", np.pi / 2)
        parts.add(Kind.CYLINDER, (0, (k - 1) * 0.6, 1.2), size, pipe, Material.CONCRETE, rotation=lying)
    return (length, width, 1.6), [-0.2 * length, -0.2 * length - 0.9], 0.36


def construction_vehicle(parts: Parts, rng: np.random.Generator) -> Size:
    """An excavator, a wheel loader or a roller."""
    parts.reflectivity = rng.uniform(0.06, 0.5)
    colour = pick(rng, MACHINES)
    kind = rng.random()
    return (_excavator if kind < 0.5 else _loader if kind < 0.8 else _roller)(parts, rng, colour)


def _hull(parts: Parts, colour: np.ndarray, centre: tuple, size: tuple, taper: tuple = (1.0, 1.0, 0.0)) -> None:
    parts.add(Kind.TAPER, centre, size, colour, Material.MACHINE, accent=GREASE, taper=taper)


def _cab(parts: Parts, colour: np.ndarray, centre: tuple, size: tuple) -> None:
    parts.add(Kind.TAPER, centre, size, colour, Material.CABIN, taper=(0.9, 0.92, 0), pattern=(size[0], 0.16))


def _excavator(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    for side in (-1, 1):
        parts.add(Kind.TAPER, (0, side * 0.95, 0.4), (3.2, 0.5, 0.8), DARK, Material.TRACK, taper=(0.8, 1, 0))
    parts.add(Kind.CYLINDER, (0, 0, 0.9), (1.6, 1.6, 0.25), DARK)
    _hull(parts, colour, (-0.35, 0, 1.45), (2.7, 2.3, 0.9), (0.94, 0.96, 0.05))
    _cab(parts, colour, (0.45, 0.65, 2.2), (1.3, 0.95, 1.5))
    reach, lift = rng.uniform(2.2, 2.9), rng.uniform(3.0, 3.9)
    tip = (reach + rng.uniform(0.9, 1.5), -0.25, rng.uniform(1.0, 1.8))
    parts.bar((0.7, -0.25, 1.6), (reach, -0.25, lift), (0.3, 0.42), colour, Material.MACHINE, accent=GREASE)
    parts.bar((reach, -0.25, lift), tip, (0.3, 0.34), colour, Material.MACHINE, accent=GREASE)
    parts.add(Kind.TAPER, (tip[0], -0.25, tip[2] - 0.35), (0.8, 1.0, 0.75), DARK + 0.15, taper=(0.6, 1, -0.15))
    return 6.2, 2.5, lift


def _loader(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    _hull(parts, colour, (-1.1, 0, 1.45), (2.3, 1.9, 1.0), (0.9, 0.9, 0.1))
    _cab(parts, colour, (0.1, 0, 2.3), (1.4, 1.5, 1.5))
    _hull(parts, colour, (1.0, 0, 1.0), (1.4, 1.1, 0.8))
    for y in (0.45, -0.45):
        parts.bar((0.9, y, 1.6), (2.4, y, 0.8), (0.3, 0.3), colour, Material.MACHINE, accent=GREASE)
    bucket = (2.75, 0, rng.uniform(0.5, 1.1))
    _hull(parts, DARK + 0.2, bucket, (1.0, 2.4, 0.9), (1.3, 1, 0.1))
    wheels(parts, rng, [1.1, -1.3], 2.3, 0.68, 0.5)
    return 6.0, 2.5, 3.05


def _roller(parts: Parts, rng: np.random.Generator, colour: np.ndarray) -> Size:
    axle = turn("x", np.pi / 2)
    drum = (1.3, 1.3, 1.9)
    parts.add(Kind.CYLINDER, (1.5, 0, 0.65), drum, DARK + 0.25, Material.MACHINE, accent=GREASE, rotation=axle)
    _hull(parts, colour, (1.2, 0, 1.25), (1.7, 2.1, 0.35))
    _hull(parts, colour, (-0.9, 0, 1.2), (2.2, 1.6, 1.0), (0.9, 0.9, 0))
    _cab(parts, colour, (0.0, 0, 2.1), (1.3, 1.4, 1.3))
    parts.add(Kind.BOX, (0.0, 0, 2.85), (1.7, 1.6, 0.12), colour)
    wheels(parts, rng, [-1.2], 1.9, 0.65, 0.5)
    return 4.6, 2.1, 2.95
