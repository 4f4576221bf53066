"""Parts: the convex solids that everything in the synthetic world is made of, in one flat table.

An object (a car, a tree, a facade) is an owner number and some parts given in the object's own frame: x forward,
y left, z up, origin on the ground below its middle. `place` moves every part to where its owner is at a moment.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from slidr.shapes import Float64

PART = np.dtype(
    [
        ("kind", "i1"),
        ("material", "i1"),
        ("label", "u1"),  # lidarseg index
        ("owner", "i4"),  # row of the world's objects
        ("centre", "f8", 3),
        (
            "rotation",
            "f8",
            (3, 3),
        ),  # target_from_part, target the owner's frame or, once placed, the street's
        ("half", "f8", 3),  # half extents, metres
        ("taper", "f8", 3),  # boxes: top width over bottom width in x and y; shift of the top in x, metres
        (
            "inner",
            "f8",
        ),  # cylinders: radius of the hole over the outer one; ellipsoids: how open a crown of leaves is, 0 to 1
        ("colour", "f4", 3),
        ("accent", "f4", 3),  # the pattern's second colour
        ("pattern", "f4", 2),  # the pattern's sizes, see textures.py
        ("reflectivity", "f4"),  # of lidar light at normal incidence
        ("roughness", "f4"),  # metres of range spread that the surface adds
    ]
)


class Kind(IntEnum):
    """The solids. Boxes may taper upwards; cylinders stand along their z axis."""

    BOX = 0
    TAPER = 1
    ELLIPSOID = 2
    CYLINDER = 3


@dataclass
class Parts:
    """A growing list of parts that share an owner's label and lidar reflectivity unless told otherwise."""

    rows: list[tuple] = field(default_factory=list)
    owner: int = 0
    label: int = 0
    reflectivity: float = 0.3
    roughness: float = 0.0

    def add(
        self,
        kind: Kind,
        centre: tuple[float, float, float],
        size: tuple[float, float, float],
        colour: np.ndarray,
        material: int = 0,
        *,
        accent: np.ndarray | None = None,
        pattern: tuple[float, float] = (0.0, 0.0),
        rotation: Float64[np.ndarray, "3 3"] | None = None,
        taper: tuple[float, float, float] = (1.0, 1.0, 0.0),
        inner: float = 0.0,
        reflectivity: float | None = None,
        label: int | None = None,
    ) -> None:
        """Adds one part; `size` is its full extent in metres along its own axes."""
        self.rows.append(
            (
                int(kind),
                int(material),
                self.label if label is None else label,
                self.owner,
                centre,
                np.eye(3) if rotation is None else rotation,
                np.asarray(size) / 2,
                taper,
                inner,
                colour,
                colour if accent is None else accent,
                pattern,
                self.reflectivity if reflectivity is None else reflectivity,
                self.roughness,
            )
        )

    def bar(
        self,
        start: tuple[float, float, float],
        end: tuple[float, float, float],
        section: tuple[float, float],
        colour: np.ndarray,
        material: int = 0,
        accent: np.ndarray | None = None,
    ) -> None:
        """Adds a box between two points of one y; `section` is its width and thickness in metres."""
        span = np.subtract(end, start)
        middle = np.add(start, end) / 2
        tilt = turn("y", -np.arctan2(span[2], span[0]))
        size = (float(np.linalg.norm(span)), *section)
        self.add(Kind.BOX, tuple(middle), size, colour, material, accent=accent, rotation=tilt)

    def table(self) -> np.ndarray:
        """All parts as one structured array of dtype `PART`."""
        table = np.zeros(len(self.rows), PART)
        for i, row in enumerate(self.rows):
            table[i] = row
        return table


def turn(axis: str, angle: float) -> Float64[np.ndarray, "3 3"]:
    """The rotation by `angle` radians about a coordinate axis, counter-clockwise seen from its tip."""
    c, s = np.cos(angle), np.sin(angle)
    if axis == "x":
        return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    if axis == "y":
        return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def place(parts: np.ndarray, position: Float64[np.ndarray, "O 3"], yaw: Float64[np.ndarray, " O"]) -> np.ndarray:
    """Parts given in their owners' frames, moved to the owners' positions and headings."""
    placed = parts.copy()
    owner = parts["owner"]
    c, s = np.cos(yaw)[owner], np.sin(yaw)[owner]
    zero, one = np.zeros_like(c), np.ones_like(c)
    street_from_owner = np.stack([c, -s, zero, s, c, zero, zero, zero, one], axis=1).reshape(-1, 3, 3)
    placed["rotation"] = np.einsum("nij,njk->nik", street_from_owner, parts["rotation"])
    placed["centre"] = np.einsum("nij,nj->ni", street_from_owner, parts["centre"]) + position[owner]
    return placed


def corners(parts: np.ndarray) -> Float64[np.ndarray, "N 8 3"]:
    """The corners of each part's bounding box (tapers may lean out of their base, and are covered)."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
    reach = parts["half"].copy()
    reach[:, 0] = reach[:, 0] * np.maximum(1, parts["taper"][:, 0]) + np.abs(parts["taper"][:, 2])
    reach[:, 1] *= np.maximum(1, parts["taper"][:, 1])
    local = signs[None] * reach[:, None]
    return np.einsum("nij,nkj->nki", parts["rotation"], local) + parts["centre"][:, None]
