"""The superpixel job: scikit-image's labels, every image once, damage mended, failures reported."""

from __future__ import annotations

import heapq
import json
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.segmentation import slic

from slidr.cluster.superpixels import (
    SuperpixelReport,
    compute_images,
    compute_map,
    compute_superpixels,
    cut_blocks,
    folder_of,
    missing_maps,
)
from slidr.config import ClusterConfig, DataConfig, SuperpixelConfig
from slidr.data.frames import FrameTable, write_frames
from slidr.data.image_list import ImageList, ImageRef
from slidr.data.images import encode_label_map
from slidr.data.nuscenes import read_frames
from slidr.data.storage import DataError
from slidr.types import CAMERA_CHANNELS, Frame


@pytest.fixture(scope="module")
def frames(tiny_world: Path) -> list[Frame]:
    return read_frames(str(tiny_world))[:3]


@pytest.fixture
def setup(tiny_world: Path, tmp_path: Path) -> tuple[DataConfig, SuperpixelConfig]:
    """A copy of the world's images, which a test may spoil, and an empty folder for their maps."""
    shutil.copytree(tiny_world / "samples", tmp_path / "root" / "samples")
    data = DataConfig(root=str(tmp_path / "root"), cameras=CAMERA_CHANNELS[:4])
    return data, SuperpixelConfig(folder=str(tmp_path / "maps"), segments=30, sigma=1.0)


def test_a_task_that_cuts_superpixels_starts_without_torch() -> None:
    """Importing it would take each worker's first second."""
    code = "import sys, slidr.cluster.superpixels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def run(frames: list[Frame], setup: tuple[DataConfig, SuperpixelConfig]) -> SuperpixelReport:
    return compute_superpixels(frames, *setup, ClusterConfig(), progress=False)


def expected_labels(root: str, path: str, config: SuperpixelConfig) -> np.ndarray:
    image = np.array(Image.open(Path(root) / path))
    return slic(image, config.segments, config.compactness, sigma=config.sigma, start_label=0)


@pytest.mark.ray
def test_every_image_gets_scikit_images_labels_and_a_rerun_does_nothing(
    frames: list[Frame], setup: tuple[DataConfig, SuperpixelConfig], ray_cluster: None
) -> None:
    data, config = setup
    report = run(frames, setup)
    assert (report.computed, report.skipped, report.failed) == (12, 0, ())
    folder = Path(report.folder)
    for camera in (c for frame in frames for c in frame.cameras if c.channel in data.cameras):
        labels = np.array(Image.open(folder / f"{camera.token}.png"))
        np.testing.assert_array_equal(labels, expected_labels(data.root, camera.image_path, config))
    assert json.loads((folder / "parameters.json").read_text()) == {
        "method": "slic",
        "segments": 30,
        "compactness": 6.0,
        "sigma": 1.0,
    }
    assert json.loads((folder / "manifest.json").read_text()) == {"images": 12, "maps": 12, "failed": {}}
    assert len(list(folder.iterdir())) == 14
    again = run(frames, setup)
    assert (again.computed, again.skipped, again.failed) == (0, 12, ())


@pytest.mark.ray
def test_a_rerun_mends_what_is_missing_or_damaged_and_touches_nothing_else(
    frames: list[Frame], setup: tuple[DataConfig, SuperpixelConfig], ray_cluster: None
) -> None:
    folder = Path(run(frames, setup).folder)
    whole = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    names = sorted(whole)
    (folder / names[0]).unlink()
    (folder / names[1]).write_bytes(b"")
    (folder / names[2]).write_bytes(whole[names[2]][:-20])
    flipped = bytearray(whole[names[3]])
    flipped[len(flipped) // 2] ^= 1
    (folder / names[3]).write_bytes(flipped)
    (folder / names[4]).write_bytes(encode_label_map(np.zeros((9, 16), np.uint16)))
    left = {name: (folder / name).stat().st_mtime_ns for name in names[5:]}
    report = run(frames, setup)
    assert (report.computed, report.skipped) == (5, 7)
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in left} == left


