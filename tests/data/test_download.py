"""Downloads that are not whole: refused with how much is whole, or taken as far as they go, and recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slidr.config import AugmentConfig, Config, ConfigError, DataConfig, MissingFiles, decode, fingerprint
from slidr.data.completeness import lacking_of_split, scan_gaps
from slidr.data.download import Download
from slidr.data.frames import FrameTable
from slidr.data.loading import ScanSource
from slidr.data.nuscenes import read_download, scenes_of_splits
from slidr.data.splits import SEMANTIC_KITTI_SEQUENCES
from slidr.data.storage import DataError
from slidr.stages import make_frames
from slidr.training.runs import identity
from slidr.types import CAMERA_CHANNELS

VERSION = "v1.0-trainval"


@pytest.fixture
def root(tiny_world: Path, tmp_path: Path) -> Path:
    """A copy of the world's files: 8 keyframes of 4 scenes, labelled."""
    shutil.copytree(tiny_world, tmp_path / "root")
    return tmp_path / "root"


def _one_image(root: Path) -> None:
    next(iter(sorted((root / "samples/CAM_BACK").iterdir()))).unlink()


def _one_camera_only(root: Path) -> None:
    for channel in set(CAMERA_CHANNELS) - {"CAM_FRONT"}:
        shutil.rmtree(root / "samples" / channel)


def _no_images(root: Path) -> None:
    for channel in CAMERA_CHANNELS:
        shutil.rmtree(root / "samples" / channel)


def _one_scene(root: Path) -> None:
    """One of the archives: the files of the first scene."""
    keep = {path for frame in _whole(root).frames[:2] for path in (frame.lidar_path, frame.label_path)}
    keep |= {camera.image_path for frame in _whole(root).frames[:2] for camera in frame.cameras}
    for file in [*root.glob("samples/*/*"), *root.glob(f"lidarseg/{VERSION}/*")]:
        if file.relative_to(root).as_posix() not in keep:
            file.unlink()


def _no_labels(root: Path) -> None:
    shutil.rmtree(root / "lidarseg")


def _camera_missing_in_the_tables(root: Path) -> None:
    path = root / VERSION / "sample_data.json"
    rows = json.loads(path.read_text())
    rows.remove(next(row for row in rows if row["is_key_frame"] and "/CAM_BACK/" in row["filename"]))
    path.unlink()
    path.write_text(json.dumps(rows))


def _whole(root: Path) -> Download:
    return read_download(str(root), VERSION, check_files=False)


@pytest.mark.parametrize(
    ("damage", "refusal", "scenes", "cameras"),
    [
        (_one_image, "7 of 8 keyframes and 3 of 4 scenes are whole", (6, 36, 6), (8, 47, 8)),
        (_one_camera_only, "0 of 8 keyframes and 0 of 4 scenes are whole", None, (8, 8, 8)),
        (_no_images, "0 of 8 keyframes and 0 of 4 scenes are whole", None, (8, 0, 8)),
        (_one_scene, "2 of 8 keyframes and 1 of 4 scenes are whole", (2, 12, 2), (2, 12, 2)),
        (_no_labels, "8 of 8 keyframes and 4 of 4 scenes are whole, but for point labels", (8, 48, 0), (8, 48, 0)),
        (_camera_missing_in_the_tables, "7 of 8 keyframes and 3 of 4 scenes are whole", (6, 36, 6), (8, 47, 8)),
    ],
)
def test_what_is_there_of_a_download_is_counted_and_can_be_taken(
    root: Path,
    damage: Callable[[Path], None],
    refusal: str,
    scenes: tuple[int, int, int] | None,
    cameras: tuple[int, int, int] | None,
) -> None:
    assert _counts(read_download(str(root), VERSION)) == (8, 48, 8)
    damage(root)
    with pytest.raises(DataError, match=rf"{refusal}.*--data\.allow_missing scenes .* or cameras"):
        read_download(str(root), VERSION)
    for allowed, expected in (("scenes", scenes), ("cameras", cameras)):
        if expected is None:
            with pytest.raises(DataError, match="allow_missing: scenes leaves no keyframe: every scene lacks a file"):
                read_download(str(root), VERSION, allow_missing="scenes")
            continue
        found = read_download(str(root), VERSION, allow_missing=allowed)  # type: ignore[arg-type]
        assert _counts(found) == expected
        assert found.left_out.startswith("without ")
        for frame in found.frames:
            files = [frame.lidar_path, *(camera.image_path for camera in frame.cameras)]
            files += [frame.label_path] if frame.label_path is not None else []
            assert all((root / path).exists() for path in files)


def _counts(download: Download) -> tuple[int, int, int]:
    """Keyframes, images, keyframes with labels."""
    frames = download.frames
    return len(frames), sum(len(f.cameras) for f in frames), sum(f.label_path is not None for f in frames)


