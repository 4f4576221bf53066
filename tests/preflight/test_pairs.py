"""Whether cameras see points is looked at before a job starts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slidr.config import Config
from slidr.data.frames import read_frames, write_frames
from slidr.data.samples import read_cloud
from slidr.ops.pairing import pair_points
from slidr.preflight import inputs
from slidr.preflight.checks import cheap, thorough
from slidr.types import Camera

AWAY = np.eye(4)
AWAY[2, 3] = -1000  # m: every point is behind the camera


def rewritten(config: Config, change: dict[str, np.ndarray]) -> Config:
    """The frame table again, with the extrinsics of some cameras multiplied from the left."""

    def changed(camera: Camera) -> Camera:
        matrix = change.get(camera.channel, np.eye(4))
        return replace(camera, camera_from_lidar=matrix @ camera.camera_from_lidar)

    frames = [replace(frame, cameras=tuple(map(changed, frame.cameras))) for frame in read_frames(config.data.frames)]
    write_frames(frames, config.data.frames)
    return config


def test_the_points_that_each_camera_sees_are_counted(prepared: Config) -> None:
    found = inputs.pairs(prepared, 4)
    assert found.status == "ok"
    frames = {frame.token: frame for frame in read_frames(prepared.data.frames)}
    looked_at = [frame for frame in frames.values() if {"parametrize", "verify"} & set(frame.splits)]
    assert len(looked_at) > 4
    # All of verify, and the first and the last of parametrize.
    chosen = [frame for frame in looked_at if "verify" in frame.splits]
    parametrize = [frame for frame in looked_at if "parametrize" in frame.splits]
    chosen += [parametrize[0], parametrize[-1]]
    for number, channel in enumerate(prepared.data.cameras):
        total = 0
        for frame in chosen:
            index = pair_points(read_cloud(frame, prepared.data)[0], frame.cameras, 1.0).camera_index
            total += int((index == [camera.channel for camera in frame.cameras].index(channel)).sum())
        assert f"{channel} {total}" in found.what, number


def test_one_camera_that_sees_nothing_is_a_warning_that_names_it(spoilable: Config) -> None:
    found = inputs.pairs(rewritten(spoilable, {"CAM_BACK": AWAY}), 4)
    assert found.status == "warning"
    assert found.what.startswith("CAM_BACK sees no point")
    assert "CAM_BACK 0" in found.what


@pytest.mark.parametrize("wrong", ["behind", "millimetres", "too far"])
def test_cameras_that_see_nothing_stop_a_pretraining_before_it_starts(spoilable: Config, wrong: str) -> None:
    matrix = AWAY
    if wrong == "millimetres":
        matrix = np.eye(4)
        matrix[:3, 3] = (1e6, 0, 0)
    config = rewritten(spoilable, {} if wrong == "too far" else dict.fromkeys(spoilable.data.cameras, matrix))
    if wrong == "too far":
        config = replace(config, data=replace(config.data, min_depth=999.0))
    [found] = [finding for finding in cheap(config, "pretrain") if finding.name == "pairs"]
    assert found.status == "error"
    for word in ("no camera sees a point", read_frames(config.data.frames)[0].token, "CAM_FRONT 0", "CAM_BACK 0"):
        assert word in found.what
    assert "metres" in found.next
    assert not [finding for finding in cheap(config, "superpixels") if finding.name == "pairs"]


def test_the_doctor_looks_at_more_frames(prepared: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "slidr.preflight.machine.cluster", lambda *_: replace(inputs.pairs(prepared, 2), name="cluster")
    )
    [found] = [finding for finding in thorough(prepared) if finding.name == "pairs"]
    assert found.status == "ok"
    assert "points seen in 6 keyframes" in found.what


def test_sweeps_that_cannot_be_read_are_left_to_the_line_that_names_them(spoilable: Config) -> None:
    for frame in read_frames(spoilable.data.frames):
        with open(f"{spoilable.data.root}/{frame.lidar_path}", "wb"):
            pass
    assert inputs.pairs(spoilable, 4).status == "warning"
