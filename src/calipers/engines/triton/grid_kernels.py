"""Kernels of the shrink grid on CUDA: a group's values stay in registers for all candidates.

A program loads the values of some groups, or a run of the values of a long group, once, and walks
through the steps of the grid with them. Scales are made where they are used, by the arithmetic of
compressed-tensors' `calculate_qparams`, so that none of them goes through memory. Only plain
features of Triton are used: the same text has to compile with every release from 3.3 on.
"""
# mypy: ignore-errors
# Plain branches and ranges, which every release compiles.
# ruff: noqa: SIM108, PIE808

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["cut_steps", "pick_steps", "search_steps"]


@triton.jit
def search_steps(
    values,
    weights,
    columns,
    low,
    high,
    units,
    global_scale,
    factors,
    state,
    best_low,
    best_high,
    partial,
    num_groups,
    length,
    run_length,
    num_runs,
    num_words,
    num_column_groups,
    kept_size_1,
    kept_size_2,
    reduced_size_1,
    reduced_size_2,
    value_kept_0,
    value_kept_1,
    value_kept_2,
    value_reduced_0,
    value_reduced_1,
    value_reduced_2,
    weight_kept_0,
    weight_kept_1,
    weight_kept_2,
    weight_reduced_0,
    weight_reduced_1,
    weight_reduced_2,
    KEPT: tl.constexpr,
    REDUCED: tl.constexpr,
    GATHERED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FINITE_ONLY: tl.constexpr,
    WIDE: tl.constexpr,
    LONG: tl.constexpr,
    NORM: tl.constexpr,
    INTEGER: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    SHIFT: tl.constexpr,
    SMALLEST: tl.constexpr,
    MX_OFFSET: tl.constexpr,
    SCALED_GLOBALLY: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    SCALE_LIMIT: tl.constexpr,
    SCALE_EPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Best of the first `state[0]` steps of each group; or, of long groups, errors of their runs.

    `state` holds the number of steps to try and then, a bit for each step, whether it made any
    group better. Values and weights are addressed by up to three kept dimensions (what tells groups
    apart) and three reduced ones; dimension 2 is the innermost. `partial` is (steps, groups, runs).
    """
    program = tl.program_id(0)
    limit = tl.load(state)
    run = program % num_runs
    groups = (program // num_runs) * BLOCK_G + tl.arange(0, BLOCK_G)
    # Without steps to try nothing is loaded and nothing is stored.
    is_group = groups < tl.where(limit > 0, num_groups, 0)
    lane = tl.arange(0, BLOCK_N)
    if WIDE:
        position = run.to(tl.int64) * run_length + lane
    else:
        position = run * run_length + lane
    inside = (lane < run_length) & (position < length)
    mask = is_group[:, None] & inside[None, :]

    value_at = _offset(
        groups, kept_size_1, kept_size_2, value_kept_0, value_kept_1, value_kept_2, KEPT
    )
    weight_at = _offset(
        groups, kept_size_1, kept_size_2, weight_kept_0, weight_kept_1, weight_kept_2, KEPT
    )
    if GATHERED:
        list_at = (groups % num_column_groups).to(tl.int64) * length
        column = tl.load(columns + list_at[:, None] + position[None, :], mask=mask, other=0)
        value_at = value_at[:, None] + column * value_reduced_2
        weight_at = weight_at[:, None] + column * weight_reduced_2
    else:
        value_in = _offset(
            position,
            reduced_size_1,
            reduced_size_2,
            value_reduced_0,
            value_reduced_1,
            value_reduced_2,
            REDUCED,
        )
        weight_in = _offset(
            position,
            reduced_size_1,
            reduced_size_2,
            weight_reduced_0,
            weight_reduced_1,
            weight_reduced_2,
            REDUCED,
        )
        value_at = value_at[:, None] + value_in[None, :]
        weight_at = weight_at[:, None] + weight_in[None, :]
    # What is masked is zero, which is quantized to zero and adds no error.
    value = tl.load(values + value_at, mask=mask, other=0.0).to(tl.float32)
    if FINITE_ONLY:
        value = tl.where(tl.abs(value) < float("inf"), value, 0.0)
    if WEIGHTED:
        weight = tl.load(weights + weight_at, mask=mask, other=0.0).to(tl.float32)
    group_low = tl.load(low + groups, mask=is_group, other=0.0)
    group_high = tl.load(high + groups, mask=is_group, other=0.0)
    unit = tl.load(units + groups, mask=is_group, other=1.0)
    if SCALED_GLOBALLY:
        shared_scale = tl.load(global_scale).to(tl.float32)
    else:
        shared_scale = 1.0

    best = tl.full([BLOCK_G], float("inf"), tl.float32)
    best_factor = tl.zeros([BLOCK_G], tl.float32) + tl.load(factors)
    target = partial + groups.to(tl.int64) * num_runs + run
    for word in range(0, num_words):
        gains = tl.zeros([BLOCK_G], tl.int32)
        for step in range(word * 32, tl.minimum(limit, word * 32 + 32)):
            factor = tl.load(factors + step)
            scale, zero = _qparams(
                group_low * factor,
                group_high * factor,
                shared_scale,
                SYMMETRIC,
                LOWEST,
                HIGHEST,
                HALF_RANGE,
                MX_OFFSET,
                SCALED_GLOBALLY,
                SCALE_TYPE,
                SCALE_LIMIT,
                SCALE_EPS,
            )
            inverse = 1.0 / scale
            error = _error(
                value,
                scale[:, None],
                inverse[:, None],
                zero[:, None],
                INTEGER,
                LOWEST,
                HIGHEST,
                SHIFT,
                SMALLEST,
            )
            # In units of the group: powers of tiny errors vanish, those of huge ones overflow.
            loss = _power(error * unit[:, None], NORM)
            if WEIGHTED:
                loss = loss * weight
            total = tl.sum(loss, axis=1)
            if LONG:
                tl.store(target, total, mask=is_group)
                target += num_groups * num_runs
            else:
                better = (total < best) & is_group
                best = tl.where(better, total, best)
                best_factor = tl.where(better, factor, best_factor)
                gains = gains | (better.to(tl.int32) << (step % 32))
        if not LONG:
            _note_gains(state, word, gains)
    if not LONG:
        tl.store(best_low + groups, group_low * best_factor, mask=is_group)
        tl.store(best_high + groups, group_high * best_factor, mask=is_group)


@triton.jit
def pick_steps(
    errors,
    low,
    high,
    factors,
    state,
    best_low,
    best_high,
    num_groups,
    num_words,
    BLOCK_G: tl.constexpr,
):
    """Best of the first `state[0]` steps, from errors of shape (steps, groups)."""
    groups = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    limit = tl.load(state)
    is_group = groups < tl.where(limit > 0, num_groups, 0)
    best = tl.full([BLOCK_G], float("inf"), tl.float32)
    best_factor = tl.zeros([BLOCK_G], tl.float32) + tl.load(factors)
    source = errors + groups
    for word in range(0, num_words):
        gains = tl.zeros([BLOCK_G], tl.int32)
        for step in range(word * 32, tl.minimum(limit, word * 32 + 32)):
            total = tl.load(source, mask=is_group, other=0.0)
            source += num_groups
            better = (total < best) & is_group
            best = tl.where(better, total, best)
            best_factor = tl.where(better, tl.load(factors + step), best_factor)
            gains = gains | (better.to(tl.int32) << (step % 32))
        _note_gains(state, word, gains)
    group_low = tl.load(low + groups, mask=is_group, other=0.0)
    group_high = tl.load(high + groups, mask=is_group, other=0.0)
    tl.store(best_low + groups, group_low * best_factor, mask=is_group)
    tl.store(best_high + groups, group_high * best_factor, mask=is_group)


@triton.jit
def cut_steps(state, num_steps, patience):
    """Where the patience ends, into `state[0]`; 0 where no step behind the end made a gain.

    One program walks through the bits of the steps. Without a late gain the search of all steps
    has found what the search of the first ones would have found, and nothing is left to do.
    """
    limit = tl.load(state)
    idle = limit * 0
    late = limit * 0
    for step in range(0, num_steps):
        gain = (tl.load(state + 1 + step // 32) >> (step % 32)) & 1
        late = late | tl.where(step >= limit, gain, 0)
        idle = tl.where(gain > 0, 0, idle + 1)
        limit = tl.where((idle >= patience) & (limit == num_steps), step + 1, limit)
    tl.store(state, tl.where(late > 0, limit, 0))


@triton.jit
def _either(left, right):
    return left | right


@triton.jit
def _note_gains(state, word, gains):
    """Add the bits of a program's groups to those of all; an `or` is the same in any order."""
    bits = tl.reduce(gains, 0, _either)
    tl.atomic_or(state + 1 + word, bits, sem="relaxed")


@triton.jit
def _offset(index, size_1, size_2, stride_0, stride_1, stride_2, DIMS: tl.constexpr):
    """Offset of flat positions in a box of up to three dimensions, the last one innermost."""
    if DIMS == 1:
        offset = index.to(tl.int64) * stride_2
    elif DIMS == 2:
        offset = (index // size_2).to(tl.int64) * stride_1
        offset += (index % size_2).to(tl.int64) * stride_2
    else:
        outer = index // size_2
        offset = (outer // size_1).to(tl.int64) * stride_0
        offset += (outer % size_1).to(tl.int64) * stride_1
        offset += (index % size_2).to(tl.int64) * stride_2
    return offset


@triton.jit
def _qparams(
    low,
    high,
    shared_scale,
    SYMMETRIC: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    HALF_RANGE: tl.constexpr,
    MX_OFFSET: tl.constexpr,
    SCALED_GLOBALLY: tl.constexpr,
    SCALE_TYPE: tl.constexpr,
    SCALE_LIMIT: tl.constexpr,
    SCALE_EPS: tl.constexpr,
):
    """Scale and zero point of ranges, with the rounding of `calculate_qparams`, bit by bit."""
    low = tl.minimum(low, 0.0, propagate_nan=tl.PropagateNan.ALL)
    high = tl.maximum(high, 0.0, propagate_nan=tl.PropagateNan.ALL)
    zero = tl.zeros_like(low)
    if SYMMETRIC:
        size = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
        if SCALE_TYPE == "mx":
            scale = _mx_scale(size, MX_OFFSET)
        else:
            scale = tl.div_rn(size, zero + HALF_RANGE)
    else:
        scale = tl.div_rn(high - low, zero + 2 * HALF_RANGE)
        # A range of nothing has no zero point; any will do.
        zero = LOWEST - tl.div_rn(low, tl.where(scale == 0, 1.0, scale))
        zero = _to_nearest(tl.minimum(tl.maximum(zero, LOWEST), HIGHEST))
    if SCALED_GLOBALLY:
        scale = shared_scale * scale
    if SCALE_TYPE != "mx":
        if SCALE_TYPE != "none":
            scale = tl.minimum(scale, SCALE_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if SCALE_TYPE == "fp8":
            scale = to_float_code(scale, 1572864.0, 121 << 23)
        elif SCALE_TYPE == "bf16":
            # By bits, ties to even: casts to bfloat16 have not always rounded.
            bits = scale.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            scale = bits.to(tl.float32, bitcast=True)
        elif SCALE_TYPE == "fp16":
            scale = scale.to(tl.float16).to(tl.float32)
        scale = tl.where(scale == 0, SCALE_EPS, scale)
    if SCALED_GLOBALLY:
        scale = tl.div_rn(scale, zero + shared_scale)
    return scale, zero


@triton.jit
def _mx_scale(size, OFFSET: tl.constexpr):
    """The power of two of an E8M0 code: the size's, rounded from 1.75 up, less the format's."""
    rounded = size.to(tl.int32, bitcast=True) + (1 << 21)
    exponent = (rounded >> 23) & 255
    code = tl.where(exponent == 255, 255, tl.maximum(exponent - OFFSET, 0))
    # Code 0 is 2**-127, half of the smallest normal number.
    bits = tl.where(code == 0, 1 << 22, code << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _error(
    value,
    scale,
    inverse,
    zero,
    INTEGER: tl.constexpr,
    LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr,
    SHIFT: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Values minus their fake-quantized selves; for float formats the sizes of both.

    A NaN among the codes may be lost in the clamping; the value or the scale that it came from is
    a factor here, so that it shows in the error all the same.
    """
    if INTEGER:
        # Far from zero a sum is an integer. Rounded before it is clamped, the product is a part of
        # the sum; what is too large for this is clamped anyway.
        far = zero + 12582912.0
        codes = tl.minimum(
            tl.maximum(value * inverse + far, LOWEST + 12582912.0), HIGHEST + 12582912.0
        )
        error = value - (codes - far) * scale
    else:
        size = tl.minimum(tl.abs(value * inverse), HIGHEST)
        error = tl.abs(value) - to_float_code(size, SHIFT, SMALLEST) * scale
    return error


@triton.jit
def _to_nearest(x):
    """To the nearest integer, ties to even, |x| < 2**22: two additions, where rounding is slow."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def to_float_code(size, SHIFT: tl.constexpr, SMALLEST: tl.constexpr):
    """To the nearest number of a small float format, ties to even.

    The exponent's bits alone are the power of two below the size; below the smallest normal number
    of the format, whose bits `SMALLEST` are, the step stays what it is there. Adding 1.5 * 2**23
    steps, which are `SHIFT` powers, leaves no bits for anything smaller than a step.
    """
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) & 0x7F800000, SMALLEST)
    shift = exponent.to(tl.float32, bitcast=True) * SHIFT
    return (size + shift) - shift


@triton.jit
def _power(error, NORM: tl.constexpr):
    """|error|**NORM."""
    square = error * error
    if NORM == 2:
        power = square
    elif NORM == 1:
        power = tl.abs(error)
    elif NORM == 3:
        power = square * tl.abs(error)
    elif NORM == 4:
        power = square * square
    elif NORM > 2:
        # The smaller the exponent, the less of the logarithm's rounding comes through.
        power = square * tl.exp2(_log2(square) * (NORM / 2 - 1))
    else:
        # Squares of tiny errors vanish, which lower powers of them do not.
        size = tl.abs(error)
        power = size * tl.exp2(_log2(size) * (NORM - 1))
    return power


@triton.jit
def _log2(x):
    """The logarithm, to 3e-7, of a number >= 0; of zero -127, where any number does here.

    The exponent's bits plus a polynomial of the mantissa's, log2(1 + m) / m on [0, 1), a third of
    what the exact function of the library takes.
    """
    bits = x.to(tl.int32, bitcast=True)
    # Below the bits of 2**23 an integer's bits are its value.
    exponent = ((bits >> 23) | 0x4B000000).to(tl.float32, bitcast=True) - 8388735.0
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    ratio = m * -0.012370642803503203 + 0.06378759589351896
    ratio = ratio * m - 0.15559996788729358
    ratio = ratio * m + 0.2561797043960858
    ratio = ratio * m - 0.35345468332517355
    ratio = ratio * m + 0.4800737491815663
    ratio = ratio * m - 0.7213107228447689
    ratio = ratio * m + 1.4426947670911614
    return ratio * m + exponent
