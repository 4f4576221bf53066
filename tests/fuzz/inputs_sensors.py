"""Inputs of sensors: images, sweeps, point labels, and the superpixel maps made of images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slidr.cluster.superpixels import compute_images, missing_maps
from slidr.cluster.superpixels import folder_of as superpixel_folder
from slidr.config import ClusterConfig
from slidr.data.frames import ImageRef
from slidr.data.images import encode_label_map
from slidr.data.label_maps import map_path
from slidr.data.samples import pair_sample, scan_sample

from . import formats, trees
from .harness import Input
from .shared import DATA, HEIGHT, SUPERPIXELS, WIDTH, frame, labels_say, points, put, sweep_says


def picture(variant: int) -> Image.Image:
    rng = np.random.default_rng([4, variant])
    blocks = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


def label_map(variant: int) -> np.ndarray:
    labels = np.random.default_rng([5, variant]).integers(0, 6, (HEIGHT // 8, WIDTH // 8))
    return labels.repeat(8, 0).repeat(8, 1).astype(np.uint16)


def keyframe(variant: int) -> None:
    """All files of a keyframe below `root`, and its superpixel map."""
    put("root/samples/LIDAR_TOP/0.bin", points(variant, 5).tobytes())
    labels = np.random.default_rng([6, variant]).integers(9, 31, 300).astype(np.uint8)
    put("root/lidarseg/0.bin", labels.tobytes())
    for form in ("jpg", "png"):
        sink = io.BytesIO()
        picture(variant).save(sink, "JPEG" if form == "jpg" else "PNG")
        put(f"root/samples/CAM_FRONT/0.{form}", sink.getvalue())
    maps = superpixel_folder(SUPERPIXELS)
    put(f"{maps}/image00.png", encode_label_map(label_map(variant)))
    compute_images([image_ref()], "root", SUPERPIXELS, ClusterConfig(), progress=False)


def image_ref() -> ImageRef:
    return ImageRef("image00", "samples/CAM_FRONT/0.jpg", WIDTH, HEIGHT)


MAP = map_path(superpixel_folder(SUPERPIXELS), image_ref().token)


PARAMETERS = f"{superpixel_folder(SUPERPIXELS)}/parameters.json"


def pair(image: str = "jpg") -> Any:
    return pair_sample(
        frame(image=image),
        DATA,
        superpixel_folder(SUPERPIXELS),
        student="minkunet34c",
        seed=0,
        epoch=0,
        training=False,
    )


def scan() -> Any:
    return scan_sample(frame(), DATA, student="minkunet34c", seed=0, epoch=0, training=False)


def image_says(image: str) -> Callable[[Any], bool]:
    """Whether a sample has the pixels that Pillow finds in a JPEG or PNG of 8 bits and of the right size."""

    def says(value: Any) -> bool:
        with Image.open(f"root/samples/CAM_FRONT/0.{image}") as file:
            if file.format not in ("JPEG", "PNG") or file.size != (WIDTH, HEIGHT) or file.mode.startswith(("I", "F")):
                return False
            wanted = np.asarray(file.convert("RGB").resize((24, 16), Image.Resampling.BOX), np.float32) / 255
        got = value.images[0].transpose(1, 2, 0)
        return got.shape == wanted.shape and float(np.abs(got.mean((0, 1)) - wanted.mean((0, 1))).max()) < 0.05

    return says


def map_says(value: Any) -> bool:
    """Whether a sample has the superpixels of a label map that Pillow finds whole, none of them beyond what SLIC makes.

    The maps here are blocks of 8 x 8, so that at half the size every other pixel is one.
    """
    with Image.open(MAP) as file:
        file.verify()
    with Image.open(MAP) as file:
        labels = np.array(file)
        one_channel = file.format == "PNG" and file.mode in ("L", "I;16")
    return (
        one_channel
        and labels.max() < 4 * SUPERPIXELS.segments
        and np.array_equal(value.superpixels[0], labels[::2, ::2])
    )


def superpixel_job() -> Any:
    """The job where every map is there: it checks the parameters and every map."""
    report = compute_images([image_ref()], "root", SUPERPIXELS, ClusterConfig(), progress=False)
    return report.computed, report.skipped, report.failed, json.loads(Path(PARAMETERS).read_bytes())


def parameters_say(value: Any) -> bool:
    """Whether the parameters have equal values: 0 is 0.0."""
    return value[:3] == (0, 1, ()) and value[3] == {"method": "slic", "segments": 6, "compactness": 6.0, "sigma": 0.0}


def maps_to_make() -> Any:
    return missing_maps(superpixel_folder(SUPERPIXELS), [image_ref()])


INPUTS = (
    Input(
        "nuScenes sweep",
        keyframe,
        "root/samples/LIDAR_TOP/0.bin",
        pair,
        formats.numbers(np.float32, 5),
        says=lambda value: sweep_says("root/samples/LIDAR_TOP/0.bin", 5, value),
    ),
    Input(
        "nuScenes labels",
        keyframe,
        "root/lidarseg/0.bin",
        scan,
        formats.numbers(np.uint8, 1),
        says=lambda value: labels_say("root/lidarseg/0.bin", "nuscenes", value),
    ),
    *(
        Input(
            f"image {form}",
            keyframe,
            f"root/samples/CAM_FRONT/0.{form}",
            lambda form=form: pair(form),
            formats.IMAGE,
            says=image_says(form),
        )
        for form in ("jpg", "png")
    ),
    Input("superpixel map", keyframe, MAP, pair, formats.LABEL_MAP, map_says),
    Input(
        "superpixel map, in the job",
        keyframe,
        MAP,
        maps_to_make,
        formats.LABEL_MAP,
        instead=lambda value: value == [image_ref()],
    ),
    Input("superpixel parameters, in training", keyframe, PARAMETERS, pair, trees.JSON),
    Input(
        "superpixel parameters",
        keyframe,
        PARAMETERS,
        superpixel_job,
        trees.JSON,
        parameters_say,
    ),
)
