"""Images as columns: the same ones in the same order, each once, and never two under one name."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidr.data.image_list import ImageList, ImageRef
from slidr.data.storage import DataError

IMAGES = [ImageRef(f"t{i}", f"samples/CAM/{i}.jpg", 1600 + i, 900) for i in range(10)]


@given(st.integers(0, 10), st.integers(-12, 12), st.integers(-12, 12), st.lists(st.integers(0, 9), max_size=12))
def test_it_is_the_list_it_was_made_from(count: int, first: int, last: int, places: list[int]) -> None:
    images = ImageList.of(IMAGES[:count])
    assert list(images) == IMAGES[:count]
    assert images[first:last] == IMAGES[:count][first:last]
    assert ImageList.of(IMAGES).take(np.array(places, np.int64)) == [IMAGES[i] for i in places]
    assert list(images.tokens) == [image.token for image in IMAGES[:count]]
    assert images.pixels.tolist() == [image.width * 900 for image in IMAGES[:count]]
    if count:
        assert (images[0], images[-1]) == (IMAGES[0], IMAGES[count - 1])
    with pytest.raises(IndexError):
        images[count]


@given(st.lists(st.integers(0, 9), max_size=30))
def test_an_image_that_comes_again_counts_once_in_the_order_of_its_first_place(places: list[int]) -> None:
    images = ImageList.of(IMAGES[i] for i in places)
    assert images.distinct() == [IMAGES[i] for i in dict.fromkeys(places)]


@pytest.mark.parametrize("change", [{"path": "samples/CAM/other.jpg"}, {"width": 800}])
def test_two_images_under_one_token_are_refused_with_both_named(change: dict[str, object]) -> None:
    other = replace(IMAGES[3], **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"t3: samples/CAM/3\.jpg and {other.path}.*two images have one token"):
        ImageList.of([*IMAGES, IMAGES[0], other]).distinct()


def test_many_conflicts_are_counted_and_some_are_named() -> None:
    others = [replace(image, path=f"{image.path}x") for image in IMAGES]
    with pytest.raises(DataError, match=r"t0: .*t4: .* \(and 5 more\)"):
        ImageList.of([*IMAGES, *others]).distinct()


@pytest.mark.parametrize("token", ["scene/1", "..", "", "a\\b", "x" * 201])
def test_a_token_that_cannot_name_a_file_is_refused_with_its_image(token: str) -> None:
    with pytest.raises(DataError, match=r"samples/CAM/0\.jpg \(token .*write the frame table again"):
        ImageList.of([replace(IMAGES[0], token=token), *IMAGES[1:]]).distinct()


def test_a_slice_copies_nothing_and_a_taken_part_carries_only_itself() -> None:
    many = ImageList.of(ImageRef(f"{i:032x}", f"samples/{i:032x}.jpg", 16, 9) for i in range(20_000))
    part = many[100:110]
    ours, theirs = (images.table.column("token").chunk(0).buffers()[2] for images in (part, many))
    assert ours.address == theirs.address
    assert len(pickle.dumps(part.take(np.arange(10)).table)) < 10_000
