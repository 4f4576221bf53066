"""People, and what they ride: pedestrians, bicycles and motorcycles."""

from __future__ import annotations

import numpy as np

from slidr.data.synthetic.palette import CLOTHES, PAINTS, RUBBER, SKINS, Size, pick
from slidr.data.synthetic.shapes import Kind, Parts, turn
from slidr.data.synthetic.textures import Material


def person(
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
    top, bottom, skin = pick(rng, CLOTHES), pick(rng, CLOTHES), pick(rng, SKINS, 0.02)
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
        parts.add(Kind.BOX, (x - 0.2 * k, y, z + 1.2 * k), (0.18, 0.3, 0.42), pick(rng, CLOTHES), Material.CLOTH)


def pedestrian(parts: Parts, rng: np.random.Generator) -> Size:
    parts.reflectivity = rng.uniform(0.06, 0.6)
    height = rng.uniform(1.5, 1.92) if parts.label != 3 else rng.uniform(1.0, 1.4)
    person(parts, rng, height=height, pose="walk" if rng.random() < 0.7 else "stand")
    return 0.7, 0.65, height


def bicycle(parts: Parts, rng: np.random.Generator, ridden: bool | None = None) -> Size:
    """Two spoked wheels and a frame; `ridden` adds its rider, who counts as part of it."""
    ridden = bool(rng.random() < 0.55) if ridden is None else ridden
    parts.reflectivity = rng.uniform(0.06, 0.5)
    colour = pick(rng, PAINTS)
    radius = rng.uniform(0.31, 0.36)
    lean = turn("x", np.pi / 2)
    for x in (-0.52, 0.52):
        parts.add(Kind.CYLINDER, (x, 0, radius), (2 * radius, 2 * radius, 0.06), RUBBER, rotation=lean, inner=0.8)
        parts.add(Kind.CYLINDER, (x, 0, radius), (0.12, 0.12, 0.09), np.full(3, 0.5, np.float32), rotation=lean)
        parts.add(Kind.BOX, (x, 0, radius), (2 * radius, 0.02, 0.03), np.full(3, 0.35, np.float32))
        parts.add(Kind.BOX, (x, 0, radius), (0.03, 0.02, 2 * radius), np.full(3, 0.35, np.float32))
        parts.add(Kind.BOX, (x, 0, 2 * radius + 0.04), (0.45, 0.07, 0.04), colour)

    for a, b in (  # the frame's tubes, by (x, z) of their ends
        ((-0.52, radius), (-0.1, 0.3)),
        ((-0.1, 0.3), (-0.22, 0.82)),
        ((-0.1, 0.3), (0.38, 0.8)),
        ((-0.2, 0.75), (0.38, 0.8)),
        ((-0.52, radius), (-0.2, 0.75)),
        ((0.52, radius), (0.36, 1.0)),
    ):
        parts.bar((a[0], 0, a[1]), (b[0], 0, b[1]), (0.05, 0.06), colour)
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
        person(parts, rng, at=(-0.2, 0, 0.1), height=rng.uniform(1.6, 1.8), pose="ride")
        return 1.75, 0.65, 1.85
    return 1.75, 0.6, 1.08


def motorcycle(parts: Parts, rng: np.random.Generator, ridden: bool | None = None) -> Size:
    """A scooter or a motorcycle; `ridden` adds its rider, who counts as part of it."""
    ridden = bool(rng.random() < 0.5) if ridden is None else ridden
    parts.reflectivity = rng.uniform(0.05, 0.55)
    colour = pick(rng, PAINTS)
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
    (_scooter_frame if rng.random() < 0.5 else _motorcycle_frame)(parts, colour, metal)
    parts.add(Kind.TAPER, (-0.35, 0, 0.86), (0.75, 0.3, 0.13), RUBBER + 0.02)
    parts.add(Kind.BOX, (0.42, 0, 1.06), (0.06, 0.74, 0.06), RUBBER)
    parts.add(Kind.BOX, (0.62, 0, 0.88), (0.08, 0.2, 0.18), np.array([0.9, 0.9, 0.82], np.float32))
    parts.add(Kind.BOX, (-0.9, 0, 0.7), (0.05, 0.2, 0.1), np.array([0.7, 0.06, 0.05], np.float32))
    if rng.random() < 0.4:
        parts.add(Kind.BOX, (-0.75, 0, 1.08), (0.42, 0.42, 0.36), pick(rng, CLOTHES))
    if ridden:
        person(parts, rng, at=(-0.3, 0, 0.12), height=rng.uniform(1.6, 1.8), pose="ride")
        helmet = pick(rng, PAINTS)
        parts.add(Kind.ELLIPSOID, (-0.3, 0, 1.76), (0.32, 0.28, 0.32), helmet)
        return 2.05, 0.8, 1.95
    return 2.05, 0.8, 1.15


def _scooter_frame(parts: Parts, colour: np.ndarray, metal: np.ndarray) -> None:
    parts.add(Kind.TAPER, (-0.45, 0, 0.55), (0.85, 0.34, 0.5), colour, taper=(0.9, 0.85, 0))
    parts.add(Kind.BOX, (0.1, 0, 0.33), (0.6, 0.34, 0.12), colour * 0.7)
    shield = (0.18, 0.44, 0.75)
    parts.add(Kind.TAPER, (0.48, 0, 0.65), shield, colour, rotation=turn("y", -0.25), taper=(0.8, 0.8, 0))


def _motorcycle_frame(parts: Parts, colour: np.ndarray, metal: np.ndarray) -> None:
    parts.add(Kind.BOX, (0.02, 0, 0.45), (0.65, 0.32, 0.4), metal, Material.MACHINE, accent=RUBBER)
    parts.add(Kind.ELLIPSOID, (0.15, 0, 0.82), (0.7, 0.36, 0.36), colour)
    parts.add(Kind.TAPER, (-0.62, 0, 0.72), (0.5, 0.26, 0.2), colour, taper=(0.8, 0.8, -0.05))
    parts.add(Kind.BOX, (0.6, 0, 0.62), (0.1, 0.22, 0.7), metal, rotation=turn("y", -0.4))
    parts.add(Kind.TAPER, (0.55, 0, 1.02), (0.22, 0.36, 0.3), colour, taper=(0.5, 0.8, -0.05))