@pytest.mark.ray
def test_images_that_cannot_be_used_are_reported_and_all_others_done(
    frames: list[Frame], setup: tuple[DataConfig, SuperpixelConfig], ray_cluster: None, tmp_path: Path
) -> None:
    data, _ = setup
    paths = [frame.cameras[1].image_path for frame in frames]
    truncated, gone, resized = (Path(data.root) / path for path in paths)
    before = truncated.read_bytes()
    truncated.write_bytes(before[:500])
    gone.unlink()
    Image.new("RGB", (16, 9)).save(resized)
    # As the job is run: over the table, not over frames.
    write_frames(frames, str(tmp_path / "frames.parquet"))
    table = FrameTable.open(tmp_path / "frames.parquet")
    report = compute_superpixels(table, *setup, ClusterConfig(superpixel_cpus=1), progress=False)
    assert (report.computed, report.skipped) == (9, 0)
    reasons = dict(report.failed)
    assert set(reasons) == set(paths)
    assert "is truncated, damaged or not an image" in reasons[paths[0]]
    assert "No such file" in reasons[paths[1]]
    assert "is 16 x 9 pixels, the frame table says 160 x 90" in reasons[paths[2]]
    manifest = json.loads((Path(report.folder) / "manifest.json").read_text())
    assert (manifest["images"], manifest["maps"], set(manifest["failed"])) == (12, 9, set(paths))
    truncated.write_bytes(before)
    assert run(frames, setup).computed == 1


@pytest.mark.ray
def test_a_folder_that_cannot_be_written_ends_the_job_with_its_name(
    frames: list[Frame], setup: tuple[DataConfig, SuperpixelConfig], ray_cluster: None, tmp_path: Path
) -> None:
    data, config = setup
    blocked = Path(folder_of(config)) / f"{frames[0].cameras[0].token}.png"
    (blocked / "in the way").mkdir(parents=True)
    with pytest.raises(DataError, match=r"slic-30-6-1-.*: superpixels cannot be written \(.*[Dd]irectory"):
        run(frames[:1], setup)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"choose another superpixels\.folder"):
        run(frames[:1], (data, replace(config, folder=str(tmp_path / "file"))))


def test_a_map_is_made_without_a_cluster_too(
    frames: list[Frame], setup: tuple[DataConfig, SuperpixelConfig], tmp_path: Path
) -> None:
    data, config = setup
    camera = frames[0].cameras[0]
    image = ImageRef(camera.token, camera.image_path, camera.width, camera.height)
    assert missing_maps(str(tmp_path / "out"), [image]) == [image]
    compute_map(image, data.root, str(tmp_path / "out"), config)
    labels = np.array(Image.open(tmp_path / "out" / f"{camera.token}.png"))
    np.testing.assert_array_equal(labels, expected_labels(data.root, camera.image_path, config))
    assert missing_maps(str(tmp_path / "out"), [image]) == []
    with pytest.raises(DataError, match=r"token '\.\./evil' cannot name a file"):
        compute_map(replace(image, token="../evil"), data.root, str(tmp_path / "out"), config)


def test_the_folder_is_named_by_the_parameters_alone() -> None:
    one = SuperpixelConfig(folder="a")
    assert folder_of(one).startswith("a/slic-150-6-3-")
    assert folder_of(one).split("/")[1] == folder_of(replace(one, folder="b")).split("/")[1]
    others = [replace(one, segments=30), replace(one, compactness=6.5), replace(one, sigma=2.0)]
    assert len({folder_of(config) for config in (one, *others)}) == 4


def test_a_folder_of_other_parameters_is_refused(
    frames: list[Frame], setup: tuple[DataConfig, SuperpixelConfig]
) -> None:
    folder = Path(folder_of(setup[1]))
    folder.mkdir(parents=True)
    (folder / "parameters.json").write_text('{"method": "slic", "segments": 7}')
    with pytest.raises(DataError, match=r"parameters\.json: expected .* got .*'segments': 7"):
        run(frames, setup)


