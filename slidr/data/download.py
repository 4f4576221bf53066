"""How much of a download is there: which keyframes are whole, and what to take of one that is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from slidr.config import MissingFiles
from slidr.data.storage import DataError
from slidr.types import Frame

_NAMED = 3  # files and scenes that a message names

Naming = Callable[[str], tuple[str, str]]  # of a path below the data root: the whole path, the table that names it


@dataclass(frozen=True)
class Keyframe:
    """A keyframe of the tables, and what they do not have of it."""

    scene: str
    token: str
    frame: Frame | None  # None: the tables have no sweep of it
    absent: tuple[str, ...]  # channels that the tables lack


@dataclass(frozen=True)
class Download:
    """The frames of a data set, and what was left out of those that its tables name."""

    frames: list[Frame]
    left_out: str = ""  # a sentence; empty for a whole download
    notes: list[str] = field(default_factory=list)  # facts for the user


def take_whole(
    keyframes: Sequence[Keyframe],
    missing: set[str],
    allow_missing: MissingFiles | None,
    tables: str,
    naming: Naming,
) -> Download:
    """The frames of a download whose files `missing` (paths below the data root) are not there.

    A whole download gives every frame. Of another one, `allow_missing: scenes` takes the scenes of which nothing is
    missing, `cameras` those whose sweeps are all there, with the images and labels that are there. Where no label file
    is there at all, labels count as not downloaded, and both take frames without. Raises `DataError` naming the first
    missing files (`naming` says where one should be and which table names it) and how much is whole, where
    `allow_missing` is None or leaves nothing. `tables` names the table of keyframes' sweeps and images.
    """
    unlabelled = _all_labels_missing(keyframes, missing)
    whole = [_is_whole(each, missing, unlabelled) for each in keyframes]
    if all(whole) and not unlabelled and not missing:
        return Download([each.frame for each in keyframes if each.frame is not None])
    if allow_missing is None:
        raise DataError(
            f"{_first_problem(keyframes, missing, tables, naming)}; {_advice(keyframes, whole, unlabelled)}"
        )
    if allow_missing == "scenes":
        broken = {each.scene for each, is_whole in zip(keyframes, whole, strict=True) if not is_whole}
    else:
        broken = {each.scene for each in keyframes if each.frame is None or each.frame.lidar_path in missing}
    kept = [each.frame for each in keyframes if each.scene not in broken and each.frame is not None]
    frames = [_without(frame, missing) for frame in kept]
    if not frames:
        lacking, step = ("file", ", or --data.allow_missing cameras") if allow_missing == "scenes" else ("sweep", "")
        raise DataError(
            f"{_first_problem(keyframes, missing, tables, naming)}; data.allow_missing: {allow_missing} leaves no "
            f"keyframe: every scene lacks a {lacking}; finish the download{step}"
        )
    return Download(frames, _left_out(keyframes, frames, broken))


def paths_of(frame: Frame) -> Iterator[str]:
    """The files of a frame: its sweep, its labels, its images."""
    yield frame.lidar_path
    if frame.label_path is not None:
        yield frame.label_path
    yield from (camera.image_path for camera in frame.cameras)


def _is_whole(keyframe: Keyframe, missing: set[str], unlabelled: bool) -> bool:
    frame = keyframe.frame
    if frame is None or keyframe.absent:
        return False
    return not any(path in missing for path in paths_of(frame) if not (unlabelled and path == frame.label_path))


def _all_labels_missing(keyframes: Sequence[Keyframe], missing: set[str]) -> bool:
    labels = [each.frame.label_path for each in keyframes if each.frame is not None]
    named = [path for path in labels if path is not None]
    return bool(named) and all(path in missing for path in named)


def _without(frame: Frame, missing: set[str]) -> Frame:
    """The frame without the labels and images that are missing."""
    label = None if frame.label_path in missing else frame.label_path
    cameras = tuple(camera for camera in frame.cameras if camera.image_path not in missing)
    return replace(frame, label_path=label, cameras=cameras)


def _first_problem(keyframes: Sequence[Keyframe], missing: set[str], tables: str, naming: Naming) -> str:
    """The first missing files, or the first keyframe that the tables have no sweep or image of."""
    if not missing:
        first = next(each for each in keyframes if each.absent)
        return f"{tables}: keyframe {first.token} of {first.scene} has no {', '.join(first.absent)}"
    named = [path for each in keyframes if each.frame is not None for path in paths_of(each.frame) if path in missing]
    gone = list(dict.fromkeys(named))
    more = f" and {len(gone) - _NAMED} more" if len(gone) > _NAMED else ""
    named_by = {naming(path): None for path in gone[:_NAMED]}
    paths, sources = ", ".join(path for path, _ in named_by), ", ".join(dict.fromkeys(table for _, table in named_by))
    return f"{paths}{more}: named by the tables but missing ({sources})"


def _advice(keyframes: Sequence[Keyframe], whole: Sequence[bool], unlabelled: bool) -> str:
    broken = {each.scene for each, is_whole in zip(keyframes, whole, strict=True) if not is_whole}
    scenes = {each.scene for each in keyframes}
    text = f"{sum(whole)} of {len(keyframes)} keyframes and {len(scenes - broken)} of {len(scenes)} scenes are whole"
    if unlabelled:
        text += ", but for point labels, of which there are none"
    return (
        f"{text}; finish the download, pass the data root that the files are in, or take what is there: "
        "--data.allow_missing scenes (whole scenes) or cameras (every sweep, with the images that are there)"
    )


def _left_out(keyframes: Sequence[Keyframe], frames: Sequence[Frame], broken: set[str]) -> str:
    """What the tables name and the frames lack."""
    scenes = list(dict.fromkeys(each.scene for each in keyframes))
    names = [scene for scene in scenes if scene in broken]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    before = {each.token: each for each in keyframes}
    images = sum(
        len(before[frame.token].absent) + len(_named(before[frame.token]).cameras) - len(frame.cameras)
        for frame in frames
    )
    labels = sum(_named(before[frame.token]).label_path is not None and frame.label_path is None for frame in frames)
    parts = [
        f"{len(names)} of {len(scenes)} scenes ({', '.join(names[:_NAMED])}{more})" if names else "",
        f"{images} images" if images else "",
        f"the point labels of {labels} keyframes" if labels else "",
    ]
    return f"without {', '.join(part for part in parts if part)}"


def _named(keyframe: Keyframe) -> Frame:
    assert keyframe.frame is not None, keyframe.token
    return keyframe.frame
