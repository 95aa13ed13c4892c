"""Scales chosen for GPTQ: the pass itself against a plain one, and errors that only fall."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import Format
from calipers.grouping import Grouping
from calipers.ranges import min_max, search_optimal_scales
from calipers.ranges.gptq import _by_value, _factor, _round, refine_for_gptq

ROWS, COLS = 24, 96
KINDS: dict[str, dict[str, Any]] = {
    "int4 groups": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "int4 short last group": {"num_bits": 4, "strategy": "group", "group_size": 40},
    "int4 channel": {"num_bits": 4, "strategy": "channel"},
    "int3 asymmetric": {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False},
    "fp8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": torch.float8_e4m3fn,
    },
}


def sample(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and X'X of inputs whose columns hang together."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLS, generator=generator) * 0.1
    mixed = torch.randn(COLS, COLS, generator=generator) / COLS**0.5 + torch.eye(COLS)
    x = torch.randn(400, COLS, generator=generator) @ mixed
    return weight, x.T @ x / len(x)


def start(weight: Tensor, hessian: Tensor, args: QuantizationArgs) -> tuple[Tensor, ...]:
    """The scales of `optimal` for rounding to nearest, zero points and the global scale."""
    grouping = Grouping.of(weight.shape, "weight", args)
    views = grouping.split(weight)
    shared = None
    if args.strategy == "tensor_group":
        shared = (448 * 6 / weight.abs().max() / 2).reshape(1)
    found = search_optimal_scales(
        views,
        [min_max(view) for view in views],
        args,
        importance=list(grouping.split(hessian.diag().expand(weight.shape))),
        global_scale=shared,
    )
    scale, zero_point = grouping.join(found)
    if shared is not None:
        scale = (scale * shared).to(torch.float8_e4m3fn)
    return scale, zero_point, shared


def plain_gptq(weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, codes: Format) -> Tensor:
    """Column by column, feedback at once: what is rounded to."""
    rest, rounded = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for at in range(weight.shape[1]):
        column = rest[:, at].float()
        rounded[:, at] = codes.round(column / scale[:, at], zero[:, at]) * scale[:, at]
        error = (rest[:, at] - rounded[:, at]) / upper[at, at]
        rest[:, at + 1 :] -= error.unsqueeze(1) * upper[at, at + 1 :]
    return rounded


def errors_of(
    weight: Tensor, hessian: Tensor, qparams: tuple[Tensor, ...], args: QuantizationArgs
) -> Tensor:
    """Of each row the error of the output under GPTQ, with X'X damped by 1%, float64."""
    scale, zero_point, shared = qparams
    step = scale.float() if shared is None else scale.float() / shared
    order = hessian.diag().argsort(descending=True)
    upper = _factor(hessian, order, 0.01)
    assert upper is not None
    step, zero = (each[:, order] for each in _by_value(args, COLS, step, zero_point))
    rounded = plain_gptq(weight[:, order], upper.double(), step, zero, Format.of(args))
    lost = rounded - weight[:, order].double()
    damped = hessian.double()[order][:, order] + 0.01 * hessian.diag().mean() * torch.eye(COLS)
    return ((lost @ damped) * lost).sum(1)


@pytest.mark.parametrize("block", [7, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_is_that_of_plain_gptq(kind: str, block: int) -> None:
    args = QuantizationArgs(**KINDS[kind])
    weight, hessian = sample()
    scale, zero_point, shared = start(weight, hessian, args)
    step = scale.float() if shared is None else scale.float() / shared
    order = hessian.diag().argsort(descending=True)
    upper = _factor(hessian, order, 0.01)
    assert upper is not None
    found = _round(
        weight, upper, order, _by_value(args, COLS, step, zero_point), Format.of(args), block
    )
    # the sum of ((t - q) / u)^2 is the error of the output, exactly but for rounding
    wanted = errors_of(weight, hessian, (scale, zero_point, shared), args)
    # a value on the border between two codes may fall to either side, in a few rows
    close = (found.errors - wanted).abs() <= 1e-3 * wanted
    assert close.float().mean() > 0.8
    assert float(found.errors.sum()) == pytest.approx(float(wanted.sum()), rel=0.02)
    # the first column is rounded as it is
    assert torch.equal(found.targets[:, order[0]], weight[:, order[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_is_worse_and_all_together_are_better(kind: str) -> None:
    args = QuantizationArgs(**KINDS[kind])
    weight, hessian = sample(1)
    given = start(weight, hessian, args)
    scale, zero_point = refine_for_gptq(
        weight, hessian, given[0], given[1], args, global_scale=given[2]
    )
    assert scale.dtype == given[0].dtype
    assert scale.shape == given[0].shape
    before = errors_of(weight, hessian, given, args)
    after = errors_of(weight, hessian, (scale, zero_point, given[2]), args)
    changed = (scale.float() != given[0].float()).any(1) | (zero_point != given[1]).any(1)
    assert bool(changed.any())
    # rows whose rounding a last bit decides aside
    assert ((after > before * 1.02) & changed).float().mean() < 0.1
    assert after.sum() < before.sum()


def test_negative_scales_are_chosen_where_they_may_be() -> None:
    args = QuantizationArgs(num_bits=3, strategy="group", group_size=32)
    weight, hessian = sample(2)
    given = start(weight, hessian, args)
    one, _ = refine_for_gptq(weight, hessian, given[0], given[1], args)
    signed, _ = refine_for_gptq(weight, hessian, given[0], given[1], args, negative_scales=True)
    assert bool((one > 0).all())
    assert bool((signed < 0).any())


def test_inputs_without_a_factor_leave_the_scales() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel")
    weight, hessian = sample()
    given = start(weight, hessian, args)
    hessian[0, 1] = hessian[1, 0] = 1e6
    scale, zero_point = refine_for_gptq(weight, hessian, given[0], None, args)
    assert torch.equal(scale, given[0])
    assert torch.equal(zero_point, torch.zeros_like(scale))


def test_columns_without_inputs_do_not_count() -> None:
    args = QuantizationArgs(num_bits=4, strategy="channel")
    weight, hessian = sample()
    hessian[5] = hessian[:, 5] = 0
    weight[:, 5] = 100
    given = start(weight, hessian, args)
    scale, _ = refine_for_gptq(weight, hessian, given[0], None, args)
    assert bool((scale < 1).all())


def test_groups_of_several_rows_are_refused() -> None:
    args = QuantizationArgs(num_bits=4, strategy="tensor")
    weight, hessian = sample()
    with pytest.raises(ValueError, match=r"args: expected the strategy channel.*got"):
        refine_for_gptq(weight, hessian, torch.ones(1), None, args)