def test_an_interrupted_first_look_waits_for_no_file_but_those_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [ImageRef(f"{i}", f"{i}.jpg", 16, 9) for i in range(2000)]
    for image in images:
        (tmp_path / f"{image.token}.png").touch()
    read: list[str] = []

    def interrupted(path: str, *limit: int) -> bytes:
        read.append(path)
        if len(read) == 1:
            raise KeyboardInterrupt
        time.sleep(0.002)
        return b""

    monkeypatch.setattr("slidr.cluster.superpixels.storage.read_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        missing_maps(str(tmp_path), images)
    assert len(read) < len(images) / 2


class Counted(ImageList):
    """Images that count how many were taken from them."""

    taken = 0

    def __iter__(self) -> Iterator[ImageRef]:
        for image in super().__iter__():
            self.taken += 1
            yield image


def test_of_200000_images_a_bounded_number_is_in_memory_while_maps_are_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = Counted(ImageList.of(ImageRef(f"{i}", f"{i}.jpg", 16, 9) for i in range(200_000)).table)
    there = range(0, 200_000, 20)
    map_of_one = encode_label_map(np.zeros((9, 16), np.uint16))
    in_work: list[int] = []
    read = 0

    def read_bytes(path: str, *limit: int) -> bytes:
        nonlocal read
        with lock:
            read += 1
            in_work.append(images.taken // 20 + 1 - read)  # of the maps that are there
        return map_of_one if int(Path(path).stem) % 40 else map_of_one[:-1]

    lock = threading.Lock()
    monkeypatch.setattr("slidr.cluster.superpixels.storage.list_names", lambda folder: {f"{i}.png" for i in there})
    monkeypatch.setattr("slidr.cluster.superpixels.storage.read_bytes", read_bytes)
    missing = missing_maps("maps", images)
    assert read == len(there)
    assert max(in_work) <= 130
    assert list(missing.tokens) == [f"{i}" for i in range(200_000) if i % 40 != 20]


@pytest.mark.parametrize("tokens", [("same", "same"), ("front/1", "2"), ("", "2")])
def test_tokens_that_are_shared_or_name_no_file_stop_the_job_before_ray_starts(
    tmp_path: Path, tokens: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slidr.cluster.superpixels.session.start", lambda cluster: pytest.fail("Ray was started"))
    images = [ImageRef(token, f"samples/{i}.jpg", 16, 9) for i, token in enumerate(tokens)]
    config = SuperpixelConfig(folder=str(tmp_path / "maps"))
    with pytest.raises(DataError, match=r"samples/0\.jpg.*token"):
        compute_images(images, str(tmp_path), config, ClusterConfig(), progress=False)
    assert not (tmp_path / "maps").exists()


def test_a_map_of_another_kind_counts_as_damaged(tmp_path: Path) -> None:
    image = ImageRef("a", "a.jpg", 16, 9)
    for mode in ("RGB", "1", "P"):
        Image.new(mode, (16, 9)).save(tmp_path / "a.png")
        assert missing_maps(str(tmp_path), [image]) == [image]
    Image.new("L", (16, 9)).save(tmp_path / "a.png")
    assert missing_maps(str(tmp_path), [image]) == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[" * 100_000])
def test_damaged_parameters_are_written_again_by_the_job(tmp_path: Path, damage: bytes) -> None:
    config = SuperpixelConfig(folder=str(tmp_path))
    path = Path(folder_of(config), "parameters.json")
    compute_images([], "root", config, ClusterConfig(), progress=False)
    written = path.read_bytes()
    path.write_bytes(damage)
    compute_images([], "root", config, ClusterConfig(), progress=False)
    assert path.read_bytes() == written


@settings(deadline=None, max_examples=60)
@given(count=st.integers(1, 5000), cpus=st.integers(1, 40), size=st.sampled_from([(16, 9), (800, 450), (1600, 900)]))
def test_tasks_hold_every_image_once_and_end_together(count: int, cpus: int, size: tuple[int, int]) -> None:
    images = ImageList.of(ImageRef(f"{i}", f"{i}.jpg", *size) for i in range(count))
    blocks = cut_blocks(images, cpus)
    assert images == [image for block in blocks for image in block]
    few = 1 if size == (1600, 900) else 4
    assert max(map(len, blocks)) <= 64
    assert max(map(len, blocks[:cpus])) <= few  # soon there is something to tell
    free_at = [0] * cpus  # each task goes to the CPU that is free first; an image takes a second
    for block in blocks:
        heapq.heapreplace(free_at, free_at[0] + len(block))
    assert max(free_at) <= -(-count // cpus) + few


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_a_kept_heap_spares_page_faults_and_takes_no_more_memory() -> None:
    code = """if True:
        import resource, sys
        import numpy as np
        from slidr.cluster.heap import keep_heap
        from slidr.ops.superpixels import slic

        if sys.argv[1] == "kept":
            assert keep_heap()
        image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
        slic(image)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            slic(image)
        after = resource.getrusage(resource.RUSAGE_SELF)
        print(after.ru_minflt - before, after.ru_maxrss)
    """
    faults, peak = zip(
        *(
            map(int, subprocess.run([sys.executable, "-c", code, way], capture_output=True, check=True).stdout.split())
            for way in ("kept", "plain")
        ),
        strict=True,
    )
    assert faults[0] < faults[1] / 20
    assert peak[0] < 1.05 * peak[1]


def test_a_data_set_without_cameras_is_an_error_before_anything_is_written(tmp_path: Path, frames: list[Frame]) -> None:
    lidar_only = [replace(frame, cameras=()) for frame in frames]
    config = SuperpixelConfig(folder=str(tmp_path / "superpixels"))
    with pytest.raises(DataError, match=r"none of the \d+ frames in .* has an image of data\.cameras .*no cameras"):
        compute_superpixels(lidar_only, DataConfig(root=str(tmp_path)), config, ClusterConfig(), progress=False)
    assert not (tmp_path / "superpixels").exists()
