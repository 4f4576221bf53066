"""An interval is shown where there are frames enough for one; a picture that fails costs nothing."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from slidr.data import storage
from slidr.metrics import LEAST_FRAMES, bootstrap_interval
from slidr.report.pictures import save_picture
from slidr.report.scores import bar_chart, markdown, scores_of

CLASSES = ("ignored", "car", "road", "tree")


def counts(frames: int, seed: int = 0) -> np.ndarray:
    """Labelled points by (truth, prediction) of frames that are right to about 60 %, each class as often."""
    rng = np.random.default_rng(seed)
    found = np.zeros((frames, 4, 4), np.int64)
    for cls in (1, 2, 3):
        right = rng.binomial(1000, rng.beta(6, 4, frames))
        found[:, cls, cls], found[:, cls, cls % 3 + 1] = right, 1000 - right
    return found


@pytest.mark.parametrize("frames", [1, 2, LEAST_FRAMES - 1])
def test_too_few_frames_have_no_interval_and_say_why(frames: int) -> None:
    scores = scores_of(counts(frames), {}, CLASSES)
    assert scores["miou_interval_95"] is None
    assert scores["why_no_interval"] == f"{frames} frames with labelled points; an interval takes at least 10"
    page = markdown(scores, "title")
    assert f"mIoU has no interval here: {frames} frames with labelled points" in page
    assert "lies within" not in page
    assert bar_chart(scores, "title").startswith(b"\x89PNG")


def test_frames_without_labelled_points_make_no_interval() -> None:
    empty = np.zeros((30, 4, 4), np.int64)
    scores = scores_of(np.concatenate([counts(3), empty]), {}, CLASSES)
    assert scores["miou_interval_95"] is None
    assert scores["why_no_interval"].startswith("3 frames")
    assert scores["frames"] == 33


def test_enough_frames_have_the_bootstraps_interval() -> None:
    frames = counts(LEAST_FRAMES)
    scores = scores_of(frames, {}, CLASSES, seed=3, draws=200)
    assert scores["miou_interval_95"] == list(bootstrap_interval(frames, 3, draws=200))
    assert scores["why_no_interval"] is None
    assert "mIoU lies within" in markdown(scores, "title")
    assert bar_chart(scores, "title").startswith(b"\x89PNG")


def test_the_fewest_frames_are_those_whose_intervals_nearly_hold_what_they_claim() -> None:
    """Of many intervals over few frames, how many hold the score of a large number of frames."""
    pooled = counts(100_000).sum(0)
    truth = np.mean([pooled[c, c] / (pooled[c].sum() + pooled[:, c].sum() - pooled[c, c]) for c in (1, 2, 3)])

    def held(frames: int) -> float:
        intervals = [bootstrap_interval(counts(frames, 1 + n), n, draws=100) for n in range(300)]
        return float(np.mean([low <= truth <= high for low, high in intervals]))

    assert held(1) == 0
    assert held(2) < 0.6
    assert held(LEAST_FRAMES) > 0.85


def test_scores_without_any_class_can_be_drawn() -> None:
    scores = scores_of(np.zeros((2, 4, 4), np.int64), {}, CLASSES)
    assert scores["miou"] is None
    assert bar_chart(scores, "title").startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_is_written_and_its_path_returned(tmp_path: Path) -> None:
    path = str(tmp_path / "folder" / "picture.png")
    assert save_picture(path, lambda: b"\x89PNG") == path
    assert Path(path).read_bytes() == b"\x89PNG"


@pytest.mark.parametrize("fails", ["drawing", "writing"])
def test_a_picture_that_fails_is_a_warning(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def draw() -> bytes:
        if fails == "drawing":
            raise ValueError("quantile() input tensor must be non-empty")
        return b"\x89PNG"

    monkeypatch.setattr(storage, "write_bytes_atomic", full)
    with caplog.at_level(logging.WARNING, "slidr"):
        assert save_picture(str(tmp_path / "picture.png"), draw) is None
    reason = "ValueError: quantile()" if fails == "drawing" else "OSError: [Errno 28] No space left"
    assert reason in caplog.text
    assert "the results are kept" in caplog.text


def test_an_interruption_is_not_taken_for_a_failed_picture(tmp_path: Path) -> None:
    def interrupted() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_picture(str(tmp_path / "picture.png"), interrupted)
