"""Procedural surfaces: what colour a material has at a place on a part.

Every texture is a function of the place in the part's own frame in metres, so it sticks to the part as it moves.
Each part brings a colour, an accent and two pattern sizes; textures read them as their docstrings say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from slidr.shapes import Float32


class Material(IntEnum):
    PAINT = 0
    CAR_BODY = 1
    CABIN = 2
    BUS = 3
    PANEL = 4
    FACADE = 5
    BRICK = 6
    CONCRETE = 7
    FOLIAGE = 8
    BARK = 9
    DIAGONAL = 10
    BANDS = 11
    ASPHALT = 12
    TILES = 13
    GRASS = 14
    COBBLES = 15
    GLASS = 16
    SIGN = 17
    CLOTH = 18
    TRACK = 19
    MACHINE = 20
    ROOF = 21
    CURTAIN = 22
    BOX_BODY = 23


@dataclass(frozen=True)
class Spots:
    """Places on parts whose colour is asked for; one row each."""

    place: Float32[np.ndarray, "N 3"]  # metres, the part's frame
    half: Float32[np.ndarray, "N 3"]  # the part's half extents
    face: np.ndarray  # (N,) axis of the box face hit: 0, 1, 2
    front: np.ndarray  # (N,) whether it is the face on the positive side
    shift: np.ndarray  # (N,) a number per part, so that equal parts look different
    colour: Float32[np.ndarray, "N 3"]
    accent: Float32[np.ndarray, "N 3"]
    pattern: Float32[np.ndarray, "N 2"]
    footprint: np.ndarray  # (N,) metres on the surface that a pixel covers: finer detail is faded out

    def take(self, keep: np.ndarray) -> Spots:
        return Spots(**{name: value[keep] for name, value in vars(self).items()})

    def plane(self) -> tuple[np.ndarray, np.ndarray]:
        """Two coordinates along the face, metres: along the ground and up (or the other way along the ground)."""
        s = np.where(self.face == 0, self.place[:, 1], self.place[:, 0])
        return s, np.where(self.face == 2, self.place[:, 1], self.place[:, 2])


def _noise_tile() -> Float32[np.ndarray, "256 256"]:
    """Smooth tileable noise, mean 0, of three octaves."""
    rng = np.random.default_rng(20220619)
    tile = np.zeros((256, 256))
    for cells, weight in ((32, 1.0), (64, 0.7), (128, 0.5)):
        lattice = rng.standard_normal((cells, cells))
        where = np.arange(256) * cells / 256
        low = where.astype(int)
        blend = (where - low) ** 2 * (3 - 2 * (where - low))
        high = (low + 1) % cells
        rows = lattice[low] * (1 - blend)[:, None] + lattice[high] * blend[:, None]
        tile += weight * (rows[:, low] * (1 - blend) + rows[:, high] * blend)
    return (tile / tile.std()).astype(np.float32)


_TILE = _noise_tile()


def noise(s: np.ndarray, t: np.ndarray, size: float, shift: np.ndarray | float = 0.0) -> np.ndarray:
    """Noise of unit spread whose coarsest blobs are about `size` metres across."""
    scale = 8 / size
    i = (s * scale + shift * 37.0).astype(np.int32) & 255
    j = (t * scale + shift * 91.0).astype(np.int32) & 255
    return _TILE[i, j]


def smooth_noise(s: np.ndarray, t: np.ndarray, size: float) -> np.ndarray:
    """`noise` blended between its cells, for things seen magnified."""
    x, y = s * (8 / size), t * (8 / size)
    i, j = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    u, v = x - i, y - j
    i0, j0, i1, j1 = i & 255, j & 255, (i + 1) & 255, (j + 1) & 255
    low = _TILE[i0, j0] * (1 - v) + _TILE[i0, j1] * v
    return low * (1 - u) + (_TILE[i1, j0] * (1 - v) + _TILE[i1, j1] * v) * u


def _fade(at: Spots, size: float | np.ndarray) -> np.ndarray:
    """1 where a detail of `size` metres is larger than a pixel, falling to 0 where it is not."""
    return np.clip(size / (at.footprint + 1e-6) - 0.3, 0, 1)


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a + (b - a) * share[:, None]


def _speckle(at: Spots, size: float, amount: float) -> np.ndarray:
    s, t = at.plane()
    return 1 + amount * (noise(s, t, size, at.shift) * _fade(at, size / 6))[:, None]


def _paint(at: Spots) -> np.ndarray:
    """Plain colour with a little dirt."""
    return at.colour * _speckle(at, 1.5, 0.04)


def _cloth(at: Spots) -> np.ndarray:
    return at.colour * _speckle(at, 0.35, 0.12)


def _car_body(at: Spots) -> np.ndarray:
    """Paint with a dark sill, door gaps along the sides, lamps, plate and grille at both ends (accent: trim)."""
    x, y, z = at.place.T
    hx, hy, hz = at.half.T
    colour = at.colour * (1 + 0.10 * (z / hz))[:, None]
    side = at.face == 1
    gap = side & ((np.abs(x - 0.05 * hx) < 0.015) | (np.abs(np.abs(x) - 0.45 * hx) < 0.015))
    colour[gap] *= 0.45
    colour[(z < -0.62 * hz) & (at.face != 2)] = 0.09
    end = at.face == 0
    across = np.abs(y) / hy
    lamp = end & (across > 0.62) & (z > 0.02 * hz) & (z < 0.62 * hz)
    colour[lamp & at.front] = (0.93, 0.92, 0.85)
    colour[lamp & ~at.front] = (0.72, 0.05, 0.04)
    plate = end & (across < 0.25) & (z > -0.45 * hz) & (z < -0.05 * hz)
    grille = end & at.front & (across < 0.55) & (z > 0.08 * hz) & (z < 0.55 * hz)
    colour[grille] = 0.07
    colour[plate] = (0.85, 0.85, 0.8)
    return colour


def _glass_tint(at: Spots) -> np.ndarray:
    """Dark glass with a paler, bluish upper part, as it mirrors the sky."""
    up = np.clip(0.5 + 0.5 * at.place[:, 2] / at.half[:, 2], 0, 1)
    glint = 0.06 * noise(at.place[:, 0] + at.place[:, 2], at.place[:, 1], 2.0, at.shift)
    return np.array([0.05, 0.065, 0.08], np.float32) + (up * 0.16 + glint).clip(0, 1)[:, None] * np.array(
        [0.75, 0.95, 1.15], np.float32
    )


def _cabin(at: Spots) -> np.ndarray:
    """Glass with body-coloured roof and pillars; pattern: (window length in x, width of a pillar)."""
    x, _, z = at.place.T
    hz = at.half[:, 2]
    pane = (z > -0.92 * hz) & (z < 0.78 * hz) & (at.face != 2)
    length = np.maximum(at.pattern[:, 0], 0.3)
    pillar = (at.face == 1) & (np.abs((x / length + 0.5) % 1 - 0.5) * length < at.pattern[:, 1] / 2)
    return np.where((pane & ~pillar)[:, None], _glass_tint(at), at.colour * 1.03)


def _bus(at: Spots) -> np.ndarray:
    """A livery with a stripe (accent), a window band, doors, and lamps; pattern: (window length, band height share)."""
    x, y, z = at.place.T
    hx, hy, hz = at.half.T
    colour = at.colour * _speckle(at, 2.0, 0.03)
    stripe = (z < -0.25 * hz) & (z > -0.45 * hz)
    colour[stripe] = at.accent[stripe]
    side, end = at.face == 1, at.face == 0
    band = (z > -0.1 * hz) & (z < (0.1 + at.pattern[:, 1]) * hz)
    mullion = np.abs((x / at.pattern[:, 0]) % 1 - 0.5) > 0.46
    door = side & (y < 0) & (np.abs(np.abs(x) - 0.55 * hx) < 0.6) & (z < 0.5 * hz) & (z > -0.85 * hz)
    wind = end & at.front & (z > -0.25 * hz) & (z < 0.62 * hz) & (np.abs(y) < 0.92 * hy)
    rear = end & ~at.front & (z > 0.05 * hz) & (z < 0.5 * hz) & (np.abs(y) < 0.7 * hy)
    glass = (side & band & ~mullion) | door | wind | rear
    colour[glass] = _glass_tint(at)[glass]
    colour[door & (np.abs(np.abs(x) - 0.55 * hx) < 0.04)] = 0.1
    lamp = end & (np.abs(y) > 0.68 * hy) & (z < -0.5 * hz) & (z > -0.68 * hz)
    colour[lamp & at.front] = (0.93, 0.92, 0.85)
    colour[lamp & ~at.front] = (0.7, 0.06, 0.05)
    sign = end & at.front & (z > 0.7 * hz) & (z < 0.92 * hz) & (np.abs(y) < 0.7 * hy)
    colour[sign] = (0.06, 0.05, 0.03)
    colour[sign & (np.abs(y % 0.3 - 0.15) < 0.08)] = (0.9, 0.55, 0.1)
    colour[(z < -0.9 * hz) & (at.face != 2)] = 0.1
    return colour


def _panel(at: Spots) -> np.ndarray:
    """Sheet metal with upright ribs and an optional band (accent); pattern: (rib spacing, band share)."""
    s, t = at.plane()
    spacing = np.maximum(at.pattern[:, 0], 0.05)
    rib = (np.abs((s / spacing) % 1 - 0.5) < 0.18) & (at.face != 2)
    colour = at.colour * _speckle(at, 2.5, 0.06) * (1 - 0.22 * (rib * _fade(at, spacing / 2)))[:, None]
    band = (np.abs(t) < at.pattern[:, 1] * at.half[:, 2]) & (at.face == 1)
    colour[band] = at.accent[band]
    edge = (at.face == 0) & ~at.front & (np.abs(at.place[:, 1]) < 0.03)
    colour[edge] *= 0.3
    return colour


def _curtain(at: Spots) -> np.ndarray:
    """A trailer's tarpaulin: folds, pale straps, a lettered panel (accent), a red and white edge below, doors behind.

    Pattern: (strap spacing, height share of the lettering).
    """
    s, t = at.plane()
    hz = at.half[:, 2]
    spacing = np.maximum(at.pattern[:, 0], 0.2)
    fold = np.sin(2 * np.pi * s / spacing) * 0.10 + 0.05 * noise(s, t * 0.3, 1.0, at.shift)
    colour = at.colour * (1 + fold)[:, None]
    side, end = at.face == 1, at.face == 0
    strap = side & (np.abs((s / spacing) % 1 - 0.5) * spacing < 0.04) & (t < 0.85 * hz)
    colour[strap] = 0.75
    letters = side & (np.abs(t - 0.2 * hz) < at.pattern[:, 1] * hz) & (np.abs(s) < 0.62 * at.half[:, 0])
    letters &= (np.abs(np.sin(np.floor(s / 0.45) * 12.9 + at.shift)) % 0.37 > 0.1) & (
        np.abs((s / 0.45) % 1 - 0.5) < 0.36
    )
    colour[letters] = at.accent[letters]
    edge = (t < -0.88 * hz) & (at.face != 2)
    colour[edge] = np.where(((s / 0.5) % 1 < 0.5)[:, None], (0.75, 0.08, 0.07), (0.9, 0.9, 0.88))[edge]
    seam = end & ((np.abs(s) < 0.03) | (np.abs(np.abs(s) - 0.55) < 0.025))
    colour[seam] = 0.15
    lamp = end & ~at.front & (np.abs(s) > 0.75 * at.half[:, 1]) & (t < -0.7 * hz) & ~edge
    colour[lamp] = (0.7, 0.06, 0.05)
    return colour


def _box_body(at: Spots) -> np.ndarray:
    """A truck's box: fine level ribs in an aluminium frame, a round badge (accent), doors with bars behind.

    Pattern: (rib spacing, -).
    """
    s, t = at.plane()
    wide, hz = np.where(at.face == 0, at.half[:, 1], at.half[:, 0]), at.half[:, 2]
    rib = (t / np.maximum(at.pattern[:, 0], 0.05)) % 1 < 0.3
    colour = at.colour * _speckle(at, 2.5, 0.04) * (1 - 0.14 * rib * _fade(at, 0.1))[:, None]
    badge = (at.face == 1) & (np.hypot(s, t) < 0.55 * hz)
    colour[badge] = at.accent[badge]
    frame = (at.face != 2) & ((np.abs(s) > wide - 0.14) | (np.abs(t) > hz - 0.12))
    colour[frame] = 0.62
    bar = (at.face == 0) & ((np.abs(s) < 0.03) | (np.abs(np.abs(s) - 0.4) < 0.03))
    colour[bar] = 0.2
    lamp = (at.face == 0) & ~at.front & (np.abs(s) > 0.7 * wide) & (t < -0.86 * hz)
    colour[lamp] = (0.7, 0.06, 0.05)
    return colour


def _facade(at: Spots) -> np.ndarray:
    """Rows of windows, some lit or with blinds, over a plinth (accent); pattern: (bay width, storey height)."""
    s, t = at.plane()
    bay, storey = np.maximum(at.pattern[:, 0], 0.5), np.maximum(at.pattern[:, 1], 0.5)
    wall = at.colour * _speckle(at, 3.0, 0.06) * (1 + 0.05 * noise(s * 0.2, t * 0.2, 1.0, at.shift))[:, None]
    height = t + at.half[:, 2]
    column, row = np.floor(s / bay), np.floor(height / storey)
    u, v = s / bay - column, height / storey - row
    dice = np.abs(np.sin(column * 12.9898 + row * 78.233 + at.shift * 3.7) * 43758.547) % 1
    window = (np.abs(u - 0.5) < 0.29) & (np.abs(v - 0.52) < 0.27) & (at.face != 2)
    frame = (np.abs(u - 0.5) < 0.34) & (np.abs(v - 0.52) < 0.33) & (at.face != 2) & ~window
    shop = window & (row == 0)
    pane = np.where((dice > 0.75)[:, None], 0.35 * at.colour + 0.3, (0.07 + 0.13 * v)[:, None] * (0.8, 1.0, 1.25))
    wall[frame] = wall[frame] * 1.18
    wall[window] = pane[window]
    wall[shop] = 0.6 * wall[shop] + 0.25 * at.accent[shop]
    cross = window & (np.abs(u - 0.5) * bay < 0.03)
    wall[cross] = at.colour[cross] * 0.8
    plinth = (height < 0.6) & (at.face != 2)
    wall[plinth] = at.accent[plinth]
    ledge = (np.abs(v - 0.98) < 0.03) & (at.face != 2)
    wall[ledge] *= 0.8
    return wall.astype(np.float32)


def _brick(at: Spots) -> np.ndarray:
    """Courses of bricks or blocks with joints (accent); pattern: (length, height of one)."""
    s, t = at.plane()
    length, height = np.maximum(at.pattern[:, 0], 0.05), np.maximum(at.pattern[:, 1], 0.03)
    course = np.floor(t / height)
    u, v = (s / length + 0.5 * (course % 2)) % 1, t / height - course
    joint = (u * length < 0.025) | (v * height < 0.025)
    tone = np.abs(np.sin(np.floor(s / length + 0.5 * (course % 2)) * 17.3 + course * 5.1) * 4758.5) % 1
    colour = at.colour * (0.88 + 0.24 * tone)[:, None] * _speckle(at, 0.8, 0.07)
    return _mix(colour, at.accent, joint * _fade(at, 0.06) * 0.8)


def _concrete(at: Spots) -> np.ndarray:
    """Stained grey with board joints; pattern: (joint spacing, stain strength)."""
    s, t = at.plane()
    stain = 0.10 * noise(s, t * 0.4, 4.0, at.shift) + 0.05 * noise(s, t, 0.6, at.shift) * _fade(at, 0.1)
    joint = (np.abs(s / np.maximum(at.pattern[:, 0], 0.2) % 1) * at.pattern[:, 0] < 0.03) & (at.pattern[:, 0] > 0)
    return at.colour * (1 + stain - 0.3 * joint * _fade(at, 0.05))[:, None]


def _foliage(at: Spots) -> np.ndarray:
    """Clumps of leaves, dark gaps below and light tips above (accent)."""
    x, y, z = at.place.T
    around = np.arctan2(y, x) * at.half[:, 0]
    clump = noise(around, z + 0.3 * x, 0.9, at.shift) + 0.9 * noise(around, z, 0.35, at.shift) * _fade(at, 0.12)
    light = np.clip(0.5 + 0.3 * clump + 0.25 * z / at.half[:, 2], 0, 1.25)
    return at.colour * (0.25 + 0.75 * light)[:, None] + at.accent * (np.clip(clump - 0.7, 0, 1) * 0.5)[:, None]


def _bark(at: Spots) -> np.ndarray:
    around = np.arctan2(at.place[:, 1], at.place[:, 0]) * at.half[:, 0]
    return at.colour * (1 + 0.25 * noise(around * 3, at.place[:, 2] * 0.5, 0.5, at.shift))[:, None]


def _diagonal(at: Spots) -> np.ndarray:
    """Slanting stripes of colour and accent; pattern: (width of a pair of stripes, -)."""
    s, t = at.plane()
    stripe = ((s + t) / np.maximum(at.pattern[:, 0], 0.05)) % 1 < 0.5
    return np.where(stripe[:, None], at.colour, at.accent) * _speckle(at, 0.8, 0.04)


def _bands(at: Spots) -> np.ndarray:
    """Level bands of colour and accent; pattern: (height of a pair of bands, share of the accent)."""
    height = at.place[:, 2] + at.half[:, 2]
    band = (height / np.maximum(at.pattern[:, 0], 0.05) + 0.25) % 1 < at.pattern[:, 1]
    return np.where(band[:, None], at.accent, at.colour) * _speckle(at, 0.6, 0.05)


def _asphalt(at: Spots) -> np.ndarray:
    """Grained asphalt with patches, cracks, and markings (accent); pattern: (lane width or 0, half road width).

    The road runs along x; markings are dashed between lanes and solid at the road's edges and middle.
    """
    x, y, _ = at.place.T
    grain = 0.09 * noise(x, y, 0.5, at.shift) * _fade(at, 0.08) + 0.05 * noise(x, y * 2, 7.0, at.shift)
    patch = np.where(noise(np.floor(x / 3.7), np.floor(y / 2.3), 9.0, at.shift) > 1.2, -0.14, 0.0)
    crack = -0.22 * (np.abs(noise(x, y, 6.0, at.shift)) < 0.035) * _fade(at, 0.08)
    colour = at.colour * (1 + grain + patch + crack)[:, None]
    lane, edge = at.pattern[:, 0], at.pattern[:, 1]
    has = lane > 0
    across = np.abs(y)
    dashed = (np.abs(across / np.maximum(lane, 0.1) % 1 - 0.0) * lane < 0.13) & (across > 1) & (x % 6 < 3)
    solid = (np.abs(across - edge + 0.25) < 0.07) | ((across < 0.24) & (across > 0.10))
    worn = noise(x, y, 0.8, at.shift) > -1.3
    line = has & (dashed & (across < edge - 1) | solid) & worn
    return _mix(colour, at.accent, line * _fade(at, 0.12))


def _tiles(at: Spots) -> np.ndarray:
    """Paving slabs with joints (accent), each with its own tone; pattern: (length, width of a slab)."""
    x, y, _ = at.place.T
    length, width = np.maximum(at.pattern[:, 0], 0.1), np.maximum(at.pattern[:, 1], 0.1)
    i, j = np.floor(x / length), np.floor(y / width)
    tone = np.abs(np.sin(i * 12.9 + j * 78.2 + at.shift) * 43758.5) % 1
    joint = ((x / length - i) * length < 0.04) | ((y / width - j) * width < 0.04)
    colour = at.colour * (0.92 + 0.16 * tone * _fade(at, width / 2))[:, None] * _speckle(at, 0.7, 0.06)
    colour = colour * (1 + 0.06 * noise(x, y, 5.0, at.shift))[:, None]
    return _mix(colour, at.accent, joint * _fade(at, 0.08))


def _grass(at: Spots) -> np.ndarray:
    """Blades and tufts, with bare or dry spots (accent); pattern: (share of bare ground, -)."""
    x, y, _ = at.place.T
    bare = np.clip(noise(x, y, 5.0, at.shift) * 0.8 + at.pattern[:, 0] * 3 - 1.2, 0, 1)
    tuft = 0.22 * noise(x, y, 0.4, at.shift) * _fade(at, 0.07) + 0.12 * noise(x, y, 1.8, at.shift)
    return _mix(at.colour, at.accent, bare) * (1 + tuft)[:, None]


def _cobbles(at: Spots) -> np.ndarray:
    """Small round-topped stones or hatching; pattern: (size of a stone, hatch width or 0 for none)."""
    x, y, _ = at.place.T
    size = np.maximum(at.pattern[:, 0], 0.05)
    row = np.floor(x / size)
    u, v = x / size - row - 0.5, (y / size + 0.5 * (row % 2)) % 1 - 0.5
    dome = 1.12 - 1.5 * (u * u + v * v) * _fade(at, size / 2)
    colour = at.colour * dome[:, None] * _speckle(at, 1.2, 0.08)
    hatch = (at.pattern[:, 1] > 0) & (((x + y) / np.maximum(at.pattern[:, 1], 0.1)) % 1 < 0.35)
    return _mix(colour, at.accent, hatch * 0.85)


def _sign(at: Spots) -> np.ndarray:
    """A plate with a rim and a symbol (accent)."""
    s, t = at.place[:, 1] / at.half[:, 1], at.place[:, 2] / at.half[:, 2]
    rim = np.maximum(np.abs(s), np.abs(t)) > 0.82
    symbol = (np.abs(s) < 0.5) & (np.abs(t - 0.2 * np.sign(s)) < 0.25)
    return np.where((rim | symbol)[:, None], at.accent, at.colour)


def _track(at: Spots) -> np.ndarray:
    """Tyres and crawler tracks: dark rubber with lugs, a hub (accent) on the flat sides of wheels."""
    x, y, z = at.place.T
    lug = (x / 0.18) % 1 < 0.45
    colour = at.colour * (1 - 0.35 * lug * _fade(at, 0.09))[:, None]
    hub = (at.pattern[:, 0] > 0) & (np.hypot(x / at.half[:, 0], y / at.half[:, 1]) < at.pattern[:, 0])
    hub &= np.abs(z) > 0.95 * at.half[:, 2]
    return np.where(hub[:, None], at.accent, colour)


def _machine(at: Spots) -> np.ndarray:
    """Worn machine paint with panel gaps, grease (accent) and rust towards the bottom."""
    s, t = at.plane()
    grime = np.clip(0.35 * noise(s, t, 0.8, at.shift) - 0.3 - 0.5 * at.place[:, 2] / at.half[:, 2], 0, 0.7)
    gap = (np.abs(s % 0.9 - 0.45) < 0.02) * _fade(at, 0.05) * 0.5
    return _mix(at.colour, at.accent, np.maximum(grime, gap))


def _roof(at: Spots) -> np.ndarray:
    """Rows of roof tiles; pattern: (row height, -)."""
    _, t = at.plane()
    row = (t / np.maximum(at.pattern[:, 0], 0.1)) % 1
    return at.colour * (0.8 + 0.3 * row * _fade(at, at.pattern[:, 0] / 2))[:, None] * _speckle(at, 1.0, 0.08)


_TEXTURES: dict[Material, Callable[[Spots], np.ndarray]] = {
    Material.PAINT: _paint,
    Material.CAR_BODY: _car_body,
    Material.CABIN: _cabin,
    Material.BUS: _bus,
    Material.PANEL: _panel,
    Material.FACADE: _facade,
    Material.BRICK: _brick,
    Material.CONCRETE: _concrete,
    Material.FOLIAGE: _foliage,
    Material.BARK: _bark,
    Material.DIAGONAL: _diagonal,
    Material.BANDS: _bands,
    Material.ASPHALT: _asphalt,
    Material.TILES: _tiles,
    Material.GRASS: _grass,
    Material.COBBLES: _cobbles,
    Material.GLASS: _glass_tint,
    Material.SIGN: _sign,
    Material.CLOTH: _cloth,
    Material.TRACK: _track,
    Material.MACHINE: _machine,
    Material.ROOF: _roof,
    Material.CURTAIN: _curtain,
    Material.BOX_BODY: _box_body,
}


def albedo(material: np.ndarray, at: Spots) -> Float32[np.ndarray, "N 3"]:
    """The surface colour at each spot, RGB about 0 to 1."""
    colour = np.empty_like(at.colour)
    for kind in np.unique(material):
        where = np.flatnonzero(material == kind)
        colour[where] = _TEXTURES[Material(kind)](at.take(where))
    return colour
