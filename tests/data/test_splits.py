"""Splits and fractions, against what the data sets publish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.config import step_of
from slidr.data.nuscenes import scenes_of_splits
from slidr.data.splits import (
    SEMANTIC_KITTI_SEQUENCES,
    VERIFY_SCENES,
    every,
    every_counted,
    pretraining_splits,
    published_fraction,
    sequence_splits,
)


def test_verify_holds_100_training_scenes() -> None:
    assert len(VERIFY_SCENES) == 100
    assert set(scenes_of_splits()["train"]) >= VERIFY_SCENES


def test_parametrize_and_verify_share_out_the_700_training_scenes() -> None:
    splits = {name: pretraining_splits(name, ("train",)) for name in scenes_of_splits()["train"]}
    assert len(splits) == 700
    assert sum("parametrize" in s for s in splits.values()) == 600
    assert sum("verify" in s for s in splits.values()) == 100
    assert pretraining_splits("scene-0008", ("val",)) == ("val",)


def test_semantic_kitti_has_its_published_numbers_of_scans() -> None:
    counts = {split: sum(lengths.values()) for split, lengths in SEMANTIC_KITTI_SEQUENCES.items()}
    assert counts == {"train": 19130, "val": 4071, "test": 20351}


@pytest.mark.parametrize(("fraction", "scenes"), [(0.01, 7), (0.05, 35), (0.1, 70), (0.25, 175), (1.0, 700)])
def test_published_fractions_of_700_scenes(fraction: float, scenes: int) -> None:
    taken = every_counted(range(1, 701), fraction)
    assert len(taken) == scenes
    assert taken == [number for number in range(1, 701) if number % (700 // scenes) == 0]


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.1, 0.25, 1.0])
def test_frozen_lists_of_nuscenes_follow_the_rule(fraction: float) -> None:
    # The devkit lists the official training scenes in order of name, which is the order of nuScenes' scene table.
    assert published_fraction("nuscenes", fraction) == every_counted(scenes_of_splits()["train"], fraction)


@given(st.integers(0, 500), st.integers(1, 500), st.floats(-0.04, 0.04))
def test_a_fraction_takes_items_one_step_apart_from_the_first(count: int, step: int, rounding: float) -> None:
    fraction = min(1.0, (1 + rounding) / step)
    taken = every(range(count), fraction)
    apart = taken[1] if len(taken) > 1 else step
    assert taken == [i for i in range(count) if i % apart == 0]
    assert abs(apart * fraction - 1) <= 0.05 + 1e-9
    if step <= 10:  # with larger ones the rounding may reach the next
        assert apart == step


@pytest.mark.parametrize(
    ("fraction", "nearest"),
    [(0.9, "0.5 .*and 1 "), (0.7, "0.5 .*and 1 "), (0.6, "0.5 .*and 1 "), (0.4, "0.333 .*and 0.5 "), (0.3, "0.25 ")],
)
def test_a_fraction_that_no_step_makes_is_refused_with_the_nearest_ones(fraction: float, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"got {fraction}, .*the nearest are {nearest}"):
        step_of(fraction)


@pytest.mark.parametrize(("fraction", "step"), [(1 / 6, 6), (1 / 8, 8), (0.33, 3), (0.17, 6), (0.5, 2), (0.02, 50)])
def test_parts_of_a_few_scenes_and_rounded_figures_stand_for_their_step(fraction: float, step: int) -> None:
    assert step_of(fraction) == step


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="expected 0 < fraction <= 1"):
        step_of(fraction)


@pytest.mark.parametrize(("fraction", "scans"), [(0.01, 192), (0.05, 957), (0.1, 1913), (0.25, 4783), (1.0, 19130)])
def test_frozen_lists_of_semantic_kitti_follow_the_rule(fraction: float, scans: int) -> None:
    lengths = SEMANTIC_KITTI_SEQUENCES["train"]
    names = sorted(f"{sequence}/{scan:06d}" for sequence, count in lengths.items() for scan in range(count))
    assert published_fraction("semantic_kitti", fraction) == every(names, fraction)
    assert len(published_fraction("semantic_kitti", fraction)) == scans


def test_a_fraction_without_a_frozen_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 0\.3; lists are published for 0\.01"):
        published_fraction("nuscenes", 0.3)


def test_one_whole_training_sequence_of_semantic_kitti_is_held_out_to_choose_settings_on() -> None:
    splits = {name: sequence_splits(name) for names in SEMANTIC_KITTI_SEQUENCES.values() for name in names}
    assert len(splits) == 22
    assert [name for name, own in splits.items() if "verify" in own] == ["07"]
    assert all((own[0] == "train") == (len(own) == 2) for own in splits.values())
