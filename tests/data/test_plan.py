"""The order of the data: the same whatever the number of workers, and from wherever it is taken up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.data.plan import TrainPlan, epoch_order, spread, validation_batches

sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))  # workers, accumulate, share


@given(frames=st.integers(36, 90), shape=sizes, seed=st.integers(0, 9))
def test_workers_together_see_what_one_worker_sees(frames: int, shape: tuple[int, int, int], seed: int) -> None:
    workers, accumulate, share = shape
    batch = workers * accumulate * share
    alone = TrainPlan(frames, batch, seed)
    steps = alone.steps_per_epoch + 1  # into the second epoch
    expected = [set(micro.frames) for micro in alone.micro_batches(0, steps)]
    streams = [
        list(TrainPlan(frames, batch, seed, rank, workers, accumulate).micro_batches(0, steps))
        for rank in range(workers)
    ]
    for step in range(steps):
        taken = [
            frame
            for stream in streams
            for micro in stream[step * accumulate : (step + 1) * accumulate]
            for frame in micro.frames
        ]
        assert sorted(taken) == sorted(expected[step])


@given(frames=st.integers(4, 40), start=st.integers(0, 12), seed=st.integers(0, 5))
def test_taking_up_in_the_middle_continues_the_stream(frames: int, start: int, seed: int) -> None:
    plan = TrainPlan(frames, 4, seed)
    assert list(plan.micro_batches(0, 15))[start:] == list(plan.micro_batches(start, 15))


def test_an_epoch_visits_no_frame_twice_and_epochs_differ() -> None:
    plan = TrainPlan(10, 3, seed=1)
    first = [f for micro in plan.micro_batches(0, 3) for f in micro.frames]
    second = [f for micro in plan.micro_batches(3, 6) for f in micro.frames]
    assert len(set(first)) == len(first) == 9
    assert first != second
    assert sorted(epoch_order(10, 1, 0).tolist()) == list(range(10))


def test_a_split_smaller_than_a_batch_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"3 frames.*batch_size of 4"):
        TrainPlan(3, 4, seed=0)


@given(frames=st.integers(0, 30), batch=st.integers(1, 7), workers=st.integers(1, 4))
def test_validation_batches_are_dealt_out_whole(frames: int, batch: int, workers: int) -> None:
    alone = validation_batches(frames, batch)
    shares = [validation_batches(frames, batch, rank, workers) for rank in range(workers)]
    dealt = {micro for share in shares for micro in share}
    assert dealt == set(alone)
    assert sum(map(len, shares)) == len(alone)
    assert [f for micro in alone for f in micro.frames] == list(range(frames))


def test_spread_takes_distinct_frames_from_end_to_end() -> None:
    assert spread(100, 5).tolist() == [0, 25, 50, 74, 99]
    assert spread(3, 5).tolist() == [0, 1, 2]
    assert spread(3, None).tolist() == [0, 1, 2]
