"""SemanticKITTI's folders as frames, made up and real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from slidr.config import DataConfig
from slidr.data.samples import scan_sample
from slidr.data.semantic_kitti import read_download, read_frames
from slidr.data.storage import DataError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Sequences 00 (three scans, labelled, with poses and times), 08 (one scan) and 11 (one scan, bare)."""
    for sequence, scans in {"00": 3, "08": 1, "11": 1}.items():
        folder = tmp_path / "sequences" / sequence
        (folder / "velodyne").mkdir(parents=True)
        for i in range(scans):
            (folder / "velodyne" / f"{i:06d}.bin").write_bytes(np.ones((4, 4), np.float32).tobytes())
    zero = tmp_path / "sequences" / "00"
    (zero / "labels").mkdir()
    for i in range(3):
        (zero / "labels" / f"{i:06d}.label").write_bytes(np.full(4, 40, np.uint32).tobytes())
    (zero / "calib.txt").write_text("P0: 1 0 0 0 0 1 0 0 0 0 1 0\nTr: 0 -1 0 1 0 0 -1 2 1 0 0 3\n")
    (zero / "poses.txt").write_text("\n".join(f"1 0 0 {i} 0 1 0 0 0 0 1 {10 * i}" for i in range(3)))
    (zero / "times.txt").write_text("0.0\n1.037875e-01\n2.075610e-01\n")
    return tmp_path


def test_sequences_become_frames_with_splits_poses_and_neighbours(root: Path) -> None:
    frames = read_frames(str(root))
    assert [f.token for f in frames] == ["00/000000", "00/000001", "00/000002", "08/000000", "11/000000"]
    assert [f.splits for f in frames] == [("train", "parametrize")] * 3 + [("val",), ("test",)]
    middle = frames[1]
    assert (middle.previous, middle.next) == ("00/000000", "00/000002")
    assert (frames[0].previous, frames[2].next) == (None, None)
    assert middle.timestamp == 103788
    assert middle.lidar_path == "sequences/00/velodyne/000001.bin"
    assert middle.label_path == "sequences/00/labels/000001.label"
    assert frames[4].label_path is None
    assert middle.cameras == ()
    # The lidar's axes (forward, left, up) in the camera's (right, down, forward): x forward becomes z.
    np.testing.assert_array_equal(middle.ego_from_lidar @ [1, 0, 0, 1], [1, 2, 4, 1])
    np.testing.assert_array_equal(middle.global_from_ego @ [0, 0, 0, 1], [1, 0, 10, 1])


def test_a_sample_has_remission_plus_one_and_classes(root: Path) -> None:
    frame = read_frames(str(root))[0]
    data = DataConfig(dataset="semantic_kitti", root=str(root))
    sample = scan_sample(frame, data, student="minkunet34c", seed=0, epoch=0, training=False)
    assert sample.features.tolist() == [[2.0]]
    assert sample.point_labels.tolist() == [9] * 4


def test_what_is_missing_or_damaged_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sequence 00 to 21"):
        read_frames(str(tmp_path / "elsewhere"))
    zero = root / "sequences" / "00"
    (zero / "times.txt").write_text("0\n")
    with pytest.raises(DataError, match=r"times\.txt: has 1 rows, too few for scan 000002"):
        read_frames(str(root))
    (zero / "times.txt").unlink()
    (zero / "poses.txt").write_text("1 0 0\n" * 3)
    with pytest.raises(DataError, match=r"poses\.txt: expected 12 numbers, got '1 0 0'"):
        read_frames(str(root))
    (zero / "poses.txt").unlink()
    (zero / "calib.txt").write_text("P0: 1\n")
    with pytest.raises(DataError, match=r"calib\.txt: has no row 'Tr:'"):
        read_frames(str(root))


def test_real_scans_and_their_labels_belong_together(real_semantic_kitti: Path) -> None:
    frames = read_frames(str(real_semantic_kitti))
    assert [f.token for f in frames] == ["00/000000", "00/000001"]
    data = DataConfig(dataset="semantic_kitti", root=str(real_semantic_kitti))
    for frame in frames:
        sample = scan_sample(frame, data, student="minkunet34c", seed=0, epoch=0, training=True)
        assert len(sample.point_labels) > 120_000
        assert sample.features.min() >= 1.0
        assert sample.features.max() <= 2.0
        counts = np.bincount(sample.point_labels, minlength=20)
        assert counts[9] > 10_000  # a car on a road
        assert counts[0] < 0.2 * counts.sum()
    up = frames[0].ego_from_lidar[:3, :3] @ [0, 0, 1]
    assert up[1] < -0.99  # the camera's y axis points down


