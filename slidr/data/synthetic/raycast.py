"""Ray casting of parts on separable ray grids: cameras, the lidar and the sun's shadow map share one routine.

In every sensor here the direction of ray (row, column) is ``down[row] + across[column]``, so a part's intersection
costs a few outer sums over the rectangle of rays that can meet it, and a depth buffer settles occlusion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slidr.data.synthetic.shapes import corners
from slidr.data.synthetic.textures import noise
from slidr.shapes import Float64, Int32, Shaped

NEAR = 0.3  # metres (times the ray's length): nothing nearer is seen
SPECK = 0.4  # rays: parts whose outline covers fewer are left out


@dataclass(frozen=True)
class RayGrid:
    """Rays ``origin + t * (down[row] + across[column])`` in the street frame.

    `round_view` tells a lidar (columns go once round) from a pinhole camera, whose t is the depth.
    """

    origin: Float64[np.ndarray, " 3"]
    across: Shaped[np.ndarray, "W 3"]
    down: Shaped[np.ndarray, "H 3"]
    rotation: Float64[np.ndarray, "3 3"]  # street_from_sensor
    round_view: bool

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.down), len(self.across)

    def directions(self) -> Shaped[np.ndarray, "H W 3"]:
        return self.down[:, None] + self.across[None]


def pinhole(
    intrinsics: Float64[np.ndarray, "3 3"],
    street_from_camera: Float64[np.ndarray, "4 4"],
    height: int,
    width: int,
    dtype: type = np.float32,
) -> RayGrid:
    """The rays through the pixels of a camera; t is the depth in metres."""
    rotation = street_from_camera[:3, :3]
    u = (np.arange(width) - intrinsics[0, 2]) / intrinsics[0, 0]
    v = (np.arange(height) - intrinsics[1, 2]) / intrinsics[1, 1]
    across = u[:, None] * rotation[:, 0]
    down = v[:, None] * rotation[:, 1] + rotation[:, 2]
    return RayGrid(street_from_camera[:3, 3], across.astype(dtype), down.astype(dtype), rotation, False)


def spinning(
    azimuth: Float64[np.ndarray, " W"],
    elevation: Float64[np.ndarray, " H"],
    street_from_lidar: Float64[np.ndarray, "4 4"],
) -> RayGrid:
    """The rays of a spinning lidar; t is the distance in the lidar's horizontal plane.

    `azimuth` runs once round in equal steps from -pi, `elevation` need not be even (radians).
    """
    rotation = street_from_lidar[:3, :3]
    flat = np.stack([np.cos(azimuth), np.sin(azimuth), np.zeros_like(azimuth)], axis=1)
    upward = np.tan(elevation)[:, None] * rotation[:, 2]
    return RayGrid(
        street_from_lidar[:3, 3],
        (flat @ rotation.T).astype(np.float32),
        upward.astype(np.float32),
        rotation,
        True,
    )


def cast(parts: np.ndarray, grid: RayGrid) -> tuple[Int32[np.ndarray, "H W"], Shaped[np.ndarray, "H W"]]:
    """The first part that each ray meets, and t there; part -1 and t = inf where there is none.

    Rays that start inside a part do not see it.
    """
    height, width = grid.shape
    t = np.full((height, width), np.inf, grid.across.dtype)
    index = np.full((height, width), -1, np.int32)
    local = (corners(parts) - grid.origin) @ grid.rotation
    centre = (parts["centre"] - grid.origin) @ grid.rotation
    boxes = _lidar_rectangles(local, centre, grid) if grid.round_view else _camera_rectangles(local, grid)
    dtype = grid.across.dtype
    nearest = _nearest(local, centre, grid)
    origin = np.einsum("nji,nj->ni", parts["rotation"], grid.origin - parts["centre"]).astype(dtype)
    rotation = parts["rotation"].astype(dtype)
    half = parts["half"].astype(dtype)
    kinds = parts["kind"].tolist()
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for i, top, bottom, left, right in sorted(boxes, key=lambda box: nearest[box[0]]):
            window = t[top:bottom, left:right]
            if window.size <= 4096 and window.max() < nearest[i]:
                continue  # wholly hidden by nearer parts
            across = grid.across[left:right] @ rotation[i]
            down = grid.down[top:bottom] @ rotation[i]
            meet = _INTERSECT[kinds[i]](across, down, origin[i], half[i], parts[i])
            nearer = (meet > NEAR) & (meet < window)
            window[nearer] = meet[nearer]
            index[top:bottom, left:right][nearer] = i
    return index, t


def _nearest(
    local: Float64[np.ndarray, "N 8 3"], centre: Float64[np.ndarray, "N 3"], grid: RayGrid
) -> Float64[np.ndarray, " N"]:
    """A bound below the t at which any ray can meet each part, from its corners and centre in the sensor's frame."""
    if not grid.round_view:
        return local[..., 2].min(1)
    reach = np.linalg.norm(local[..., :2] - centre[:, None, :2], axis=2).max(1)
    return np.linalg.norm(centre[:, :2], axis=1) - reach


