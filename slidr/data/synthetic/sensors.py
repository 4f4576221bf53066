"""What the sensors see: camera pictures with the class of every pixel, and labelled sweeps of the same parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slidr.data.synthetic.raycast import RayGrid, cast, pinhole, spinning, taper_slopes
from slidr.data.synthetic.shapes import Kind
from slidr.data.synthetic.street import Look
from slidr.data.synthetic.textures import Material, Spots, albedo, noise, smooth_noise
from slidr.shapes import Float32, Float64, Int32, UInt8

BEAMS = np.radians(np.linspace(-30.67, 10.67, 32))  # elevations, ring 0 lowest
AZIMUTHS = 1084
MAX_RANGE = 100.0  # metres
SHADOW_REACH, SHADOW_PIXELS, SUN_DISTANCE = 42.0, 480, 1500.0  # metres, pixels, metres


@dataclass(frozen=True)
class Shadows:
    """The sun's depth picture: what it sees is lit."""

    grid: RayGrid
    depth: np.ndarray

    def lit(self, points: np.ndarray) -> np.ndarray:
        """1 where a point (street frame) is in the sun, 0 in shadow, between at soft edges; 1 off the picture."""
        local = (points - self.grid.origin) @ self.grid.rotation
        first = self.grid.across @ self.grid.rotation[:, 0]
        step = first[1] - first[0]
        u = (local[:, 0] / local[:, 2] - first[0]) / step
        v = (local[:, 1] / local[:, 2] - first[0]) / step
        light = np.zeros(len(points), np.float32)
        limit = local[:, 2] - 0.08
        for nudge in (0.1, 0.9):
            column, row = np.floor(u + nudge).astype(np.int32), np.floor(v + nudge).astype(np.int32)
            inside = (column >= 0) & (row >= 0) & (column < SHADOW_PIXELS) & (row < SHADOW_PIXELS)
            nearest = self.depth[row.clip(0, SHADOW_PIXELS - 1), column.clip(0, SHADOW_PIXELS - 1)]
            light += ~inside | (limit < nearest)
        return light / 2


@dataclass(frozen=True)
class View:
    """A rendered camera picture."""

    image: UInt8[np.ndarray, "H W 3"]
    label: UInt8[np.ndarray, "H W"]  # lidarseg index of every pixel; 0 is the sky
    owner: Int32[np.ndarray, "H W"]  # object of every pixel; -1 is the sky


@dataclass(frozen=True)
class Sweep:
    """A lidar sweep in the order of firing."""

    points: Float32[np.ndarray, "N 5"]  # x, y, z in metres (lidar frame), intensity 0..255, ring
    label: UInt8[np.ndarray, " N"]  # lidarseg index
    owner: Int32[np.ndarray, " N"]  # object hit; -1 for stray returns


def cast_shadows(parts: np.ndarray, look: Look, centre: Float64[np.ndarray, " 3"]) -> Shadows:
    """The depth picture of the sun around `centre`, taken by a camera far away (in double precision for that)."""
    z = -look.sun
    x = np.cross([0.0, 0.0, 1.0], z)
    x /= np.linalg.norm(x)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([x, np.cross(z, x), z], axis=1)
    pose[:3, 3] = centre + look.sun * SUN_DISTANCE
    focal = SHADOW_PIXELS / 2 * SUN_DISTANCE / SHADOW_REACH
    middle = (SHADOW_PIXELS - 1) / 2
    intrinsics = np.array([[focal, 0, middle], [0, focal, middle], [0, 0, 1]])
    grid = pinhole(intrinsics, pose, SHADOW_PIXELS, SHADOW_PIXELS, np.float64)
    flat = np.isin(parts["material"], (Material.ASPHALT, Material.GRASS, Material.TILES, Material.COBBLES))
    _, depth = cast(parts[~flat], grid)
    return Shadows(grid, depth)


def _surface(parts: np.ndarray, hit: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, ...]:
    """Place in the part's frame, normal in the part's frame, box axis and side of each hit."""
    rotation = parts["rotation"].astype(np.float32)[hit]
    half = parts["half"].astype(np.float32)[hit]
    offset = points - parts["centre"].astype(np.float32)[hit]
    place = np.einsum("nij,ni->nj", rotation, offset)
    taper = parts["taper"].astype(np.float32)[hit]
    slope_x, slope_y, lean = taper_slopes(half, taper)
    shape = parts["kind"][hit]
    z = place[:, 2]
    middle = (
        half[:, 0] * (1 + taper[:, 0]) / 2 + slope_x * z,
        half[:, 1] * (1 + taper[:, 1]) / 2 + slope_y * z,
    )
    share = np.stack(
        [(place[:, 0] - taper[:, 2] / 2 - lean * z) / middle[0], place[:, 1] / middle[1], z / half[:, 2]],
        axis=1,
    )
    axis = np.abs(share).argmax(1)
    rows = np.arange(len(hit))
    sign = np.sign(share[rows, axis])
    normal = np.zeros_like(place)
    normal[rows, axis] = sign
    normal[:, 2] -= np.where(axis == 0, sign * lean + slope_x, np.where(axis == 1, slope_y, 0))
    ball = shape == Kind.ELLIPSOID
    normal[ball] = (place / half**2)[ball]
    tube = shape == Kind.CYLINDER
    cap = np.abs(place[:, 2]) > 0.999 * half[:, 2]
    wall = tube & ~cap
    normal[wall] = (place / half**2)[wall] * (1, 1, 0)
    end = tube & cap
    normal[end] = np.sign(place[end, 2])[:, None] * np.array([0, 0, 1], np.float32)
    normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
    return place, half, np.einsum("nij,nj->ni", rotation, normal), axis, sign > 0


