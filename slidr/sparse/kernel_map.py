"""Kernel maps: which input row meets which output row under which kernel offset.

Offsets are numbered with the first spatial axis fastest. Odd kernels are centred, even ones use offsets 0, 1.
Pairs are stored offset after offset, so that every offset is one slice and one matrix product.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slidr.shapes import Int64

if TYPE_CHECKING:
    from slidr.sparse.coordinates import CoordinateSet, Triple


@dataclass(frozen=True)
class Bags:
    """Pairs grouped by the row they add up in: those of row r are ``pair[start[r] : start[r + 1]]``."""

    pair: Int64[Tensor, " P"]
    start: Int64[Tensor, " R+1"]


@dataclass(frozen=True)
class KernelMap:
    """Pairs (input row, output row) of a sparse convolution, sorted by kernel offset.

    ``identity`` names the offset, if any, that pairs every row with itself in order; it needs no gather.
    """

    input_rows: Int64[Tensor, " P"]
    output_rows: Int64[Tensor, " P"]
    counts: tuple[int, ...]  # pairs of each offset
    num_inputs: int
    num_outputs: int
    identity: int | None = None
    # The transposed map of this one; for that one, this, and weakly, or both would wait for the garbage collector.
    _of: weakref.ref[KernelMap] | None = field(default=None, repr=False, compare=False)
    _twin: list[KernelMap] = field(default_factory=list, repr=False, compare=False)
    kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # other forms of this map, made once

    @property
    def num_pairs(self) -> int:
        return len(self.input_rows)

    @cached_property
    def slices(self) -> tuple[tuple[int, int, int], ...]:
        """(offset, first pair, one past its last) of every offset that has pairs."""
        ends = list(itertools.accumulate(self.counts))
        return tuple((k, end - n, end) for k, (n, end) in enumerate(zip(self.counts, ends, strict=True)) if n > 0)

    @cached_property
    def bags(self) -> Bags:
        """The pairs of every output row."""
        rows, pair = torch.sort(self.output_rows, stable=True)
        start = torch.searchsorted(rows, torch.arange(self.num_outputs + 1, device=rows.device))
        return Bags(pair, start)

    @cached_property
    def table(self) -> Int64[Tensor, "V K"]:
        """For every output row its input row under each offset; ``num_inputs`` where there is none."""
        device = self.input_rows.device
        table = torch.full((self.num_outputs, len(self.counts)), self.num_inputs, device=device)
        offset = torch.repeat_interleave(
            torch.arange(len(self.counts), device=device),
            torch.tensor(self.counts, device=device),
            output_size=self.num_pairs,  # or the host would wait for the device to add the counts up
        )
        table[self.output_rows, offset] = self.input_rows
        return table

    def transposed(self) -> KernelMap:
        """The map of the transposed convolution: inputs and outputs change places."""
        if self._of is not None and (original := self._of()) is not None:
            return original
        if not self._twin:
            twin = KernelMap(
                self.output_rows,
                self.input_rows,
                self.counts,
                self.num_outputs,
                self.num_inputs,
                self.identity,
                weakref.ref(self),
            )
            self._twin.append(twin)
        return self._twin[0]


def offsets_of(kernel: Sequence[int]) -> list[tuple[int, int, int]]:
    """Lattice steps (dx, dy, dz) of each kernel offset, first axis fastest; odd sizes are centred."""
    axes = [range(-(size // 2), size // 2 + 1) if size % 2 == 1 else range(size) for size in kernel]
    return [(dx, dy, dz) for dz in axes[2] for dy in axes[1] for dx in axes[0]]


def submanifold_map(
    voxels: CoordinateSet, kernel: Triple, moved: Callable[[Sequence[tuple[int, int, int]]], Tensor]
) -> KernelMap:
    """Pairs with input = output + offset over one set; `moved` gives its keys moved by each of some offsets.

    Half of the offsets are searched, half mirror them.
    """
    if any(size % 2 == 0 for size in kernel):
        raise ValueError(f"submanifold kernel: got {kernel}, expected odd sizes")
    offsets = offsets_of(kernel)
    half = len(offsets) // 2
    keys, device = voxels.keys, voxels.keys.device
    rows, found = voxels.find(moved(offsets[:half]))
    hit_offset, output_half = torch.nonzero(found, as_tuple=True)
    input_half = rows[found]
    counts_half = torch.bincount(hit_offset, minlength=half).tolist()
    own = torch.arange(len(keys), device=device)
    mirrored = [
        torch.cat(list(reversed(part.split(counts_half)))) if half else part for part in (input_half, output_half)
    ]
    return KernelMap(
        torch.cat([input_half, own, mirrored[1]]),
        torch.cat([output_half, own, mirrored[0]]),
        (*counts_half, len(keys), *reversed(counts_half)),
        len(keys),
        len(keys),
        identity=half,
    )


def strided_map(
    child: Int64[Tensor, "V 3"], parent_of_row: Int64[Tensor, " V"], num_parents: int, factor: Triple
) -> KernelMap:
    """Pairs of a convolution whose kernel equals its stride: each input row has one parent and one offset."""
    offset = child[:, 0] + factor[0] * (child[:, 1] + factor[1] * child[:, 2])
    order = torch.argsort(offset, stable=True)
    counts = torch.bincount(offset, minlength=factor[0] * factor[1] * factor[2]).tolist()
    return KernelMap(order, parent_of_row[order], tuple(counts), len(child), num_parents)


def window_map(
    index: Int64[Tensor, "V 4"],
    kernel: Triple,
    factor: Triple,
    padding: Triple,
    shape: Triple,
    pack: Callable[[Tensor], Tensor],
) -> tuple[Int64[Tensor, " W"], KernelMap, Triple]:
    """Sorted output keys, pairs and grid shape of a padded, strided convolution over rows in [0, shape).

    An output exists wherever its window holds an input: o = (i + padding - k) / factor for some i and k.
    """
    out_shape: Triple = tuple(  # type: ignore[assignment]
        (s + 2 * p - k) // f + 1 for s, p, k, f in zip(shape, padding, kernel, factor, strict=True)
    )
    outputs, met = [], []  # per axis: where each kernel step (row) takes each input (column), and whether it is one
    for axis, (size, step, before, end) in enumerate(zip(kernel, factor, padding, out_shape, strict=True)):
        shifted = index[:, 1 + axis] + before - torch.arange(size, device=index.device)[:, None]
        o = torch.div(shifted, step, rounding_mode="floor")
        outputs.append(o)
        met.append((o * step == shifted) & (o >= 0) & (o < end))
    pairs = met[2][:, None, None] & met[1][:, None] & met[0]
    z, y, x, rows = torch.nonzero(pairs, as_tuple=True)
    reached = torch.stack([index[rows, 0], outputs[0][x, rows], outputs[1][y, rows], outputs[2][z, rows]], dim=1)
    rows = rows.clone()  # or it would keep all four columns that nonzero made
    del z, y, x
    keys, output_rows = torch.unique(pack(reached), return_inverse=True)
    counts = tuple(pairs.flatten(0, 2).sum(dim=1).tolist())
    return keys, KernelMap(rows, output_rows, counts, len(index), len(keys)), out_shape
