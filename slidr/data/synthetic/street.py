"""A street and everything in it: lanes, pavements, houses, parked and moving objects, and the ego car's way.

Street frame: x along the road, y to its left, z up, metres; the ego car drives towards +x in the right-hand lane.
Objects move straight ahead at constant speed, so that one table describes a scene at every moment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slidr.data.synthetic.names import LABEL
from slidr.data.synthetic.objects import MAKERS
from slidr.data.synthetic.palette import WHITE, pick
from slidr.data.synthetic.roadside import fence, lamp_post, street_furniture
from slidr.data.synthetic.scenery import building, shrub, tree
from slidr.data.synthetic.shapes import Kind, Parts, place
from slidr.data.synthetic.textures import Material
from slidr.shapes import Float64

REACH = 80.0  # metres of street before the start and past the end of the ego car's way
SIGHT, TALL = 70.0, 3.5  # metres along the street beyond which only things taller than this are kept
KERB = 0.14  # metres that pavements stand above the road
# What lines the kerbs, over and over in a scene's own order. Long vehicles stand across the road, to be seen whole.
NEAR_DECK: tuple[str, ...] = (
    *("vehicle.car", "gap") * 2,
    *("vehicle.motorcycle", "vehicle.bicycle", "people", "works", "barriers", "cones", "island"),
)
FAR_DECK: tuple[str, ...] = (
    *("vehicle.truck", "vehicle.bus.rigid", "works", "vehicle.car", "gap"),
    *("vehicle.trailer",) * 2,
    *("vehicle.motorcycle", "vehicle.bicycle", "barriers", "island"),
)


@dataclass(frozen=True)
class Look:
    """Light and air of a scene."""

    sun: Float64[np.ndarray, " 3"]  # unit vector towards the sun
    sunlight: Float64[np.ndarray, " 3"]
    skylight: Float64[np.ndarray, " 3"]
    zenith: Float64[np.ndarray, " 3"]
    horizon: Float64[np.ndarray, " 3"]
    clouds: float  # 0 clear to 1 overcast
    haze: float  # metres at which things have faded by 1 - 1/e
    exposure: float


@dataclass(frozen=True)
class Street:
    """A scene: parts in their owners' frames, and the owners' motion."""

    parts: np.ndarray  # dtype PART
    category: tuple[str, ...]  # per object; static surroundings are objects, too
    size: Float64[np.ndarray, "O 3"]  # length, width, height, metres
    start: Float64[np.ndarray, "O 3"]  # metres, street frame, at time 0
    yaw: Float64[np.ndarray, " O"]
    speed: Float64[np.ndarray, " O"]  # metres per second along the heading
    look: Look
    ego_speed: float
    ego_lane: float  # y, metres
    ego_sway: Float64[np.ndarray, " 3"]  # metres, radians per second, phase

    def positions(self, seconds: float) -> Float64[np.ndarray, "O 3"]:
        ahead = np.stack([np.cos(self.yaw), np.sin(self.yaw), np.zeros_like(self.yaw)], axis=1)
        return self.start + ahead * (self.speed * seconds)[:, None]

    def at(self, seconds: float) -> np.ndarray:
        """Every part in the street frame at a moment, without low things far up or down the street."""
        positions = self.positions(seconds)
        away = np.abs(positions[:, 0] - self.ego(seconds)[0][0]) - self.size[:, 0] / 2
        there = (away < SIGHT) | (self.size[:, 2] > TALL)
        return place(self.parts[there[self.parts["owner"]]], positions, self.yaw)

    def ego(self, seconds: float) -> tuple[Float64[np.ndarray, " 3"], float]:
        """Where the ego car is, and its heading."""
        amount, rate, phase = self.ego_sway
        y = self.ego_lane + amount * np.sin(rate * seconds + phase)
        slope = amount * rate * np.cos(rate * seconds + phase) / max(self.ego_speed, 1.0)
        return np.array([self.ego_speed * seconds, y, 0.0]), float(np.arctan(slope))


class _Builder:
    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.parts = Parts()
        self.rows: list[tuple[str, tuple, tuple, float, float]] = []

    def begin(self, label: str) -> None:
        self.parts.owner = len(self.rows)
        self.parts.label = LABEL[label]
        self.parts.roughness = 0.0
        self.parts.reflectivity = float(self.rng.uniform(0.1, 0.6))

    def end(self, category: str, size: tuple, x: float, y: float, z: float, yaw: float, speed: float) -> None:
        self.rows.append((category, size, (x, y, z), yaw, speed))

    def thing(
        self,
        category: str,
        x: float,
        y: float,
        z: float = 0.0,
        yaw: float = 0.0,
        speed: float = 0.0,
        **options: bool,
    ) -> tuple:
        self.begin(category)
        size = MAKERS[category](self.parts, self.rng, **options)
        self.end(category, size, x, y, z, yaw, speed)
        return size

    def move_last(self, ahead: float, aside: float) -> None:
        """Shifts the newest object along x and y."""
        category, size, (x, y, z), yaw, speed = self.rows[-1]
        self.rows[-1] = (category, size, (x + ahead, y + aside, z), yaw, speed)

    def scenery(self, label: str, maker: object, x: float, y: float, z: float, yaw: float, *extra: object) -> tuple:
        self.begin(label)
        size = maker(self.parts, self.rng, *extra)  # type: ignore[operator]
        self.end("", size, x, y, z, yaw, 0.0)
        return size

    def slab(
        self,
        label: str,
        x: tuple[float, float],
        y: tuple[float, float],
        top: float,
        colour: np.ndarray,
        material: Material,
        accent: np.ndarray,
        pattern: tuple[float, float],
        reflectivity: float,
        roughness: float = 0.0,
    ) -> None:
        self.begin(label)
        self.parts.reflectivity, self.parts.roughness = reflectivity, roughness
        middle = ((x[0] + x[1]) / 2, (y[0] + y[1]) / 2)
        size = (x[1] - x[0], y[1] - y[0], 1.0)
        self.parts.add(Kind.BOX, (0, 0, -0.5), size, colour, material, accent=accent, pattern=pattern)
        self.end("", size, *middle, top, 0.0, 0.0)


def draw_look(rng: np.random.Generator) -> Look:
    """Clear, hazy or overcast; morning to evening."""
    height, around = np.radians(rng.uniform(22, 65)), rng.uniform(0, 2 * np.pi)
    clouds = float(rng.choice([rng.uniform(0, 0.4), rng.uniform(0.6, 1.0)], p=[0.7, 0.3]))
    warm = np.array([1.0, 0.93, 0.82]) if height < np.radians(35) else np.array([1.0, 0.97, 0.92])
    clear = np.array([0.27, 0.47, 0.78]) * rng.uniform(0.85, 1.1)
    grey = np.array([0.66, 0.69, 0.73])
    horizon = np.array([0.78, 0.84, 0.9]) * rng.uniform(0.9, 1.05) * (0.5 + 0.5 * warm)
    return Look(
        sun=np.array([np.cos(height) * np.cos(around), np.cos(height) * np.sin(around), np.sin(height)]),
        sunlight=warm * (1.05 - 0.8 * clouds),
        skylight=np.array([0.72, 0.76, 0.81]) * (0.9 + 0.6 * clouds),
        zenith=clear * (1 - clouds) + grey * clouds,
        horizon=horizon * (1 - 0.4 * clouds) + grey * 0.4 * clouds,
        clouds=clouds,
        haze=float(rng.uniform(180, 600)),
        exposure=float(rng.uniform(1.0, 1.3)),
    )


def build_street(rng: np.random.Generator, seconds: float) -> Street:
    """A new street for a drive of `seconds`; every lidarseg class stands along every stretch of it."""
    build = _Builder(rng)
    ego_speed = float(rng.uniform(4.0, 9.0))
    span = (-REACH, REACH + ego_speed * seconds)
    lane = float(rng.uniform(3.2, 3.7))
    median = float(rng.choice([0.0, rng.uniform(1.2, 2.6)]))
    lanes = int(rng.choice([1, 2], p=[0.65, 0.35]))
    cycles, parking = float(rng.uniform(1.7, 2.7)), 2.6  # a margin or cycle lane, and the lane along the kerb
    edge = median / 2 + lanes * lane + cycles + parking  # half width between kerbs
    _ground(build, span, edge, lane, median)
    for side, cards in ((-1, NEAR_DECK), (1, FAR_DECK)):
        deck = [str(item) for item in rng.permutation(cards)]
        _kerb_side(build, span, side, side * (edge - parking / 2 - 0.1), deck)
        _pavement(build, span, side, edge)
    ego_lane = -(median / 2 + lane / 2)
    _traffic(build, span, lane, lanes, median, ego_speed)
    _riders(build, span, edge - parking - cycles / 2, ego_speed)
    table = build.parts.table()
    category, size, start, yaw, speed = zip(*build.rows, strict=True)
    return Street(
        parts=table,
        category=category,
        size=np.array(size, float),
        start=np.array(start, float),
        yaw=np.array(yaw, float),
        speed=np.array(speed, float),
        look=draw_look(rng),
        ego_speed=ego_speed,
        ego_lane=ego_lane,
        ego_sway=np.array([rng.uniform(0, 0.25), rng.uniform(0.2, 0.7), rng.uniform(0, 2 * np.pi)]),
    )


def _flat(rng: np.random.Generator, kind: str) -> dict:
    """Colours and texture of a kind of ground, newly drawn."""
    grey = np.float32(rng.uniform(0.2, 0.36)) * np.array([1, 1, 1.02], np.float32)
    pale = pick(
        rng,
        [(0.55, 0.53, 0.5), (0.5, 0.5, 0.52), (0.58, 0.5, 0.42), (0.45, 0.44, 0.42), (0.55, 0.4, 0.34)],
        0.03,
    )
    if kind == "flat.driveable_surface":
        return {
            "colour": grey,
            "material": Material.ASPHALT,
            "accent": WHITE,
            "reflectivity": rng.uniform(0.06, 0.3),
        }
    if kind == "flat.sidewalk":
        size = (rng.uniform(0.5, 1.6), rng.uniform(0.5, 1.5))
        look = {"material": Material.TILES, "accent": pale * 0.6, "pattern": size}
        return {"colour": pale, "reflectivity": rng.uniform(0.1, 0.42), **look}
    if kind == "flat.terrain":
        green = pick(
            rng,
            [
                (0.3, 0.42, 0.17),
                (0.38, 0.44, 0.2),
                (0.25, 0.36, 0.16),
                (0.45, 0.42, 0.25),
                (0.42, 0.34, 0.24),
            ],
            0.03,
        )
        dry = pick(rng, [(0.5, 0.42, 0.28), (0.4, 0.32, 0.22), (0.52, 0.48, 0.3)], 0.03)
        look = {"material": Material.GRASS, "accent": dry, "pattern": (rng.uniform(0.1, 0.7), 0.0)}
        return {
            "colour": green,
            "reflectivity": rng.uniform(0.12, 0.5),
            "roughness": rng.uniform(0.02, 0.06),
            **look,
        }
    stone = pick(rng, [(0.42, 0.38, 0.35), (0.5, 0.48, 0.46), (0.5, 0.34, 0.28), (0.36, 0.38, 0.4)], 0.03)
    hatch = float(rng.choice([0.0, rng.uniform(1.2, 2.4)]))
    paint = WHITE if rng.random() < 0.6 else np.array([0.85, 0.65, 0.15], np.float32)
    look = {"material": Material.COBBLES, "accent": paint, "pattern": (rng.uniform(0.16, 0.34), hatch)}
    return {"colour": stone, "reflectivity": rng.uniform(0.08, 0.42), "roughness": 0.008, **look}


def _ground(build: _Builder, span: tuple[float, float], edge: float, lane: float, median: float) -> None:
    """The carriageway, a median, and on each side strips of pavement, grass and paved places in changing order."""
    rng = build.rng
    wide = (span[0] - 400, span[1] + 400)
    road = _flat(rng, "flat.driveable_surface")
    build.slab("flat.driveable_surface", wide, (-400, 400), 0.0, pattern=(lane, edge), **road)
    if median > 0:
        kind = "flat.other" if rng.random() < 0.7 else "flat.terrain"
        half = median / 2 - 0.15
        build.slab(kind, (span[0], span[1]), (-half, half), KERB, **_flat(rng, kind))
    for side in (-1, 1):
        look = {kind: _flat(rng, kind) for kind in ("flat.sidewalk", "flat.terrain", "flat.other")}
        verge = rng.uniform(1.2, 2.2) if rng.random() < 0.5 else 0.0
        path = rng.uniform(2.2, 4.0)
        x = span[0]
        while x < span[1]:
            end = x + rng.uniform(12, 20)
            back = str(rng.choice(list(look), p=[0.12, 0.5, 0.38]))
            strips = [("flat.sidewalk", edge + verge, edge + verge + path, KERB)]
            strips += [(back, edge + verge + path, edge + verge + path + 14, KERB + rng.uniform(-0.02, 0.1))]
            if verge > 0:
                kind = "flat.terrain" if rng.random() < 0.6 else "flat.other"
                strips += [(kind, edge, edge + verge, KERB)]
            for kind, low, high, top in strips:
                build.slab(
                    kind,
                    (x, end),
                    (min(side * low, side * high), max(side * low, side * high)),
                    top,
                    **look[kind],
                )
            x = end
        y = (edge + 10, 300) if side > 0 else (-300, -edge - 10)
        build.slab("flat.terrain", wide, y, KERB - 0.05, **_flat(rng, "flat.terrain"))


def _kerb_side(build: _Builder, span: tuple[float, float], side: int, y: float, deck: list[str]) -> None:
    """What is parked or set up along the kerb: one deck again and again, so that every kind is never far away."""
    rng = build.rng
    heading = 0.0 if side < 0 else np.pi
    x = span[0] - rng.uniform(0, 10)
    turn = 0
    while x < span[1]:
        item = deck[turn % len(deck)]
        turn += 1
        yaw = heading + (np.pi if rng.random() < 0.15 else 0.0) + rng.normal(0, 0.03)
        if item in ("vehicle.motorcycle", "vehicle.bicycle"):
            for k in range(int(rng.integers(2, 4))):
                slant = heading + np.pi / 2 * rng.uniform(0.2, 1.1)
                build.thing(item, x + 0.6 + 1.2 * k, y - side * rng.uniform(0, 0.4), yaw=slant)
            x += 4.4
        elif item == "works":
            x += _works(build, x, y, side, heading)
        elif item == "barriers":
            for k in range(int(rng.integers(2, 4))):
                build.thing("movable_object.barrier", x + 1.2 + 2.5 * k, y - side * rng.uniform(0.2, 0.9), yaw=yaw)
            x += 7.6
        elif item == "cones":
            for k in range(int(rng.integers(5, 7))):
                build.thing("movable_object.trafficcone", x + 0.4 + 0.9 * k, y - side * rng.uniform(0.4, 1.2), yaw=k)
            x += 5.4
        elif item == "gap":
            x += rng.uniform(3, 7)
        elif item == "people":
            for k in range(int(rng.integers(3, 6))):
                build.thing(
                    "human.pedestrian.adult", x + 0.9 * k, y - side * rng.uniform(-0.6, 1.0), yaw=rng.uniform(0, 6)
                )
            x += 4.5
        elif item == "island":
            x += _island(build, x, y, side)
        else:
            length, width, _ = build.thing(item, x, y, yaw=yaw)
            build.move_last(length / 2, -side * max(0.0, (width - 2.1) / 2))
            x += length + rng.uniform(0.9, 2.2)


def _works(build: _Builder, x: float, y: float, side: int, heading: float) -> float:
    """A road works: a machine behind barriers and cones, with people; returns its length."""
    rng = build.rng
    length, _, _ = build.thing("vehicle.construction", x, y, yaw=heading + rng.normal(0, 0.15))
    build.move_last(length / 2 + 1.4, side * 0.2)
    for end in (x + 0.2, x + length + 2.6):
        build.thing("movable_object.barrier", end, y, yaw=np.pi / 2 + rng.normal(0, 0.1))
    for k in range(6):
        at = x + 0.6 + (length + 1.6) * k / 5
        build.thing("movable_object.trafficcone", at, y - side * rng.uniform(1.4, 1.7), yaw=k)
    if rng.random() < 0.8:
        kind = "human.pedestrian.construction_worker"
        build.thing(kind, x + rng.uniform(0.8, 1.4), y - side * rng.uniform(0, 1), yaw=rng.uniform(0, 6))
    return length + 3.6


def _island(build: _Builder, x: float, y: float, side: int) -> float:
    """A raised paved island where the parking lane is broken, with a tree, a post or bollards; returns its length."""
    rng = build.rng
    length = rng.uniform(5, 8)
    build.slab("flat.other", (x, x + length), (y - 1.2, y + 1.2), KERB, **_flat(rng, "flat.other"))
    if rng.random() < 0.5:
        build.scenery("static.vegetation", tree if rng.random() < 0.5 else shrub, x + length / 2, y, KERB, 0.0)
    else:
        build.scenery(
            "static.manmade",
            lamp_post,
            x + rng.uniform(0.5, length - 0.5),
            y,
            KERB,
            0.0 if side < 0 else np.pi,
        )
    return length + rng.uniform(0.8, 1.6)


def _pavement(build: _Builder, span: tuple[float, float], side: int, edge: float) -> None:
    """People, trees, posts and furniture on the pavement, and the buildings or gardens behind it."""
    rng = build.rng
    x = span[0]
    while x < span[1]:
        kind = rng.random()
        y = side * (edge + rng.uniform(0.5, 1.0))
        facing = 0.0 if side < 0 else np.pi
        if kind < 0.3:
            build.scenery("static.vegetation", tree, x, side * (edge + rng.uniform(0.7, 1.4)), KERB, rng.uniform(0, 6))
        elif kind < 0.5:
            build.scenery("static.vegetation", shrub, x, side * (edge + rng.uniform(0.9, 1.3)), KERB, 0.0)
        elif kind < 0.8:
            build.scenery("static.manmade", lamp_post, x, y, KERB, facing)
        else:
            build.scenery(
                "static.manmade",
                street_furniture,
                x,
                side * (edge + rng.uniform(3.5, 5)),
                KERB,
                facing + np.pi,
            )
        x += rng.uniform(4.5, 9)
    x = span[0]
    while x < span[1]:
        name = str(
            rng.choice(["human.pedestrian.adult"] * 6 + ["human.pedestrian.child", "human.pedestrian.police_officer"])
        )
        moving = rng.random() < 0.7
        yaw = float(rng.choice([0.0, np.pi]) + rng.normal(0, 0.15)) if moving else rng.uniform(0, 6)
        for k in range(int(rng.integers(1, 4))):
            offset = side * (edge + rng.uniform(0.4, 3.6))
            build.thing(name, x + 0.7 * k, offset, KERB, yaw, rng.uniform(0.7, 1.6) if moving else 0.0)
        if rng.random() < 0.12:
            build.thing(
                "vehicle.bicycle",
                x + 4,
                side * (edge + 2.5),
                KERB,
                float(rng.choice([0.0, np.pi])),
                3.5,
                ridden=True,
            )
        x += rng.uniform(4, 9)
    _backdrop(build, span, side, edge)


def _backdrop(build: _Builder, span: tuple[float, float], side: int, edge: float) -> None:
    rng = build.rng
    style = str(rng.choice(["block", "house", "hall", "mixed"]))
    x = span[0] - 20
    while x < span[1] + 20:
        here = str(rng.choice(["block", "house", "hall"])) if style == "mixed" else style
        length = {"block": rng.uniform(10, 26), "house": rng.uniform(8, 13), "hall": rng.uniform(16, 34)}[here]
        depth = rng.uniform(9, 14)
        setback = edge + (rng.uniform(5.0, 7.5) if here == "block" else rng.uniform(8, 13))
        if rng.random() < 0.2:
            for _ in range(int(rng.integers(2, 5))):
                build.scenery(
                    "static.vegetation",
                    tree,
                    x + rng.uniform(0, 10),
                    side * (edge + rng.uniform(6, 16)),
                    KERB,
                    0.0,
                )
            x += rng.uniform(8, 13)
            continue
        facing = np.pi if side > 0 else 0.0
        build.scenery(
            "static.manmade",
            building,
            x + length / 2,
            side * (setback + depth / 2),
            KERB,
            facing,
            length,
            depth,
            here,
        )
        if here != "block":
            for k in range(int(rng.integers(1, 3))):
                maker, label = (
                    (fence, "static.manmade"),
                    (shrub, "static.vegetation"),
                    (tree, "static.vegetation"),
                )[int(rng.integers(3))]
                build.scenery(
                    label,
                    maker,
                    x + length * (0.3 + 0.4 * k),
                    side * (edge + rng.uniform(5.5, 7.5)),
                    KERB,
                    0.0,
                )
        x += length + rng.uniform(0.5, 7)


def _traffic(
    build: _Builder, span: tuple[float, float], lane: float, lanes: int, median: float, ego_speed: float
) -> None:
    """Cars, buses and trucks under way; each lane flows at one speed."""
    rng = build.rng
    kinds = ["vehicle.car"] * 3 + ["vehicle.truck", "vehicle.bus.rigid"]
    for direction in (1, -1):
        for k in range(lanes):
            own = direction == 1 and k == 0
            speed = ego_speed if own else float(rng.uniform(3, 9))
            y = -direction * (median / 2 + (k + 0.5) * lane)
            x = span[0] + rng.uniform(0, 20)
            while x < span[1]:
                kind = str(rng.choice(kinds))
                if direction == 1 and (not own or abs(x) < 26):
                    kind = "vehicle.car"  # a long vehicle that keeps beside the ego car would hide the street
                if not (own and -14 < x < 16):
                    build.thing(kind, x, y + rng.normal(0, 0.15), 0.0, 0.0 if direction > 0 else np.pi, speed)
                x += rng.uniform(20, 40)


def _riders(build: _Builder, span: tuple[float, float], y: float, ego_speed: float) -> None:
    """Cyclists, motorcyclists and a few people on foot beside the lanes, bound both ways."""
    rng = build.rng
    for direction in (1, -1):
        speed = ego_speed if direction > 0 else rng.uniform(3, 8)
        x = span[0] + rng.uniform(0, 10)
        turn = int(rng.integers(3))
        while x < span[1]:
            kind = ("vehicle.motorcycle", "vehicle.bicycle", "human.pedestrian.adult")[turn % 3]
            turn += 1
            if kind == "human.pedestrian.adult":
                _walkers(build, x, -direction * y)
                x += rng.uniform(6, 10)
                continue
            aside = -direction * (y + rng.uniform(-0.3, 0.3))
            if not (direction > 0 and -5 < x < 4):  # not right beside the ego car, all the way
                build.thing(kind, x, aside, 0.0, 0.0 if direction > 0 else np.pi, float(speed), ridden=True)
            x += rng.uniform(7, 20)


def _walkers(build: _Builder, x: float, y: float) -> None:
    """Two or three people who walk along the road's margin, or stand about to cross it."""
    rng = build.rng
    crossing = rng.random() < 0.4
    speed = 0.0 if crossing else rng.uniform(0.8, 1.5)
    yaw = rng.uniform(0, 2 * np.pi) if crossing else float(rng.choice([0.0, np.pi]))
    for k in range(int(rng.integers(2, 4))):
        build.thing("human.pedestrian.adult", x + 0.8 * k, y + rng.uniform(-0.7, 0.7), 0.0, yaw, float(speed))