def render(
    parts: np.ndarray,
    grid: RayGrid,
    look: Look,
    shadows: Shadows,
    rng: np.random.Generator,
) -> View:
    """The picture that a pinhole grid sees: textures in sun and sky light, shadows, haze, and the sensor's noise."""
    index, depth = cast(parts, grid)
    height, width = index.shape
    directions = grid.directions().reshape(-1, 3)
    length = np.linalg.norm(directions, axis=1)
    picture = np.empty((height * width, 3), np.float32)
    sky, solid = np.flatnonzero(index.ravel() < 0), np.flatnonzero(index.ravel() >= 0)
    picture[sky] = _sky(directions[sky] / length[sky, None], look)
    hit = index.ravel()[solid]
    distance = depth.ravel()[solid]
    ray = directions[solid]
    points = grid.origin.astype(np.float32) + distance[:, None] * ray
    place, half, normal, axis, front = _surface(parts, hit, points)
    along = length[solid]
    cosine = np.abs(np.einsum("ni,ni->n", normal, ray)) / along
    pixel = np.linalg.norm(grid.across[1] - grid.across[0])
    at = Spots(
        place=place,
        half=half,
        face=axis,
        front=front,
        shift=((parts["owner"][hit] * 7 + 3) % 101).astype(np.float32),
        colour=parts["colour"][hit],
        accent=parts["accent"][hit],
        pattern=parts["pattern"][hit],
        footprint=pixel * distance / np.sqrt(np.maximum(cosine, 0.03)),
    )
    colour = albedo(parts["material"][hit], at)
    facing = np.clip(normal @ look.sun.astype(np.float32), 0, 1)
    sun = (facing * shadows.lit(points + 0.1 * normal))[:, None] * look.sunlight.astype(np.float32)
    open_sky = 0.72 + 0.28 * normal[:, 2]
    low = np.clip(0.62 + 0.38 * points[:, 2] / 0.6, 0.62, 1)  # crevices by the ground see less of the sky
    low = np.where(normal[:, 2] > 0.7, 1.0, low)
    light = sun + (open_sky * low)[:, None] * look.skylight.astype(np.float32)
    air = np.exp(-distance * along / look.haze)[:, None].astype(np.float32)
    lit = colour * light * look.exposure
    picture[solid] = lit * air + look.horizon.astype(np.float32) * 0.92 * (1 - air)
    image = _develop(picture.reshape(height, width, 3), index, rng)
    label = np.zeros(height * width, np.uint8)
    label[solid] = parts["label"][hit]
    owner = np.full(height * width, -1, np.int32)
    owner[solid] = parts["owner"][hit]
    return View(image, label.reshape(height, width), owner.reshape(height, width))


def _sky(direction: np.ndarray, look: Look) -> np.ndarray:
    up = np.clip(direction[:, 2], 0.0, 1)
    blend = (1 - up) ** 5  # most of the paling is near the horizon
    sky = look.zenith[None] * (1 - blend)[:, None] + look.horizon[None] * blend[:, None]
    glow = np.clip(direction @ look.sun, 0, 1) ** 24 * (1 - look.clouds) * 0.3
    flat = direction[:, :2] / (up + 0.12)[:, None]
    puffs = 0.5 * smooth_noise(flat[:, 0], flat[:, 1], 6.0) + 0.25 * smooth_noise(flat[:, 0], flat[:, 1], 1.5)
    cloud = np.clip(puffs + 1.2 * look.clouds - 0.5, 0, 1) * np.clip(up * 8, 0, 1)
    white = np.array([0.92, 0.93, 0.95]) * (1 - 0.25 * look.clouds)
    sky = sky + (white - sky) * (0.75 * cloud)[:, None] + glow[:, None]
    return sky.astype(np.float32)


