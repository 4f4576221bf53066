from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidr.ops.pooling import map_segment_mean, segment_mean

seeds = st.integers(0, 2**31 - 1)


def rows(seed: int, count: int, segments: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return values, torch.randint(segments, (count,), generator=generator)


def maps(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64)
    return values, torch.randint(4, (2, 5, 7), generator=generator)


@given(seeds, st.integers(0, 40), st.integers(1, 9))
def test_row_means_are_a_plain_loops(seed: int, count: int, segments: int) -> None:
    values, segment = rows(seed, count, segments)
    means, counts = segment_mean(values, segment, segments)
    for s in range(segments):
        members = [values[n] for n in range(count) if segment[n] == s]
        assert counts[s] == len(members)
        expected = sum(members) / len(members) if members else torch.zeros(3, dtype=torch.float64)
        torch.testing.assert_close(means[s], expected)


@settings(max_examples=20)
@given(seeds)
def test_map_means_are_the_row_means_of_every_image(seed: int) -> None:
    values, labels = maps(seed)
    means, counts = map_segment_mean(values, labels, 6)
    for image in range(2):
        expected, expected_counts = segment_mean(values[image].flatten(1).T, labels[image].flatten(), 6)
        torch.testing.assert_close(means[image], expected)
        assert counts[image].tolist() == expected_counts.tolist()


def test_gradients_are_the_numerical_ones() -> None:
    values, segment = rows(0, 12, 5)
    assert torch.autograd.gradcheck(lambda v: segment_mean(v, segment, 6)[0], values.requires_grad_())
    dense, labels = maps()
    assert torch.autograd.gradcheck(lambda m: map_segment_mean(m, labels, 5)[0], dense.requires_grad_())


def test_gradients_match_a_one_hot_product_in_any_memory_layout() -> None:
    dense, labels = maps(1)
    one_hot = torch.nn.functional.one_hot(labels, 6).double()  # B H W S
    cotangent = torch.randn(2, 6, 3, dtype=torch.float64)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        leaf = dense.clone(memory_format=layout).requires_grad_()
        (map_segment_mean(leaf, labels, 6)[0] * cotangent).sum().backward()
        gradients.append(leaf.grad)
    leaf = dense.clone().requires_grad_()
    sums = torch.einsum("bchw,bhws->bsc", leaf, one_hot)
    (sums / one_hot.sum((1, 2)).clamp(min=1)[..., None] * cotangent).sum().backward()
    for gradient in gradients:
        torch.testing.assert_close(gradient, leaf.grad)


def test_emptiness_is_a_count_not_a_value() -> None:
    values = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    means, counts = segment_mean(values, torch.tensor([0, 0]), 2)
    assert means.tolist() == [[0, 0], [0, 0]]
    assert counts.tolist() == [2, 0]


def test_half_precision_values_are_summed_in_float32() -> None:
    # bfloat16 has 8 bits: a running sum of ones would stop at 256.
    ones = torch.ones(1, 1, 64, 64, dtype=torch.bfloat16).requires_grad_()
    labels = torch.zeros(1, 64, 64, dtype=torch.int64)
    from_maps, _ = map_segment_mean(ones, labels, 1)
    from_rows, _ = segment_mean(ones.flatten()[:, None], labels.flatten(), 1)
    assert from_maps.dtype == from_rows.dtype == torch.float32
    assert from_maps.item() == from_rows.item() == 1
    from_maps.sum().backward()
    assert ones.grad is not None
    assert ones.grad.dtype == torch.bfloat16


def test_nothing_to_pool_leaves_a_connected_zero() -> None:
    values = torch.zeros(0, 3, requires_grad=True)
    means, counts = segment_mean(values, torch.zeros(0, dtype=torch.int64), 2)
    assert counts.tolist() == [0, 0]
    means.sum().backward()
    assert values.grad is not None
    dense = torch.zeros(0, 3, 2, 2, requires_grad=True)
    assert map_segment_mean(dense, torch.zeros(0, 2, 2, dtype=torch.int64), 0)[0].shape == (0, 0, 3)


def test_ids_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="id 2 is not below segments = 2"):
        segment_mean(torch.zeros(2, 1), torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="2 values but 1 segment ids"):
        segment_mean(torch.zeros(2, 1), torch.tensor([0]), 2)
    with pytest.raises(ValueError, match="labels span -1 to 0, expected 0 to 1"):
        map_segment_mean(torch.zeros(1, 1, 1, 2), torch.tensor([[[0, -1]]]), 2)
    with pytest.raises(ValueError, match=r"maps \(1, 1, 1, 2\) but labels \(1, 2, 1\)"):
        map_segment_mean(torch.zeros(1, 1, 1, 2), torch.zeros(1, 2, 1, dtype=torch.int64), 2)