TURN = "0 -1 0 1 0 0 -1 2 1 0 0 3"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("calib.txt", f"Tr: {TURN.replace('3', 'nan')}", r"expected 12 numbers, got .* in row 1"),
        ("calib.txt", f"Tr: {TURN.replace('3', '1_0')}", r"expected 12 numbers, got .*1_0' in row 1"),
        ("calib.txt", f"Tr: {TURN.replace('3', '1e999')}", r"the matrix in row 1 |expected 12 numbers"),
        ("calib.txt", f"Tr: {TURN.replace('3', '1e300')}", r"the matrix in row 1 moves by"),
        ("calib.txt", "Tr:" + " 0" * 12, r"the matrix in row 1 has no rotation in its upper left"),
        ("calib.txt", "Tr: 0 1 0 1 0 0 -1 2 1 0 0 3", r"the matrix in row 1 is mirrored"),
        ("calib.txt", "P0: 1\nP1: 1\n", r"has no row 'Tr:'.*archives of images lacks it, .*data_odometry_calib\.zip"),
        ("poses.txt", f"{TURN}\n\n{TURN}\n{TURN}\n", r"expected 12 numbers, got '' in row 2"),
        ("poses.txt", f"{TURN}\n" * 2 + "0 " * 12, r"the matrix in row 3 has no rotation"),
        ("poses.txt", "\n", r"is empty; expected a pose a row"),
        ("times.txt", "0\n1e300\n1\n", r"row 2: got '1e300'; expected seconds, 0 to 1e\+10"),
        ("times.txt", "0\ninf\n1\n", r"row 2: got 'inf'; expected seconds"),
        ("times.txt", "0\n-1\n1\n", r"row 2: got '-1'; expected seconds"),
        ("times.txt", "0\n1_0\n1\n", r"row 2: got '1_0'; expected seconds"),
    ],
)
def test_numbers_and_matrices_that_are_none_are_refused_by_file_and_row(
    root: Path, name: str, text: str, message: str
) -> None:
    (root / "sequences" / "00" / name).write_text(text)
    with pytest.raises(DataError, match=rf"sequences/00/{name}: ({message})"):
        read_frames(str(root))


@pytest.mark.parametrize("name", ["calib.txt", "poses.txt", "times.txt"])
def test_a_link_to_nothing_is_not_taken_for_a_file_that_is_not_there(root: Path, name: str) -> None:
    path = root / "sequences" / "00" / name
    path.unlink()
    read_frames(str(root))
    path.symlink_to("gone.txt")
    with pytest.raises(DataError, match=rf"sequences/00/{name}: cannot be read"):
        read_frames(str(root))


def test_hidden_files_are_not_scans_and_scans_have_numbers(root: Path) -> None:
    velodyne = root / "sequences" / "00" / "velodyne"
    expected = [frame.token for frame in read_frames(str(root))]
    for name in ("._000000.bin", ".DS_Store", "readme.txt"):
        (velodyne / name).write_bytes(b"")
    assert [frame.token for frame in read_frames(str(root))] == expected
    for name in ("²", "1.0", "scan1", "9" * 30):
        (velodyne / f"{name}.bin").write_bytes(b"")
        with pytest.raises(DataError, match=rf"velodyne/{name}\.bin: expected a number for a name, as 000123\.bin"):
            read_frames(str(root))
        (velodyne / f"{name}.bin").unlink()
    (velodyne / "0.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"0\.bin and 000000\.bin have one number"):
        read_frames(str(root))


def test_scans_labels_and_images_that_do_not_go_together_are_named(root: Path) -> None:
    zero = root / "sequences" / "00"
    (zero / "velodyne" / "000001.bin").unlink()
    (zero / "image_2").mkdir()
    (zero / "image_2" / "000000.png").write_bytes(b"")
    download = read_download(str(root))
    assert [f.token for f in download.frames][:2] == ["00/000000", "00/000002"]
    assert download.notes == [
        "sequence 00 lacks 4539 of 4541 scans: 000001, 000003 to 004540",
        "sequence 08 lacks 4070 of 4071 scans: 000001 to 004070",
        "sequence 11 lacks 920 of 921 scans: 000001 to 000920",
        "sequence 00 has 2 sweeps and 3 files in labels/: 000001 has no sweep",
        "sequence 00 has 2 sweeps and 1 files in image_2/: none for 000002",
    ]


def test_poses_too_few_for_the_scans_are_left_out_and_noted(root: Path) -> None:
    (root / "sequences" / "00" / "poses.txt").write_text(f"{TURN}\n")
    download = read_download(str(root))
    assert any("poses.txt: has 1 rows, too few for scan 000002; no pose" in note for note in download.notes)
    np.testing.assert_array_equal(download.frames[0].global_from_ego, np.eye(4))
