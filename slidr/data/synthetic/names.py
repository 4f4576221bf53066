"""The names and numbers that a nuScenes dataroot shares with every other: categories, scenes, sensors."""

from __future__ import annotations

from typing import Any

# In the order of nuScenes-lidarseg's indices 0 to 31.
CATEGORIES = (
    "noise",
    "animal",
    "human.pedestrian.adult",
    "human.pedestrian.child",
    "human.pedestrian.construction_worker",
    "human.pedestrian.personal_mobility",
    "human.pedestrian.police_officer",
    "human.pedestrian.stroller",
    "human.pedestrian.wheelchair",
    "movable_object.barrier",
    "movable_object.debris",
    "movable_object.pushable_pullable",
    "movable_object.trafficcone",
    "static_object.bicycle_rack",
    "vehicle.bicycle",
    "vehicle.bus.bendy",
    "vehicle.bus.rigid",
    "vehicle.car",
    "vehicle.construction",
    "vehicle.emergency.ambulance",
    "vehicle.emergency.police",
    "vehicle.motorcycle",
    "vehicle.trailer",
    "vehicle.truck",
    "flat.driveable_surface",
    "flat.other",
    "flat.sidewalk",
    "flat.terrain",
    "static.manmade",
    "static.other",
    "static.vegetation",
    "vehicle.ego",
)
LABEL = {name: index for index, name in enumerate(CATEGORIES)}

ATTRIBUTES = (
    "vehicle.moving",
    "vehicle.stopped",
    "vehicle.parked",
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "pedestrian.moving",
)
VISIBILITIES = (("1", "v0-40"), ("2", "v40-60"), ("3", "v60-80"), ("4", "v80-100"))

# A few scenes of each official split. "parametrize" and "verify" are both parts of "train".
SCENES: dict[str, dict[str, tuple[int, ...]]] = {
    "v1.0-trainval": {
        "parametrize": (
            *(1, 2, 4, 5, 6, 7, 10, 11, 20, 21, 22, 23, 24, 25, 26, 27, 28, 30, 31, 33, 34, 41, 43, 44),
            *(46, 47, 48, 50, 51, 53, 55, 57, 58, 59, 60, 61, 62, 63, 64, 65),
        ),
        "verify": (8, 9, 19, 29, 32, 42, 45, 49, 52, 54, 56, 66, 67, 73, 131, 152),
        "val": (
            3,
            12,
            13,
            14,
            15,
            16,
            17,
            18,
            35,
            36,
            38,
            39,
            92,
            93,
            94,
            95,
            96,
            97,
            98,
            99,
            100,
            101,
            102,
            103,
        ),
    },
    "v1.0-mini": {
        "mini_train": (61, 553, 655, 757, 796, 1077, 1094, 1100),
        "mini_val": (103, 916),
    },
}

# A nuScenes car's own calibration, for 1600 x 900 images: translation (m), rotation (w, x, y, z), focal length and
# principal point (pixels), and when the sensor fires relative to the lidar (microseconds).
LIDAR: dict[str, Any] = {
    "translation": (0.943713, 0.0, 1.84023),
    "rotation": (0.7077955119163518, -0.006492242056004365, 0.010646214713995808, -0.7063073142877817),
}
CAMERAS: dict[str, dict[str, Any]] = {
    "CAM_FRONT": {
        "translation": (1.70079118954, 0.0159456324149, 1.51095763913),
        "rotation": (0.4998015430569128, -0.5030316162024876, 0.4997798114386805, -0.49737083824542755),
        "focal": 1266.417203046554,
        "centre": (816.2670197447984, 491.50706579294757),
        "delay": -35_491,
    },
    "CAM_FRONT_RIGHT": {
        "translation": (1.5508477543, -0.493404796419, 1.49574800619),
        "rotation": (0.2060347966337182, -0.2026940577919598, 0.6824507824531167, -0.6713610884174485),
        "focal": 1260.8474446004698,
        "centre": (807.968244525554, 495.3344268742088),
        "delay": -27_612,
    },
    "CAM_BACK_RIGHT": {
        "translation": (1.0148780988, -0.480568219723, 1.56239545128),
        "rotation": (0.12280980120078765, -0.132400842670559, -0.7004305821388234, 0.690496031265798),
        "focal": 1259.5137405846733,
        "centre": (807.2529053838625, 501.19579884916527),
        "delay": -20_058,
    },
    "CAM_BACK": {
        "translation": (0.0283260309358, 0.00345136761476, 1.57910346144),
        "rotation": (0.5037872666382278, -0.49740249788611096, -0.4941850223835201, 0.5045496097725578),
        "focal": 809.2209905677063,
        "centre": (829.2196003259838, 481.77842384512485),
        "delay": -10_426,
    },
    "CAM_BACK_LEFT": {
        "translation": (1.03569100218, 0.484795032713, 1.59097014818),
        "rotation": (0.6924185592174665, -0.7031619420114925, -0.11648342771943819, 0.11203317912370753),
        "focal": 1256.7414812095406,
        "centre": (792.1125740759628, 492.7757465151356),
        "delay": -528,
    },
    "CAM_FRONT_LEFT": {
        "translation": (1.52387798135, 0.494631336551, 1.50932822144),
        "rotation": (0.6757265034669446, -0.6736266522251881, 0.21214015046209478, -0.21122827103904068),
        "focal": 1272.5979470598488,
        "centre": (826.6154927353808, 479.75165386361925),
        "delay": -43_107,
    },
}
