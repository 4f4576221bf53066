"""What stands and moves in the street: one maker per kind of object, each drawn anew from a random generator.

A maker adds its parts in the object's own frame (x forward, y left, z up, on the ground) and returns the size of the object's
box (length, width, height) in metres. Colours, sizes and lidar reflectivities are drawn from ranges that overlap between
classes: an orange thing may be a cone, a barrier, a machine or a jacket.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from slidr.data.synthetic.shapes import Kind, Parts, turn
from slidr.data.synthetic.textures import Material

Size = tuple[float, float, float]

RUBBER = np.array([0.055, 0.055, 0.06], np.float32)
WHITE = np.array([0.86, 0.86, 0.84], np.float32)
ORANGE = np.array([0.93, 0.34, 0.07], np.float32)
_VEHICLE = [
    (0.8, 0.8, 0.8),
    (0.55, 0.56, 0.58),
    (0.12, 0.12, 0.13),
    (0.3, 0.31, 0.33),
    (0.55, 0.08, 0.07),
    (0.1, 0.18, 0.42),
]
_VEHICLE += [
    (0.62, 0.6, 0.5),
    (0.12, 0.3, 0.2),
    (0.85, 0.65, 0.1),
    (0.4, 0.25, 0.15),
    (0.35, 0.5, 0.65),
    (0.75, 0.35, 0.1),
]
_CAR = _VEHICLE[:7] * 2 + _VEHICLE[7:]
_LIVERY = [(0.75, 0.1, 0.1), (0.1, 0.45, 0.25), (0.88, 0.88, 0.86), (0.85, 0.6, 0.1), (0.2, 0.4, 0.7), (0.8, 0.4, 0.3)]
_BOX = [(0.88, 0.88, 0.86), (0.8, 0.78, 0.7), (0.7, 0.72, 0.75), (0.5, 0.62, 0.75), (0.75, 0.45, 0.2)]
_CURTAIN = [
    (0.12, 0.22, 0.5),
    (0.1, 0.35, 0.25),
    (0.55, 0.12, 0.12),
    (0.3, 0.32, 0.35),
    (0.2, 0.45, 0.65),
    (0.75, 0.7, 0.6),
]
_CLOTHES = [
    (0.1, 0.1, 0.12),
    (0.15, 0.2, 0.35),
    (0.6, 0.58, 0.55),
    (0.55, 0.1, 0.12),
    (0.2, 0.35, 0.22),
    (0.85, 0.83, 0.8),
]
_CLOTHES += [
    (0.35, 0.25, 0.18),
    (0.8, 0.6, 0.2),
    (0.25, 0.45, 0.6),
    (0.5, 0.3, 0.45),
    (0.9, 0.45, 0.1),
    (0.3, 0.3, 0.32),
]
_MACHINE = [
    (0.9, 0.65, 0.08),
    (0.88, 0.45, 0.06),
    (0.85, 0.7, 0.15),
    (0.9, 0.6, 0.1),
    (0.92, 0.62, 0.05),
    (0.6, 0.32, 0.18),
]
_SKIN = [(0.85, 0.65, 0.53), (0.62, 0.43, 0.32), (0.36, 0.24, 0.17), (0.75, 0.55, 0.42)]


def pick(rng: np.random.Generator, colours: list, spread: float = 0.06) -> Float32[np.ndarray, " 3"]:
    """One of the colours, a little changed."""
    colour = np.asarray(colours[rng.integers(len(colours))]) + rng.normal(0, spread, 3) * 0.6
    return np.clip(colour * rng.uniform(0.85, 1.15), 0.02, 0.95).astype(np.float32)


def _wheels(
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
    colour = pick(rng, _CAR)
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
    _wheels(parts, rng, [0.31 * length, -0.31 * length], width, radius, 0.22)
    return length, width, height


def bus(parts: Parts, rng: np.random.Generator) -> Size:
    parts.reflectivity = rng.uniform(0.08, 0.6)
    length, width, height = rng.uniform(8.0, 11.0), rng.uniform(2.45, 2.6), rng.uniform(2.9, 3.4)
    parts.add(
        Kind.TAPER,
        (0, 0, (0.32 + height) / 2),
        (length, width, height - 0.32),
        pick(rng, _LIVERY),
        Material.BUS,
        accent=pick(rng, _LIVERY),
        pattern=(rng.uniform(1.1, 1.9), rng.uniform(0.38, 0.55)),
        taper=(0.985, 0.97, 0),
    )
    unit = np.full(3, rng.uniform(0.5, 0.85), np.float32)
    parts.add(Kind.BOX, (-0.1 * length, 0, height + 0.1), (length * 0.3, width * 0.6, 0.25), unit)
    for side in (-1, 1):
        parts.add(Kind.BOX, (length / 2 + 0.1, side * (width / 2 + 0.12), height * 0.68), (0.12, 0.18, 0.4), RUBBER)
    _wheels(parts, rng, [0.32 * length, -0.28 * length], width, 0.48, 0.3)
    return length, width, height + 0.2


def truck(parts: Parts, rng: np.random.Generator) -> Size:
    """A cab and a box, a tipper or a flatbed with a load."""
    parts.reflectivity = rng.uniform(0.05, 0.6)
    length, width = rng.uniform(6.0, 8.5), rng.uniform(2.2, 2.5)
    colour = pick(rng, _VEHICLE)
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
    dark = np.full(3, 0.1, np.float32)
    parts.add(Kind.BOX, (-cab / 2, 0, 0.8), (length - cab, 0.9, 0.3), dark)
    bed, middle = length - cab - 0.2, -cab / 2 - 0.1
    top = rng.uniform(2.6, 3.5)
    kind = rng.random()
    if kind < 0.55:
        body = pick(rng, _BOX)
        material = (Material.PANEL, (rng.uniform(0.3, 0.9), rng.uniform(0, 0.35)))
        parts.add(
            Kind.BOX,
            (middle, 0, (1.0 + top) / 2),
            (bed, width, top - 1.0),
            body,
            material[0],
            accent=pick(rng, _VEHICLE),
            pattern=material[1],
        )
    else:
        body = pick(rng, _MACHINE if kind < 0.65 else _BOX + _VEHICLE[1:6])
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
        parts.add(
            Kind.ELLIPSOID,
            (middle, 0, top),
            (bed * 0.85, width * 0.8, 1.1),
            load,
            Material.GRASS,
            accent=load * 0.8,
        )
        top += 0.5
    _wheels(parts, rng, [length / 2 - 1.1, -length / 2 + 1.2, -length / 2 + 2.3], width, 0.48, 0.3)
    return length, width, max(top, tall)


def trailer(parts: Parts, rng: np.random.Generator) -> Size:
    """A parked semi-trailer, a small tarpaulin trailer, or a flat one with a load."""
    parts.reflectivity = rng.uniform(0.05, 0.6)
    kind = rng.random()
    colour, accent = pick(rng, _CURTAIN), pick(rng, _BOX)
    dark = np.full(3, 0.12, np.float32)
    if kind < 0.6:
        length, width, top = rng.uniform(6.0, 9.0), rng.uniform(2.3, 2.5), rng.uniform(3.0, 3.7)
        box = (0, 0, (1.15 + top) / 2)
        parts.add(
            Kind.BOX,
            box,
            (length, width, top - 1.15),
            colour,
            Material.CURTAIN,
            accent=accent,
            pattern=(rng.uniform(0.6, 0.9), rng.uniform(0.1, 0.3)),
        )
        parts.add(Kind.BOX, (0, 0, 1.05), (length * 0.96, 1.0, 0.22), dark)
        axles = [-0.3 * length, -0.3 * length - 1.15]
        for side in (-1, 1):
            parts.add(Kind.BOX, (0.28 * length, side * 0.6, 0.5), (0.14, 0.14, 1.0), dark)
            parts.add(Kind.BOX, (-0.02 * length, side * width * 0.46, 0.75), (length * 0.3, 0.05, 0.5), dark + 0.25)
        radius = 0.48
    elif kind < 0.88:
        length, width, top = rng.uniform(3.0, 4.4), rng.uniform(1.6, 2.0), rng.uniform(1.7, 2.2)
        parts.add(Kind.BOX, (0, 0, 0.72), (length, width, 0.4), dark + 0.3, Material.PANEL, pattern=(0.5, 0.0))
        parts.add(
            Kind.TAPER,
            (0, 0, (0.92 + top) / 2),
            (length, width, top - 0.92),
            colour,
            Material.CLOTH,
            taper=(0.96, 0.86, 0),
        )
        axles, radius = [-0.1], 0.33
    else:
        length, width, top = rng.uniform(4.5, 6.0), rng.uniform(2.0, 2.4), 1.6
        parts.add(
            Kind.BOX,
            (0, 0, 0.8),
            (length, width, 0.25),
            pick(rng, [(0.4, 0.28, 0.18), (0.3, 0.3, 0.3)]),
            Material.PANEL,
            pattern=(0.3, 0.0),
        )
        for k in range(3):
            parts.add(
                Kind.CYLINDER,
                (0, (k - 1) * 0.6, 1.2),
                (0.56, 0.56, length * 0.85),
                pick(rng, [(0.5, 0.5, 0.48), (0.45, 0.33, 0.22)]),
                Material.CONCRETE,
                rotation=turn("y", np.pi / 2),
            )
        axles, radius = [-0.2 * length, -0.2 * length - 0.9], 0.36
    parts.add(Kind.BOX, (length / 2 + 0.5, 0, 0.6), (1.1, 0.12, 0.12), dark)
    _wheels(parts, rng, axles, width, radius, 0.25)
    return length, width, top


def construction_vehicle(parts: Parts, rng: np.random.Generator) -> Size:
    """An excavator, a wheel loader or a roller."""
    parts.reflectivity = rng.uniform(0.06, 0.5)
    colour = pick(rng, _MACHINE)
    grease = np.array([0.22, 0.17, 0.12], np.float32)
    dark = np.full(3, 0.13, np.float32)
    kind = rng.random()

    def body(centre: tuple, size: tuple, **extra: object) -> None:
        parts.add(Kind.TAPER, centre, size, colour, Material.MACHINE, accent=grease, **extra)  # type: ignore[arg-type]

    def cabin(centre: tuple, size: tuple) -> None:
        parts.add(Kind.TAPER, centre, size, colour, Material.CABIN, taper=(0.9, 0.92, 0), pattern=(size[0], 0.16))

    def bar(start: tuple, end: tuple, thick: float) -> None:
        a, b = np.array(start), np.array(end)
        span = b - a
        tilt = turn("y", -np.arctan2(span[2], span[0]))
        parts.add(
            Kind.BOX,
            tuple((a + b) / 2),
            (float(np.linalg.norm(span)), 0.3, thick),
            colour,
            Material.MACHINE,
            accent=grease,
            rotation=tilt,
        )

    if kind < 0.5:
        for side in (-1, 1):
            parts.add(Kind.TAPER, (0, side * 0.95, 0.4), (3.2, 0.5, 0.8), dark, Material.TRACK, taper=(0.8, 1, 0))
        parts.add(Kind.CYLINDER, (0, 0, 0.9), (1.6, 1.6, 0.25), dark)
        body((-0.35, 0, 1.45), (2.7, 2.3, 0.9), taper=(0.94, 0.96, 0.05))
        cabin((0.45, 0.65, 2.2), (1.3, 0.95, 1.5))
        reach, lift = rng.uniform(2.2, 2.9), rng.uniform(3.0, 3.9)
        bar((0.7, -0.25, 1.6), (reach, -0.25, lift), 0.42)
        tip = (reach + rng.uniform(0.9, 1.5), -0.25, rng.uniform(1.0, 1.8))
        bar((reach, -0.25, lift), tip, 0.34)
        parts.add(Kind.TAPER, (tip[0], -0.25, tip[2] - 0.35), (0.8, 1.0, 0.75), dark + 0.15, taper=(0.6, 1, -0.15))
        return 6.2, 2.5, lift
    if kind < 0.8:
        body((-1.1, 0, 1.45), (2.3, 1.9, 1.0), taper=(0.9, 0.9, 0.1))
        cabin((0.1, 0, 2.3), (1.4, 1.5, 1.5))
        body((1.0, 0, 1.0), (1.4, 1.1, 0.8))
        bar((0.9, 0.45, 1.6), (2.4, 0.45, 0.8), 0.3)
        bar((0.9, -0.45, 1.6), (2.4, -0.45, 0.8), 0.3)
        bucket = rng.uniform(0.5, 1.1)
        parts.add(
            Kind.TAPER,
            (2.75, 0, bucket),
            (1.0, 2.4, 0.9),
            dark + 0.2,
            Material.MACHINE,
            accent=grease,
            taper=(1.3, 1, 0.1),
        )
        _wheels(parts, rng, [1.1, -1.3], 2.3, 0.68, 0.5)
        return 6.0, 2.5, 3.05
    parts.add(
        Kind.CYLINDER,
        (1.5, 0, 0.65),
        (1.3, 1.3, 1.9),
        dark + 0.25,
        Material.MACHINE,
        accent=grease,
        rotation=turn("x", np.pi / 2),
    )
    body((1.2, 0, 1.25), (1.7, 2.1, 0.35))
    body((-0.9, 0, 1.2), (2.2, 1.6, 1.0), taper=(0.9, 0.9, 0))
    cabin((0.0, 0, 2.1), (1.3, 1.4, 1.3))
    parts.add(Kind.BOX, (0.0, 0, 2.85), (1.7, 1.6, 0.12), colour)
    _wheels(parts, rng, [-1.2], 1.9, 0.65, 0.5)
    return 4.6, 2.1, 2.95


def _person(
    parts: Parts,
    rng: np.random.Generator,
    *,
    at: tuple[float, float, float] = (0, 0, 0),
    height: float = 1.72,
    pose: str = "walk",
) -> None:
    """A person by limbs; poses: walk, stand, ride (legs forward)."""
    x, y, z = at
    k = height / 1.72
    top, bottom, skin = pick(rng, _CLOTHES), pick(rng, _CLOTHES), pick(rng, _SKIN, 0.02)
    hair = pick(rng, [(0.08, 0.06, 0.05), (0.3, 0.2, 0.1), (0.6, 0.5, 0.35), (0.5, 0.5, 0.5), (0.85, 0.4, 0.1)], 0.03)
    shoe = np.full(3, rng.uniform(0.05, 0.4), np.float32)
    stride = rng.uniform(0.15, 0.5) if pose == "walk" else rng.uniform(0, 0.08)
    wide = rng.uniform(0.85, 1.25)
    for side in (-1, 1):
        swing = turn("y", side * stride if pose != "ride" else -0.95)
        hip = np.array([x, y + side * 0.1 * k, z + 0.86 * k])
        leg = swing @ np.array([0, 0, -0.42 * k])
        parts.add(
            Kind.TAPER,
            tuple(hip + leg),
            (0.16 * k, 0.15 * k, 0.86 * k),
            bottom,
            Material.CLOTH,
            rotation=swing,
            taper=(1.3, 1.25, 0),
        )
        foot = hip + 2 * leg
        parts.add(Kind.BOX, (foot[0] + 0.05, foot[1], foot[2] + 0.04), (0.27 * k, 0.1 * k, 0.09 * k), shoe)
        reach = turn("y", -side * stride * 0.9 if pose != "ride" else -0.9)
        shoulder = np.array([x, y + side * 0.25 * k * wide, z + 1.4 * k])
        arm = reach @ np.array([0, 0, -0.3 * k])
        parts.add(
            Kind.TAPER,
            tuple(shoulder + arm),
            (0.11 * k, 0.1 * k, 0.6 * k),
            top,
            Material.CLOTH,
            rotation=reach,
            taper=(1.3, 1.3, 0),
        )
        parts.add(Kind.ELLIPSOID, tuple(shoulder + 2.1 * arm), (0.1, 0.09, 0.12), skin)
    parts.add(
        Kind.TAPER,
        (x, y, z + 1.13 * k),
        (0.23 * k * wide, 0.33 * k * wide, 0.62 * k),
        top,
        Material.CLOTH,
        taper=(1.0, 1.25, 0),
    )
    parts.add(Kind.ELLIPSOID, (x + 0.01, y, z + 1.6 * k), (0.2 * k, 0.17 * k, 0.25 * k), skin)
    parts.add(Kind.ELLIPSOID, (x - 0.02, y, z + 1.65 * k), (0.21 * k, 0.19 * k, 0.2 * k), hair)
    if pose != "ride" and rng.random() < 0.4:
        parts.add(Kind.BOX, (x - 0.2 * k, y, z + 1.2 * k), (0.18, 0.3, 0.42), pick(rng, _CLOTHES), Material.CLOTH)


def pedestrian(parts: Parts, rng: np.random.Generator) -> Size:
    parts.reflectivity = rng.uniform(0.06, 0.6)
    height = rng.uniform(1.5, 1.92) if parts.label != 3 else rng.uniform(1.0, 1.4)
    _person(parts, rng, height=height, pose="walk" if rng.random() < 0.7 else "stand")
    return 0.7, 0.65, height


def bicycle(parts: Parts, rng: np.random.Generator, ridden: bool | None = None) -> Size:
    """Two spoked wheels and a frame; `ridden` adds its rider, who counts as part of it."""
    ridden = bool(rng.random() < 0.55) if ridden is None else ridden
    parts.reflectivity = rng.uniform(0.06, 0.5)
    colour = pick(rng, _VEHICLE)
    radius = rng.uniform(0.31, 0.36)
    lean = turn("x", np.pi / 2)
    for x in (-0.52, 0.52):
        parts.add(Kind.CYLINDER, (x, 0, radius), (2 * radius, 2 * radius, 0.06), RUBBER, rotation=lean, inner=0.8)
        parts.add(Kind.CYLINDER, (x, 0, radius), (0.12, 0.12, 0.09), np.full(3, 0.5, np.float32), rotation=lean)
        parts.add(Kind.BOX, (x, 0, radius), (2 * radius, 0.02, 0.03), np.full(3, 0.35, np.float32))
        parts.add(Kind.BOX, (x, 0, radius), (0.03, 0.02, 2 * radius), np.full(3, 0.35, np.float32))
        parts.add(Kind.BOX, (x, 0, 2 * radius + 0.04), (0.45, 0.07, 0.04), colour)

    def tube(a: tuple[float, float], b: tuple[float, float]) -> None:
        span = np.array([b[0] - a[0], 0, b[1] - a[1]])
        tilt = turn("y", -np.arctan2(span[2], span[0]))
        centre = ((a[0] + b[0]) / 2, 0.0, (a[1] + b[1]) / 2)
        parts.add(Kind.BOX, centre, (float(np.linalg.norm(span)), 0.05, 0.06), colour, rotation=tilt)

    for a, b in (
        ((-0.52, radius), (-0.1, 0.3)),
        ((-0.1, 0.3), (-0.22, 0.82)),
        ((-0.1, 0.3), (0.38, 0.8)),
        ((-0.2, 0.75), (0.38, 0.8)),
        ((-0.52, radius), (-0.2, 0.75)),
        ((0.52, radius), (0.36, 1.0)),
    ):
        tube(a, b)
    parts.add(Kind.BOX, (0.36, 0, 1.02), (0.06, 0.56, 0.06), RUBBER)
    parts.add(Kind.ELLIPSOID, (-0.24, 0, 0.88), (0.28, 0.17, 0.1), RUBBER)
    if rng.random() < 0.5:
        parts.add(
            Kind.BOX,
            (0.6, 0, 0.85),
            (0.3, 0.34, 0.24),
            pick(rng, [(0.4, 0.3, 0.2), (0.2, 0.2, 0.2)]),
            Material.CLOTH,
        )
    if ridden:
        _person(parts, rng, at=(-0.2, 0, 0.1), height=rng.uniform(1.6, 1.8), pose="ride")
        return 1.75, 0.65, 1.85
    return 1.75, 0.6, 1.08


def motorcycle(parts: Parts, rng: np.random.Generator, ridden: bool | None = None) -> Size:
    """A scooter or a motorcycle; `ridden` adds its rider, who counts as part of it."""
    ridden = bool(rng.random() < 0.5) if ridden is None else ridden
    parts.reflectivity = rng.uniform(0.05, 0.55)
    colour = pick(rng, _VEHICLE)
    metal = np.full(3, rng.uniform(0.15, 0.5), np.float32)
    radius = rng.uniform(0.27, 0.33)
    lean = turn("x", np.pi / 2)
    for x in (-0.65, 0.68):
        parts.add(
            Kind.CYLINDER,
            (x, 0, radius),
            (2 * radius, 2 * radius, 0.15),
            RUBBER,
            Material.TRACK,
            accent=metal,
            pattern=(0.5, 0),
            rotation=lean,
        )
    scooter = rng.random() < 0.5
    if scooter:
        parts.add(Kind.TAPER, (-0.45, 0, 0.55), (0.85, 0.34, 0.5), colour, taper=(0.9, 0.85, 0))
        parts.add(Kind.BOX, (0.1, 0, 0.33), (0.6, 0.34, 0.12), colour * 0.7)
        parts.add(
            Kind.TAPER,
            (0.48, 0, 0.65),
            (0.18, 0.44, 0.75),
            colour,
            rotation=turn("y", -0.25),
            taper=(0.8, 0.8, 0),
        )
    else:
        parts.add(Kind.BOX, (0.02, 0, 0.45), (0.65, 0.32, 0.4), metal, Material.MACHINE, accent=RUBBER)
        parts.add(Kind.ELLIPSOID, (0.15, 0, 0.82), (0.7, 0.36, 0.36), colour)
        parts.add(Kind.TAPER, (-0.62, 0, 0.72), (0.5, 0.26, 0.2), colour, taper=(0.8, 0.8, -0.05))
        parts.add(Kind.BOX, (0.6, 0, 0.62), (0.1, 0.22, 0.7), metal, rotation=turn("y", -0.4))
        parts.add(Kind.TAPER, (0.55, 0, 1.02), (0.22, 0.36, 0.3), colour, taper=(0.5, 0.8, -0.05))
    parts.add(Kind.TAPER, (-0.35, 0, 0.86), (0.75, 0.3, 0.13), RUBBER + 0.02)
    parts.add(Kind.BOX, (0.42, 0, 1.06), (0.06, 0.74, 0.06), RUBBER)
    parts.add(Kind.BOX, (0.62, 0, 0.88), (0.08, 0.2, 0.18), np.array([0.9, 0.9, 0.82], np.float32))
    parts.add(Kind.BOX, (-0.9, 0, 0.7), (0.05, 0.2, 0.1), np.array([0.7, 0.06, 0.05], np.float32))
    if rng.random() < 0.4:
        parts.add(Kind.BOX, (-0.75, 0, 1.08), (0.42, 0.42, 0.36), pick(rng, _CLOTHES))
    if ridden:
        _person(parts, rng, at=(-0.3, 0, 0.12), height=rng.uniform(1.6, 1.8), pose="ride")
        helmet = pick(rng, _VEHICLE)
        parts.add(Kind.ELLIPSOID, (-0.3, 0, 1.76), (0.32, 0.28, 0.32), helmet)
        return 2.05, 0.8, 1.95
    return 2.05, 0.8, 1.15


def barrier(parts: Parts, rng: np.random.Generator) -> Size:
    """A concrete wall element, a water-filled plastic one, or a striped board on legs."""
    kind = rng.random()
    parts.reflectivity = rng.uniform(0.1, 0.7)
    length = rng.uniform(1.6, 2.4)
    colour = pick(rng, [ORANGE, (0.75, 0.1, 0.08), WHITE, (0.85, 0.7, 0.15)], 0.04)
    if kind < 0.35:
        grey = np.full(3, rng.uniform(0.45, 0.68), np.float32) * np.array([1, 0.98, 0.94], np.float32)
        striped = rng.random() < 0.4
        parts.add(
            Kind.TAPER,
            (0, 0, 0.12),
            (length, 0.62, 0.24),
            grey,
            Material.CONCRETE,
            pattern=(length, 0),
            taper=(1, 0.75, 0),
        )
        parts.add(
            Kind.TAPER,
            (0, 0, 0.55),
            (length, 0.4, 0.64),
            grey if not striped else colour,
            Material.DIAGONAL if striped else Material.CONCRETE,
            accent=WHITE,
            pattern=(0.7, 0),
            taper=(1, 0.5, 0),
        )
        return length, 0.62, 0.87
    if kind < 0.6:
        parts.add(
            Kind.TAPER,
            (0, 0, 0.45),
            (length * 0.96, 0.5, 0.9),
            colour,
            Material.PANEL,
            pattern=(0.5, 0.0),
            taper=(0.98, 0.4, 0),
        )
        parts.add(Kind.BOX, (0, 0, 0.06), (length * 0.96, 0.56, 0.12), colour * 0.7)
        return length, 0.56, 0.9
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
    colour = pick(rng, _VEHICLE + _MACHINE)
    kind = int(rng.integers(6))
    if kind == 0:
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
    if kind == 1:
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
    if kind == 2:
        parts.add(Kind.BOX, (0, 0, 0.65), (1.2, 0.5, 1.3), colour, Material.PANEL, pattern=(0.6, 0.0))
        return 1.2, 0.5, 1.3
    if kind == 3:
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
    if kind == 4:
        parts.add(
            Kind.CYLINDER,
            (0, 0, 1.4),
            (1.2, 1.2, 2.8),
            colour,
            Material.FACADE,
            accent=pick(rng, _VEHICLE),
            pattern=(1.2, 1.1),
        )
        return 1.2, 1.2, 2.8
    parts.add(Kind.BOX, (0, -0.6, 1.2), (3.4, 0.06, 2.2), np.full(3, 0.2, np.float32), Material.GLASS)
    parts.add(Kind.BOX, (0, 0, 2.4), (3.7, 1.5, 0.14), colour)
    for x in (-1.65, 1.65):
        parts.add(Kind.BOX, (x, -0.1, 1.2), (0.08, 1.1, 2.3), pick(rng, _VEHICLE), Material.SIGN, accent=WHITE)
    parts.add(Kind.BOX, (0, -0.3, 0.5), (2.2, 0.35, 0.08), pick(rng, [(0.45, 0.3, 0.18), (0.3, 0.3, 0.3)]))
    return 3.7, 1.5, 2.5


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
    if style == "house":
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
    if style == "hall":
        height = rng.uniform(5, 9)
        material = Material.PANEL if rng.random() < 0.3 else Material.CONCRETE
        parts.add(
            Kind.BOX,
            (0, 0, height / 2),
            (length, depth, height),
            colour,
            material,
            accent=pick(rng, _VEHICLE),
            pattern=(rng.uniform(0.5, 2.5), 0.12),
        )
        for k in range(int(length // 8)):
            parts.add(
                Kind.BOX,
                (-length / 2 + 4 + 8 * k, depth / 2 + 0.02, 1.8),
                (3.4, 0.12, 3.6),
                pick(rng, _VEHICLE),
                Material.BANDS,
                accent=colour * 0.6,
                pattern=(0.5, 0.12),
            )
        return length, depth, height
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
        awning = pick(rng, _VEHICLE + _MACHINE)
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


MAKERS: dict[str, Callable[[Parts, np.random.Generator], Size]] = {
    "vehicle.car": car,
    "vehicle.bus.rigid": bus,
    "vehicle.bus.bendy": bus,
    "vehicle.truck": truck,
    "vehicle.trailer": trailer,
    "vehicle.construction": construction_vehicle,
    "vehicle.motorcycle": motorcycle,
    "vehicle.bicycle": bicycle,
    "human.pedestrian.adult": pedestrian,
    "human.pedestrian.child": pedestrian,
    "human.pedestrian.construction_worker": pedestrian,
    "human.pedestrian.police_officer": pedestrian,
    "movable_object.barrier": barrier,
    "movable_object.trafficcone": traffic_cone,
}
