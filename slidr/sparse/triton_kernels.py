"""Triton's door: sparse convolution as implicit matrix products on the GPU, without products kept in memory.

`convolve` and `input_gradient` are output-stationary: a program owns one tile of output rows (see
`slidr.sparse.tiles`) and some output channels, walks over the tile's offsets and input channels, gathers input rows
straight into the product and writes each output row once. `weight_gradient` cuts the pairs of each offset into
chunks, whose partial sums are added in a fixed order. Nothing uses atomics, so results repeat bit for bit.

Inputs are float32, bfloat16 or float16 (float64 under Triton's interpreter); sums are kept in float32 at least.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slidr.shapes import Float
from slidr.sparse.kernel_map import KernelMap
from slidr.sparse.tiles import ROWS, chunks_of, tiles_of

WIDEST = 128  # channels of one program's output
PROGRAMS = 512  # enough to keep every GPU of today busy
SHORTEST, LONGEST = 256, 8192  # pairs of a chunk
STAGES = 5  # of the loop: row numbers are fetched two steps ahead of the rows, rows two ahead of their product


@triton.jit
def _convolve(
    x,  # [V, C]
    weight,  # [K, C, D] by its strides
    out,  # [W, D]
    rows_of_tile,
    first_block,
    offset_of_block,
    rows_of_block,
    stride_k,
    stride_c,
    stride_d,
    C: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    steps: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // columns
    d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, M)
    total = tl.zeros((M, BLOCK_D), dtype=SUM)
    # One loop over offsets and channels: its loads are fetched ahead across both.
    for step in range(tl.load(first_block + tile) * steps, tl.load(first_block + tile + 1) * steps):
        block = step // steps
        c = step % steps * BLOCK_C + tl.arange(0, BLOCK_C)
        row = tl.load(rows_of_block + block * M + lane)
        k = tl.load(offset_of_block + block)
        a = tl.load(x + row[:, None] * C + c[None, :], mask=(row >= 0)[:, None] & (c < C)[None, :], other=0.0)
        b = tl.load(
            weight + k * stride_k + c[:, None] * stride_c + d[None, :] * stride_d,
            mask=(c < C)[:, None] & (d < D)[None, :],
            other=0.0,
        )
        if WIDEN:
            a, b = a.to(SUM), b.to(SUM)
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
    row = tl.load(rows_of_tile + tile * M + lane)
    here = (row >= 0)[:, None] & (d < D)[None, :]
    tl.store(out + row[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=here)


@triton.jit
def _weight_gradient(
    x,  # [V, C]
    grad,  # [W, D]
    partial,  # [S, C, D]
    input_rows,
    output_rows,
    first_pair,
    last_pair,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    columns: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    parts: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C * columns
    chunk = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    c = part // columns * BLOCK_C + tl.arange(0, BLOCK_C)
    d = part % columns * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_C, BLOCK_D), dtype=SUM)
    last = tl.load(last_pair + chunk)
    for start in range(tl.load(first_pair + chunk), last, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        here = pair < last
        i = tl.load(input_rows + pair, mask=here, other=0)
        o = tl.load(output_rows + pair, mask=here, other=0)
        a = tl.load(x + i[:, None] * C + c[None, :], mask=here[:, None] & (c < C)[None, :], other=0.0)
        b = tl.load(grad + o[:, None] * D + d[None, :], mask=here[:, None] & (d < D)[None, :], other=0.0)
        if WIDEN:
            a, b = a.to(SUM), b.to(SUM)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION, out_dtype=SUM)
    here = (c < C)[:, None] & (d < D)[None, :]
    at = partial + chunk.to(tl.int64) * C * D
    tl.store(at + c[:, None] * D + d[None, :], total, mask=here)


def convolve(x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], kernel_map: KernelMap) -> Float[Tensor, "W D"]:
    """out[o] = sum over the pairs (i, o, k) of x[i] @ weight[k]; `weight` may have any strides."""
    x, (_, c, d) = x.contiguous(), weight.shape
    tiles = tiles_of(kernel_map)
    out = x.new_empty(kernel_map.num_outputs, d)
    if len(tiles) == 0:
        return out
    block_d = _power_of_two(d, WIDEST)
    while block_d > 32 and len(tiles) * triton.cdiv(d, block_d) < PROGRAMS // 2:
        block_d //= 2  # few rows: more programs of fewer channels
    with _on(x):
        _convolve[(len(tiles) * triton.cdiv(d, block_d),)](
            x,
            weight,
            out,
            tiles.rows_of_tile,
            tiles.first_block,
            tiles.offset_of_block,
            tiles.rows_of_block,
            *weight.stride(),
            C=c,
            D=d,
            M=ROWS,
            BLOCK_C=_depth(x, c),
            BLOCK_D=block_d,
            SUM=_sum_type(x),
            PRECISION=_precision(),
            WIDEN=_must_widen(x),
            num_warps=4,
            num_stages=STAGES,
        )
    return out


def input_gradient(
    weight: Float[Tensor, "K C D"], grad: Float[Tensor, "W D"], kernel_map: KernelMap
) -> Float[Tensor, "V C"]:
    """dx[i] = sum over the pairs (i, o, k) of grad[o] @ weight[k]^T."""
    return convolve(grad, weight.transpose(1, 2), kernel_map.transposed())


def weight_gradient(
    x: Float[Tensor, "V C"], weight: Float[Tensor, "K C D"], grad: Float[Tensor, "W D"], kernel_map: KernelMap
) -> Float[Tensor, "K C D"]:
    """dweight[k] = sum over the pairs (i, o, k) of x[i]^T grad[o]."""
    if kernel_map.num_pairs == 0:
        return torch.zeros_like(weight)
    x, grad = x.contiguous(), grad.contiguous()
    kernels, c, d = weight.shape
    block_c, block_d = _power_of_two(c, WIDEST), _power_of_two(d, WIDEST)
    parts = triton.cdiv(c, block_c) * triton.cdiv(d, block_d)
    wanted = triton.next_power_of_2(triton.cdiv(kernel_map.num_pairs * parts, PROGRAMS))
    chunks = chunks_of(kernel_map, min(max(wanted, SHORTEST), LONGEST))
    partial = x.new_empty(len(chunks), c, d, dtype=torch.promote_types(x.dtype, torch.float32))
    with _on(x):
        _weight_gradient[(len(chunks) * parts,)](
            x,
            grad,
            partial,
            kernel_map.input_rows,
            kernel_map.output_rows,
            chunks.first_pair,
            chunks.last_pair,
            C=c,
            D=d,
            BLOCK_P=_depth(x, LONGEST),
            BLOCK_C=block_c,
            BLOCK_D=block_d,
            SUM=_sum_type(x),
            PRECISION=_precision(),
            WIDEN=_must_widen(x),
            num_warps=8 if block_c * block_d > 64 * 128 else 4,
            num_stages=STAGES,
        )
    every = torch.arange(len(chunks), dtype=torch.int32, device=x.device)
    total = torch.embedding_bag(partial.flatten(1), every, chunks.first_chunk, mode=0, include_last_offset=True)[0]
    return total.view(kernels, c, d).to(weight.dtype)


def _on(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches there, wherever its arguments lie."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _depth(x: Tensor, channels: int) -> int:
    """Terms of one product step: 128 bytes of each row, less where there are fewer."""
    return _power_of_two(channels, 64 if x.element_size() == 2 else 32)


def _power_of_two(size: int, most: int) -> int:
    """`size` rounded up to a power of two within [16, `most`]: tensor cores take no less than 16."""
    return min(max(triton.next_power_of_2(size), 16), most)


def _sum_type(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _precision() -> str:
    """float32 products as PyTorch's own: whole, or TF32 where the user allowed it."""
    # Not `allow_tf32`: reading it raises where the user set this newer name.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _must_widen(x: Tensor) -> bool:
    """Triton's interpreter holds bfloat16 as integers, and would multiply those."""
    return triton.knobs.runtime.interpret and x.dtype == torch.bfloat16