def _develop(picture: np.ndarray, index: np.ndarray, rng: np.random.Generator) -> UInt8[np.ndarray, "H W 3"]:
    """Softens the steps between parts as a lens would, adds vignetting and noise, and quantises."""
    height, width, _ = picture.shape
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    around = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) / 4
    ids = np.pad(index, 1, mode="edge")
    edge = (ids[:-2, 1:-1] != index) | (ids[2:, 1:-1] != index) | (ids[1:-1, :-2] != index) | (ids[1:-1, 2:] != index)
    share = np.where(edge, 0.5, 0.12)[..., None].astype(np.float32)
    picture = picture + (around - picture) * share
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None]
    fall = (1 - 0.08 * (x * x + y * y))[..., None].astype(np.float32)
    grain = rng.standard_normal((height, width, 1), dtype=np.float32) * 0.010
    colour = np.clip(picture, 0, None) * fall
    colour = np.where(colour > 0.8, 0.8 + 0.2 * np.tanh((colour - 0.8) / 0.2), colour)  # highlights roll off
    return np.clip((colour + grain) * 255 + 0.5, 0, 255).astype(np.uint8)


def sweep(
    parts: np.ndarray,
    street_from_lidar: Float64[np.ndarray, "4 4"],
    rng: np.random.Generator,
    azimuths: int = AZIMUTHS,
) -> Sweep:
    """One turn of the lidar: first returns with range noise, drop-outs and strays, columns in the order of firing.

    Intensity falls with the angle of incidence and, behind the sensor's own correction, a little with range; glass and
    dark, distant or grazed surfaces often return nothing.
    """
    azimuth = -np.pi + 2 * np.pi * np.arange(azimuths) / azimuths
    grid = spinning(azimuth, BEAMS, street_from_lidar)
    index, planar = cast(parts, grid)
    index, planar = index.T.ravel(), planar.T.ravel()  # one firing of all beams after the other
    ring = np.tile(np.arange(len(BEAMS)), azimuths)
    directions = np.ascontiguousarray(grid.directions().transpose(1, 0, 2)).reshape(-1, 3)
    solid = np.flatnonzero(index >= 0)
    hit, ray = index[solid], directions[solid]
    stretch = np.linalg.norm(ray, axis=1)
    reach = planar[solid] * stretch
    points = grid.origin.astype(np.float32) + planar[solid][:, None] * ray
    place, half, normal, axis, _ = _surface(parts, hit, points)
    cosine = np.abs(np.einsum("ni,ni->n", normal, ray)) / stretch
    part = parts[hit]
    material = part["material"]
    bright = part["reflectivity"] * _mottle(material, place, half, axis)
    bright = bright * (0.25 + 0.75 * cosine) * np.exp(-reach / 120)
    glass = (material == Material.GLASS) | (
        np.isin(material, (Material.CABIN, Material.BUS)) & (axis != 2) & (np.abs(place[:, 2]) < 0.7 * half[:, 2])
    )
    through = np.where(material == Material.BUS, 0.35, 0.6)
    lost = 0.03 + 0.9 * np.clip(reach / MAX_RANGE, 0, 1) ** 2 * np.clip(1.1 - 3 * bright, 0, 1) + 0.35 * (cosine < 0.05)
    lost = np.where(glass, np.maximum(lost, through), lost)
    kept = (rng.random(len(solid)) > lost) & (reach < MAX_RANGE) & (reach > 1.0)
    spread = 0.015 + part["roughness"] * np.abs(rng.standard_normal(len(solid)))
    reach = reach + (rng.standard_normal(len(solid)) * spread).astype(np.float32)
    intensity = np.clip(bright * 80 * np.exp(rng.normal(0, 0.2, len(solid))) + rng.exponential(1.0, len(solid)), 0, 255)
    stray = rng.random(len(solid)) < 0.0015
    reach = np.where(stray, reach * rng.uniform(0.2, 0.9, len(solid)), reach)
    local = (reach / stretch)[:, None] * (ray @ street_from_lidar[:3, :3].astype(np.float32))
    cloud = np.column_stack([local, np.round(intensity), ring[solid]]).astype(np.float32)
    label = np.where(stray, 0, part["label"]).astype(np.uint8)
    owner = np.where(stray, -1, part["owner"]).astype(np.int32)
    return Sweep(cloud[kept], label[kept], owner[kept])


def _mottle(material: np.ndarray, place: np.ndarray, half: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """How reflectivity varies over a surface: stains everywhere, painted lines on roads, white bands on warnings."""
    s = np.where(axis == 0, place[:, 1], place[:, 0])
    t = np.where(axis == 2, place[:, 1], place[:, 2])
    factor = 1 + 0.15 * noise(s, t, 1.5)
    leafy = np.isin(material, (Material.FOLIAGE, Material.GRASS))
    return np.clip(np.where(leafy, 1 + 0.35 * noise(s, t, 0.6), factor), 0.1, 3)