def _slab(across: np.ndarray, down: np.ndarray, origin: np.ndarray, half: np.ndarray, axis: int) -> tuple:
    inverse = 1 / (down[:, axis, None] + across[None, :, axis])
    first = inverse * (-half[axis] - origin[axis])
    inverse *= half[axis] - origin[axis]
    return np.minimum(first, inverse), np.maximum(first, inverse)


def _box(across: np.ndarray, down: np.ndarray, origin: np.ndarray, half: np.ndarray, part: np.void) -> np.ndarray:
    enter, leave = _slab(across, down, origin, half, 0)
    for axis in (1, 2):
        low, high = _slab(across, down, origin, half, axis)
        np.maximum(enter, low, out=enter)
        np.minimum(leave, high, out=leave)
    return np.where(enter <= leave, enter, np.inf)


def taper_slopes(half: np.ndarray, taper: np.ndarray) -> tuple:
    """How a tapered box's half widths in x and y and its middle in x change per metre of height.

    At height z above the middle: half width ``half_x * (1 + taper_x) / 2 + slope_x * z``, and so on.
    """
    rise = 2 * half[..., 2]
    slope_x = half[..., 0] * (taper[..., 0] - 1) / rise
    slope_y = half[..., 1] * (taper[..., 1] - 1) / rise
    return slope_x, slope_y, taper[..., 2] / rise


def _taper(across: np.ndarray, down: np.ndarray, origin: np.ndarray, half: np.ndarray, part: np.void) -> np.ndarray:
    slope_x, slope_y, lean = (float(s) for s in taper_slopes(part["half"], part["taper"]))
    middle_x = float(part["half"][0] * (1 + part["taper"][0]) / 2)
    middle_y = float(part["half"][1] * (1 + part["taper"][1]) / 2)
    shift = float(part["taper"][2] / 2)
    sides = (  # axis, its sign, how far the side leans outwards per metre of height, offset
        (0, 1, lean + slope_x, middle_x + shift),
        (0, -1, slope_x - lean, middle_x - shift),
        (1, 1, slope_y, middle_y),
        (1, -1, slope_y, middle_y),
    )
    enter, leave = _slab(across, down, origin, half, 2)
    for axis, sign, out, offset in sides:
        slope = (sign * down[:, axis] - out * down[:, 2])[:, None] + (sign * across[:, axis] - out * across[:, 2])
        meet = (offset - sign * origin[axis] + out * origin[2]) / slope
        inward = slope < 0
        np.maximum(enter, np.where(inward, meet, -np.inf), out=enter)
        np.minimum(leave, np.where(inward, np.inf, meet), out=leave)
    return np.where(enter <= leave, enter, np.inf)


def _ellipsoid(across: np.ndarray, down: np.ndarray, origin: np.ndarray, half: np.ndarray, part: np.void) -> np.ndarray:
    p, q, o = across / half, down / half, origin / half
    a = (p * p).sum(1)[None] + (q * q).sum(1)[:, None]
    for axis in range(3):
        a += 2 * q[:, axis, None] * p[None, :, axis]
    b = (q @ o)[:, None] + (p @ o)[None]
    discriminant = b * b - a * (o @ o - 1)
    meet = np.where(discriminant > 0, (-b - np.sqrt(discriminant)) / a, np.inf)
    if part["inner"] > 0:
        _open_gaps(meet, across, down, origin, half, float(part["inner"]))
    return meet


def _open_gaps(
    meet: np.ndarray, across: np.ndarray, down: np.ndarray, origin: np.ndarray, half: np.ndarray, share: float
) -> None:
    """Leaves holes between the leaves of a crown, as places of its surface: every sensor sees through the same ones."""
    row, column = np.nonzero(np.isfinite(meet))
    place = origin + meet[row, column, None] * (down[row] + across[column])
    ragged = noise(place[:, 0] + 0.6 * place[:, 2], place[:, 1] - 0.5 * place[:, 2], 0.7, float(half[0]))
    hole = ragged > 2.2 * (1 - share)
    meet[row[hole], column[hole]] = np.inf


def _cylinder(across: np.ndarray, down: np.ndarray, origin: np.ndarray, half: np.ndarray, part: np.void) -> np.ndarray:
    p, q, o = (across / half)[:, :2], (down / half)[:, :2], (origin / half)[:2]
    dx, dy = q[:, 0, None] + p[None, :, 0], q[:, 1, None] + p[None, :, 1]
    a = dx * dx + dy * dy
    b = o[0] * dx + o[1] * dy
    root = np.sqrt(b * b - a * (o @ o - 1))  # nan where the ray passes by
    enter, leave = _slab(across, down, origin, half, 2)
    enter = np.maximum(enter, (-b - root) / a)
    leave = np.minimum(leave, (root - b) / a)
    solid = enter <= leave
    if part["inner"] > 0:
        x, y = o[0] + enter * dx, o[1] + enter * dy
        solid &= x * x + y * y > part["inner"] ** 2
    return np.where(solid, enter, np.inf)


_INTERSECT = (_box, _taper, _ellipsoid, _cylinder)  # in the order of Kind


