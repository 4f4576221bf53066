"""Coordinate sets and kernel maps against dictionary look-ups in plain Python."""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slidr.sparse import CoordinateError, CoordinateManager, SparseTensor, sort_rows, sparse_conv
from slidr.sparse.coordinates import LIMIT, pack, unpack
from slidr.sparse.kernel_map import KernelMap

ONE = (1, 1, 1)


def rows(clouds: int = 2, voxels: int = 60, span: int = 6, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    drawn = np.unique(rng.integers((0, -span, -span, -span), (clouds, span, span, span), (voxels, 4)), axis=0)
    return torch.from_numpy(rng.permutation(drawn).astype(np.int32))


def pairs(kernel_map: KernelMap) -> set[tuple[int, int, int]]:
    """(offset, input row, output row) of every pair; refuses repeated ones."""
    offset = np.repeat(np.arange(len(kernel_map.counts)), kernel_map.counts)
    found = list(zip(offset, kernel_map.input_rows.tolist(), kernel_map.output_rows.tolist(), strict=True))
    assert len(found) == len(set(found))
    return {(int(k), i, o) for k, i, o in found}


def looked_up(inputs: Any, outputs: Any, offsets: list[tuple[int, int, int]]) -> set[tuple[int, int, int]]:
    row_of = {tuple(c): row for row, c in enumerate(inputs)}
    found = set()
    for o, (b, x, y, z) in enumerate(outputs):
        for k, (dx, dy, dz) in enumerate(offsets):
            i = row_of.get((b, x + dx, y + dy, z + dz))
            if i is not None:
                found.add((k, i, o))
    return found


def first_axis_fastest(sizes: tuple[range, range, range]) -> list[tuple[int, int, int]]:
    return [(x, y, z) for z, y, x in itertools.product(sizes[2], sizes[1], sizes[0])]


clouds_of_rows = arrays(
    np.int32, st.tuples(st.integers(0, 40), st.just(4)), elements=st.integers(-5, 5), unique=False
).map(lambda a: np.unique(np.column_stack([np.abs(a[:, :1]) % 3, a[:, 1:]]), axis=0).astype(np.int32))


@settings(deadline=None, max_examples=40)
@given(clouds_of_rows, st.randoms(use_true_random=False), st.sampled_from([1, 2, 4]))
def test_submanifold_map_equals_a_dictionary_lookup(cloud: Any, random: Any, stride: int) -> None:
    order = list(range(len(cloud)))
    random.shuffle(order)
    cloud = cloud[order]
    manager = CoordinateManager(torch.from_numpy(cloud))
    factor = (stride,) * 3
    if stride > 1:
        manager.downsample(ONE, factor)
    at = manager.coordinates(factor).numpy()
    near = [tuple(stride * d for d in offset) for offset in first_axis_fastest((range(-1, 2),) * 3)]
    assert pairs(manager.submanifold(factor, (3, 3, 3))) == looked_up(at.tolist(), at.tolist(), near)


@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 1, 1), (1, 3, 5), (5, 5, 5)])
def test_submanifold_map_of_any_odd_kernel_equals_a_dictionary_lookup(kernel: tuple[int, int, int]) -> None:
    cloud = rows()
    near = first_axis_fastest(tuple(range(-(k // 2), k // 2 + 1) for k in kernel))  # type: ignore[arg-type]
    expected = looked_up(cloud.tolist(), cloud.tolist(), near)
    assert pairs(CoordinateManager(cloud).submanifold(ONE, kernel)) == expected


@settings(deadline=None, max_examples=40)
@given(clouds_of_rows, st.sampled_from([(2, 2, 2), (4, 4, 4), (1, 2, 3)]))
def test_strided_map_equals_a_dictionary_lookup(cloud: Any, factor: tuple[int, int, int]) -> None:
    manager = CoordinateManager(torch.from_numpy(cloud))
    kernel_map = manager.downsample(ONE, factor)
    parents = {(b, *(int(np.floor(c / f)) * f for c, f in zip(xyz, factor, strict=True))) for b, *xyz in cloud.tolist()}
    coarse = manager.coordinates(factor).tolist()
    assert sorted(map(tuple, coarse)) == sorted(parents)
    inside = first_axis_fastest(tuple(range(f) for f in factor))  # type: ignore[arg-type]
    assert pairs(kernel_map) == looked_up(cloud.tolist(), coarse, inside)


def test_transposed_map_swaps_inputs_and_outputs_and_undoes_itself() -> None:
    manager = CoordinateManager(rows())
    down, up = manager.downsample(ONE, (2, 2, 2)), manager.upsample((2, 2, 2), (2, 2, 2))
    assert pairs(up) == {(k, o, i) for k, i, o in pairs(down)}
    assert up.transposed() is down


def test_upsampling_to_coordinates_that_never_were_is_refused() -> None:
    with pytest.raises(CoordinateError, match="no coordinates at stride"):
        CoordinateManager(rows()).upsample((2, 2, 2), (2, 2, 2))


def test_maps_are_built_once_and_shared() -> None:
    manager = CoordinateManager(rows())
    assert manager.submanifold(ONE, (3, 3, 3)) is manager.submanifold(ONE, (3, 3, 3))
    assert manager.downsample(ONE, (2, 2, 2)) is manager.downsample(ONE, (2, 2, 2))


def test_bags_list_every_pair_under_its_output_row() -> None:
    kernel_map = CoordinateManager(rows()).submanifold(ONE, (3, 3, 3))
    bags = kernel_map.bags
    for row in range(kernel_map.num_outputs):
        listed = bags.pair[bags.start[row] : bags.start[row + 1]]
        assert (kernel_map.output_rows[listed] == row).all()
    assert sorted(bags.pair.tolist()) == list(range(kernel_map.num_pairs))


def test_neighbour_table_lists_the_input_row_under_each_offset() -> None:
    kernel_map = CoordinateManager(rows()).submanifold(ONE, (3, 3, 3))
    table = kernel_map.table
    listed = {(k, int(table[o, k]), o) for o, k in np.argwhere(table.numpy() < kernel_map.num_inputs)}
    assert listed == pairs(kernel_map)


@given(st.lists(st.tuples(st.integers(0, 4095), *[st.integers(-LIMIT, LIMIT - 1)] * 3), min_size=1, max_size=20))
def test_keys_unpack_to_their_rows_and_sort_as_they_do(rows_drawn: list[tuple[int, int, int, int]]) -> None:
    index = torch.tensor(rows_drawn)
    assert unpack(pack(index)).tolist() == index.tolist()
    assert [rows_drawn[i] for i in torch.argsort(pack(index), stable=True)] == sorted(rows_drawn)


def test_coordinates_at_the_limits_find_their_neighbours() -> None:
    corner = torch.tensor([[0, -LIMIT, LIMIT - 1, -LIMIT], [0, -LIMIT + 1, LIMIT - 2, -LIMIT], [1, LIMIT - 1, 0, 0]])
    assert CoordinateManager(corner.int()).submanifold(ONE, (3, 3, 3)).num_pairs == 3 + 2


@pytest.mark.parametrize("value", [LIMIT, -LIMIT - 1])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_coordinates_beyond_the_limits_are_refused_with_their_span(value: int, axis: int) -> None:
    coordinates = torch.zeros(2, 4, dtype=torch.int32)
    coordinates[1, axis] = value
    with pytest.raises(CoordinateError, match=str(value)):
        SparseTensor(torch.zeros(2, 1), coordinates)


def test_repeated_coordinates_are_refused_with_their_count() -> None:
    coordinates = torch.tensor(
        [[0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 1, 1], [0, 2, 2, 2], [0, 1, 1, 1]], dtype=torch.int32
    )
    with pytest.raises(CoordinateError, match="3 of 5 rows repeat"):
        SparseTensor(torch.zeros(5, 1), coordinates)


@pytest.mark.parametrize(
    ("coordinates", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int32), "expected .V, 4."),
        (torch.zeros(1, 4), "expected integers"),
        (torch.tensor([[-1, 0, 0, 0]]), "batch column"),
    ],
)
def test_malformed_coordinates_are_refused(coordinates: torch.Tensor, message: str) -> None:
    with pytest.raises(CoordinateError, match=message):
        SparseTensor(torch.zeros(len(coordinates), 1), coordinates)


def test_features_and_coordinates_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="one row of features per coordinate"):
        SparseTensor(torch.zeros(3, 1), torch.zeros(2, 4, dtype=torch.int32))


def test_sorting_rows_goes_back_to_the_given_order() -> None:
    coordinates = rows()
    x = SparseTensor(torch.arange(len(coordinates)).float()[:, None], coordinates)
    ordered = sort_rows(x)
    assert ordered.tensor.coordinates.tolist() == sorted(coordinates.tolist())
    assert torch.equal(ordered.tensor.features[ordered.back], x.features)


def test_kernel_maps_go_with_their_last_user() -> None:
    """Pairs of maps that held each other would wait for the garbage collector, which does not know a GPU's memory."""
    coordinates = torch.cat([torch.zeros(40, 1), torch.arange(120).view(40, 3)], dim=1).int()
    manager = SparseTensor(torch.zeros(40, 1), coordinates).manager
    kernel_map = manager.downsample((1, 1, 1), (2, 2, 2))
    twin = kernel_map.transposed()
    assert twin.transposed() is kernel_map
    assert torch.equal(twin.input_rows, kernel_map.output_rows)
    gone = weakref.ref(kernel_map), weakref.ref(twin)
    gc.disable()
    try:
        del kernel_map
        manager.maps.clear()
        again = twin.transposed()  # of a map that outlives its original
        assert torch.equal(again.input_rows, twin.output_rows)
        assert again.transposed() is twin
        del again, twin
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_a_kernel_of_other_offsets_than_the_map_is_refused() -> None:
    coordinates = torch.cat([torch.zeros(40, 1), torch.arange(120).view(40, 3)], dim=1).int()
    x = SparseTensor(torch.zeros(40, 16), coordinates)
    with pytest.raises(ValueError, match="got 27 kernel offsets for a map of 8"):
        sparse_conv(x.features, torch.zeros(27, 16, 8), x.manager.downsample((1, 1, 1), (2, 2, 2)))


@pytest.mark.parametrize(
    ("kernel", "factor", "padding"), [((3, 3, 3), (2, 2, 2), (1, 1, 1)), ((3, 1, 1), (2, 1, 1), (0, 0, 0))]
)
def test_window_pairs_are_a_loops_in_its_order(kernel: Any, factor: Any, padding: Any) -> None:
    """By offset, the first axis fastest, then by input row: an output reads inputs at output * factor - padding + k."""
    shape = (9, 8, 7)
    rng = np.random.default_rng(0)
    inputs = np.unique(rng.integers(0, (2, *shape), (80, 4)), axis=0)
    manager = CoordinateManager(torch.from_numpy(rng.permutation(inputs).astype(np.int32)))
    given = manager.coordinates(ONE).tolist()
    found, grid = manager.window(ONE, kernel, factor, padding, shape)
    expected, counts = [], []
    for k in itertools.product(*(range(size) for size in reversed(kernel))):
        before = len(expected)
        for row, (batch, *cell) in enumerate(given):
            moved = [c + p - step for c, p, step in zip(cell, padding, reversed(k), strict=True)]
            out = [m // f for m, f in zip(moved, factor, strict=True)]
            if all(m % f == 0 and 0 <= o < g for m, f, o, g in zip(moved, factor, out, grid, strict=True)):
                expected.append((row, (batch, *(o * f for o, f in zip(out, factor, strict=True)))))
        counts.append(len(expected) - before)
    outputs = [tuple(row) for row in manager.coordinates(factor).tolist()]
    assert (
        list(zip(found.input_rows.tolist(), [outputs[o] for o in found.output_rows.tolist()], strict=True)) == expected
    )
    assert found.counts == tuple(counts)
    # Read by address elsewhere, and kept for the backward pass.
    assert found.input_rows.is_contiguous()
    assert found.input_rows.untyped_storage().nbytes() == 8 * len(expected)