def test_a_refusal_names_the_files_the_table_that_names_them_and_a_lost_sweep_loses_its_scene(root: Path) -> None:
    sweep = _whole(root).frames[2].lidar_path
    (root / sweep).unlink()
    with pytest.raises(
        DataError, match=rf"{sweep}: named by the tables but missing \(.*sample_data\.json\)".replace("+", r"\+")
    ):
        read_download(str(root), VERSION)
    found = read_download(str(root), VERSION, allow_missing="cameras")
    assert {frame.scene for frame in found.frames} == {
        f.scene for f in _whole(root).frames if f.lidar_path != sweep
    } - {_whole(root).frames[2].scene}
    assert found.left_out == f"without 1 of 4 scenes ({_whole(root).frames[2].scene})"


def test_a_link_to_nothing_is_a_missing_file(root: Path) -> None:
    image = root / _whole(root).frames[0].cameras[0].image_path
    image.unlink()
    image.symlink_to(root / "samples" / "gone.jpg")
    with pytest.raises(DataError, match=r"CAM_FRONT/.*: named by the tables but missing"):
        read_download(str(root), VERSION)


@pytest.mark.parametrize("allowed", [None, "scenes", "cameras"])
def test_frames_records_what_it_took_and_fine_tuning_reads_it_without_images(
    root: Path, tmp_path: Path, allowed: MissingFiles | None, capfd: pytest.CaptureFixture[str]
) -> None:
    data = DataConfig(root=str(root), frames=str(tmp_path / "frames.parquet"), allow_missing=allowed)
    config = Config(data=replace(data, train_split="parametrize", augment=AugmentConfig(drop_cuboid=False)))
    make_frames(config)  # whole: nothing to record
    whole = FrameTable.open(data.frames)
    assert (whole.allow_missing, whole.left_out) == (None, "")
    _no_images(root)
    if allowed != "cameras":
        with pytest.raises(DataError, match="0 of 8 keyframes" if allowed is None else "leaves no keyframe"):
            make_frames(config)
        return
    make_frames(config)
    table = FrameTable.open(data.frames)
    assert (table.allow_missing, table.left_out, len(table)) == ("cameras", "without 48 images", 8)
    assert "by data.allow_missing: cameras the table is without 48 images" in capfd.readouterr().err
    source = ScanSource(config)
    assert (source.sample("train", 0, 0).point_labels > 0).any()


def test_the_key_changes_no_fingerprint_and_is_for_nuscenes() -> None:
    assert fingerprint(DataConfig()) == fingerprint(DataConfig(allow_missing=None))
    one, other = Config(), Config(data=DataConfig(allow_missing="cameras"))
    assert identity(one) == identity(other)  # the frame table's fingerprint says what was taken
    assert decode({"data": {"allow_missing": "scenes"}}).data.allow_missing == "scenes"
    with pytest.raises(ConfigError, match=r"data\.allow_missing: got scenes, which is for nuscenes"):
        decode({"data": {"dataset": "semantic_kitti", "allow_missing": "scenes"}})


def test_scenes_in_no_official_split_are_named(root: Path) -> None:
    path = root / VERSION / "scene.json"
    rows = json.loads(path.read_text())
    for number, row in enumerate(rows):
        row["name"] = f"tour-{number}"
    path.unlink()
    path.write_text(json.dumps(rows))
    notes = read_download(str(root), VERSION).notes
    assert notes == [
        "4 scenes are in no official split of nuScenes (tour-0, tour-1, tour-2 and 1 more): only the split all has "
        "them; set data.train_split: all, or give them the names of official scenes"
    ]


def test_gaps_are_the_official_scans_that_are_not_there() -> None:
    whole = [f"04/{scan:06d}" for scan in range(271)]
    assert scan_gaps(whole) == []
    assert scan_gaps(whole[:-2]) == ["sequence 04 lacks 2 of 271 scans: 000269 to 000270"]
    assert scan_gaps(whole[::2]) == [
        "sequence 04 lacks 135 of 271 scans: 000001, 000003, 000005, 000007, 000009 and 130 more ranges"
    ]
    assert scan_gaps(["copy/1", "04/²"]) == []


def test_a_split_lacks_the_sequences_scans_and_scenes_that_are_not_there() -> None:
    def lacking(split: str, tokens: list[str]) -> str:
        return lacking_of_split("semantic_kitti", split, tokens, [])

    val = [f"08/{scan:06d}" for scan in range(4071)]
    assert lacking("val", val) == lacking("parametrize", []) == lacking("all", []) == ""
    assert lacking("val", val[:5] + val[6:]) == "sequence 08 lacks 1 of 4071 scans: 000005"
    assert lacking("val", []) == "sequence 08"
    test = [f"{name}/{scan:06d}" for name, scans in SEMANTIC_KITTI_SEQUENCES["test"].items() for scan in range(scans)]
    assert lacking("test", test) == ""
    assert lacking("test", [token for token in test if token != "17/000003"]) == (
        "sequence 17 lacks 1 of 491 scans: 000003"
    )
    scenes = list(scenes_of_splits()["val"])
    assert lacking_of_split("nuscenes", "val", [], scenes) == ""
    assert lacking_of_split("nuscenes", "val", [], scenes[1:]) == f"1 of 150 scenes: {scenes[0]}"
