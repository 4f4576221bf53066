"""The doctor and the look around of every job find what the jobs' readers refuse: they are the same readers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preflight_cases import by_name

from slidr.cluster.superpixels import folder_of
from slidr.config import Config
from slidr.data.frames import FrameTable
from slidr.data.images import encode_label_map
from slidr.data.loading import PairSource, subset_frames
from slidr.data.storage import DataError
from slidr.preflight import checks
from slidr.types import Frame


def _nan(path: Path) -> None:
    sweep = np.fromfile(path, np.float32)
    sweep[100] = np.nan
    sweep.tofile(path)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _too_many_labels(path: Path) -> None:
    labels = np.array(Image.open(path)).astype(np.uint16)
    labels[0, 0] = 60_000
    path.write_bytes(encode_label_map(labels))


def _sixteen_bits(path: Path) -> None:
    grey = np.array(Image.open(path).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path, "PNG")


DAMAGE: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "a sweep with NaN": ("sweep", "data root", _nan),
    "an image of 16 bits": ("image", "data root", _sixteen_bits),
    "an image cut short": ("image", "data root", lambda path: path.write_bytes(path.read_bytes()[:-2])),
    "an RGB label map": ("map", "superpixels", lambda path: Image.new("RGB", (160, 90)).save(path)),
    "a label map with one flipped bit": ("map", "superpixels", _flip),
    "a label map with a label too many": ("map", "superpixels", _too_many_labels),
    "damaged parameters": ("parameters", "superpixels", lambda path: path.write_text('{"segments": 4')),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_training_refuses_the_first_look_and_the_doctor_find(spoilable: Config, damage: str) -> None:
    kind, finding, spoil = DAMAGE[damage]
    frame: Frame = subset_frames(spoilable, "train")[0]
    maps = Path(folder_of(spoilable.superpixels))
    path = {
        "sweep": Path(spoilable.data.root, frame.lidar_path),
        "image": Path(spoilable.data.root, frame.cameras[2].image_path),
        "map": maps / f"{frame.cameras[2].token}.png",
        "parameters": maps / "parameters.json",
    }[kind]
    source = PairSource(spoilable, str(maps))
    assert {f.name: f.what for f in checks.cheap(spoilable, "pretrain") if f.status == "error"} == {}
    source.sample("train", 0, 0)
    spoil(path)
    with pytest.raises(DataError) as refused:
        PairSource(spoilable, f"{maps}/").sample("train", 0, 0)  # another spelling: nothing is remembered
    assert path.name in str(refused.value)
    for findings in (checks.cheap(spoilable, "pretrain"), checks.thorough(spoilable)):
        found = by_name(findings)[finding]
        assert found.status == "error"
        assert path.name in found.what


def test_label_maps_are_opened_and_not_only_looked_for(spoilable: Config) -> None:
    for path in Path(folder_of(spoilable.superpixels)).glob("*.png"):
        path.write_bytes(b"")
    assert by_name(checks.cheap(spoilable))["superpixels"].status == "error"
    found = by_name(checks.thorough(spoilable))["superpixels"]
    assert (found.status, found.next) == ("error", "slidr superpixels CONFIG")
    assert "(and " in found.what


def test_superpixels_without_cameras_stop_before_they_begin_and_the_doctor_says_so(spoilable: Config) -> None:
    there = spoilable.data.cameras
    blind = replace(spoilable, data=replace(spoilable.data, cameras=("CAM_NONE",)))
    for stage in ("superpixels", "pretrain", None):
        found = by_name(checks.cheap(blind, stage))["cameras"]  # type: ignore[arg-type]
        assert found.status == "error"
        assert there[0] in found.what
    assert len(FrameTable.open(spoilable.data.frames).image_list(("CAM_NONE",))) == 0
