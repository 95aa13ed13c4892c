"""The kernel of sums over groups for candidate scales on CUDA."""
# mypy: ignore-errors
# Plain ranges, which every release compiles.
# ruff: noqa: PIE808

from __future__ import annotations

import triton
import triton.language as tl

from calipers.engines.triton.grid_kernels import to_float_code

__all__ = ["sum_candidates"]


@triton.jit
def sum_candidates(
    values,
    weights,
    inverse_base,
    ratios,
    zeros,
    found,
    num_rows,
    length,
    count,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    INTEGER: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHIFT: tl.constexpr,
    SMALLEST: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums of x q, q^2 and (x - p q)^2 over rows for each candidate p, and what the last one clips.

    Values and weights are (rows, length), ratios and zeros (count, rows), found is
    (3 * count + 1, rows). SHORT: a row fits a block, which is loaded once for all candidates.
    """
    rows = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    is_row = rows < num_rows
    lane = tl.arange(0, BLOCK_N)
    start = rows.to(tl.int64)[:, None] * length
    inverse = tl.load(inverse_base + rows, mask=is_row, other=0.0)
    mask = is_row[:, None] & (lane < length)[None, :]
    x = tl.load(values + start + lane[None, :], mask=mask, other=0.0) * inverse[:, None]
    if not INTEGER:
        x = tl.abs(x)
    w = tl.zeros_like(x) + 1.0
    if WEIGHTED:
        w = tl.load(weights + start + lane[None, :], mask=mask, other=0.0)
    for k in range(0, count):
        at = k * num_rows + rows
        ratio = tl.load(ratios + at, mask=is_row, other=1.0)
        zero = tl.zeros([BLOCK_G], tl.float32)
        if SHIFTED:
            zero = tl.load(zeros + at, mask=is_row, other=0.0)
        products = tl.zeros([BLOCK_G], tl.float32)
        squares = tl.zeros([BLOCK_G], tl.float32)
        residuals = tl.zeros([BLOCK_G], tl.float32)
        clipped = tl.zeros([BLOCK_G], tl.float32)
        for first in range(0, length, BLOCK_N):
            if not SHORT:
                inside = is_row[:, None] & (first + lane < length)[None, :]
                where = start + (first + lane)[None, :]
                x = tl.load(values + where, mask=inside, other=0.0) * inverse[:, None]
                if not INTEGER:
                    x = tl.abs(x)
                if WEIGHTED:
                    w = tl.load(weights + where, mask=inside, other=0.0)
            scaled = x * (1.0 / ratio)[:, None]
            if INTEGER:
                # Far from zero a sum is an integer.
                far = zero[:, None] + 12582912.0
                q = tl.maximum(scaled + far, LOWEST + 12582912.0)
                q = tl.minimum(q, HIGHEST + 12582912.0) - far
            else:
                q = to_float_code(tl.minimum(scaled, HIGHEST), SHIFT, SMALLEST)
            rest = x - q * ratio[:, None]
            over = tl.maximum(tl.abs(x) - HIGHEST * ratio[:, None], 0.0)
            products += tl.sum(w * x * q, axis=1)
            squares += tl.sum(w * q * q, axis=1)
            residuals += tl.sum(w * rest * rest, axis=1)
            clipped += tl.sum(w * over * over, axis=1)
        tl.store(found + at, products, mask=is_row)
        tl.store(found + count * num_rows + at, squares, mask=is_row)
        tl.store(found + 2 * count * num_rows + at, residuals, mask=is_row)
        if k == count - 1:
            tl.store(found + 3 * count * num_rows + rows, clipped, mask=is_row)