def _camera_rectangles(local: Float64[np.ndarray, "N 8 3"], grid: RayGrid) -> list[tuple[int, int, int, int, int]]:
    """(part, top, bottom, left, right) of the pixels that may see each part."""
    height, width = grid.shape
    depth = local[..., 2]
    across = grid.across.astype(float) @ grid.rotation[:, 0]
    down = grid.down.astype(float) @ grid.rotation[:, 1]
    # An edge plane of the picture with a whole part beyond it hides the part, in front of the camera or not.
    beyond = (depth < NEAR).all(1)
    for value, low, high in ((local[..., 0], across[0], across[-1]), (local[..., 1], down[0], down[-1])):
        beyond |= (value < low * depth).all(1) | (value > high * depth).all(1)
    points = _in_front(local)
    columns = (points[..., 0] / points[..., 2] - across[0]) / (across[1] - across[0])
    rows = (points[..., 1] / points[..., 2] - down[0]) / (down[1] - down[0])
    speck = np.ptp(columns, axis=1) * np.ptp(rows, axis=1) < SPECK
    left, right = np.floor(columns.min(1)).clip(0, width), (np.ceil(columns.max(1)) + 1).clip(0, width)
    top, bottom = np.floor(rows.min(1)).clip(0, height), (np.ceil(rows.max(1)) + 1).clip(0, height)
    limits = np.stack([top, bottom, left, right], axis=1).astype(int)
    seen = np.flatnonzero(~beyond & ~speck & (top < bottom) & (left < right))
    return [(int(i), *map(int, limits[i])) for i in seen]  # type: ignore[misc]


_EDGES = np.array([(a, a | bit) for bit in (1, 2, 4) for a in range(8) if not a & bit])  # pairs of `corners`


def _in_front(local: Float64[np.ndarray, "N 8 3"]) -> Float64[np.ndarray, "N 20 3"]:
    """Corners of what each box keeps in front of the near plane: its corners, and where its edges cross the plane.

    Rows that are neither repeat the box's farthest corner (or lie at the near plane, for boxes wholly behind it).
    """
    depth = local[..., 2]
    start, end = local[:, _EDGES[:, 0]], local[:, _EDGES[:, 1]]
    crosses = (start[..., 2] < NEAR) != (end[..., 2] < NEAR)
    span = np.where(crosses, end[..., 2] - start[..., 2], 1.0)
    share = np.where(crosses, (NEAR - start[..., 2]) / span, 0.0)
    points = np.concatenate([local, start + share[..., None] * (end - start)], axis=1)
    valid = np.concatenate([depth >= NEAR, crosses], axis=1)
    farthest = local[np.arange(len(local)), depth.argmax(1)]
    points = np.where(valid[..., None], points, farthest[:, None])
    points[..., 2] = np.maximum(points[..., 2], NEAR)
    return points


def _lidar_rectangles(
    local: Float64[np.ndarray, "N 8 3"], centre: Float64[np.ndarray, "N 3"], grid: RayGrid
) -> list[tuple[int, int, int, int, int]]:
    """(part, top, bottom, left, right) of the beams that may meet each part, split where it crosses the seam."""
    width = grid.shape[1]
    planar = np.hypot(local[..., 0], local[..., 1])
    reach = np.hypot(local[..., 0] - centre[:, None, 0], local[..., 1] - centre[:, None, 1]).max(1)
    nearest = np.maximum(np.hypot(centre[:, 0], centre[:, 1]) - reach, 1e-3)
    low, high = local[..., 2].min(1), local[..., 2].max(1)
    farthest = planar.max(1)
    steepest = np.where(high > 0, high / nearest, high / farthest)
    lowest = np.where(low < 0, low / nearest, low / farthest)
    tangents = grid.down.astype(float) @ grid.rotation[:, 2]  # rising
    top, bottom = np.searchsorted(tangents, lowest), np.searchsorted(tangents, steepest, side="right")
    middle = np.arctan2(centre[:, 1], centre[:, 0])
    turn = np.arctan2(local[..., 1], local[..., 0]) - middle[:, None]
    turn = (turn + np.pi) % (2 * np.pi) - np.pi
    around = turn.max(1) - turn.min(1) > 0.99 * np.pi  # the lidar stands above, below or beside it
    step = 2 * np.pi / width
    left = np.floor((middle + turn.min(1) + np.pi) / step).astype(int)
    right = np.ceil((middle + turn.max(1) + np.pi) / step).astype(int) + 1
    rows = (steepest - lowest) / np.mean(np.diff(tangents))
    speck = ~around & ((turn.max(1) - turn.min(1)) / step * rows < SPECK)
    rectangles = []
    for i in np.flatnonzero((top < bottom) & ~speck):
        band = (int(top[i]), int(bottom[i]))
        if around[i] or right[i] - left[i] >= width:
            rectangles.append((int(i), *band, 0, width))
            continue
        for turns in (-width, 0, width):
            a, b = max(0, left[i] + turns), min(width, right[i] + turns)
            if a < b:
                rectangles.append((int(i), *band, int(a), int(b)))
    return rectangles
