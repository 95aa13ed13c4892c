"""`search_optimal_scales` against exact and dense searches, and its engines against each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from calipers import grouping
from calipers.engines import dispatch
from calipers.ranges import group_values, min_max, range_of_qparams, search_optimal_scales
from ranges import oracles


def preset(name: str) -> QuantizationArgs:
    args = preset_name_to_scheme(name, ["Linear"]).weights
    assert args is not None
    return args


def group(bits: int, size: int = 128, **fields: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, strategy="group", group_size=size, **fields)


def search(
    x: Tensor, args: QuantizationArgs, weight: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of one view, flat."""
    views = group_values(x, "weight", args)
    importance = None
    if weight is not None:
        importance = list(group_values(weight, "weight", args))
    extremes = [min_max(view) for view in views]
    pairs = search_optimal_scales(views, extremes, args, importance=importance, **options)
    assert len(pairs) == 1
    return pairs[0][0].reshape(-1), pairs[0][1].reshape(-1)


def excess(found: Tensor, best: Tensor) -> float:
    return float(found.sum() / best.sum() - 1)


@pytest.mark.parametrize("log_sigma", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_integers_against_the_exact_optimum(bits: int, log_sigma: int) -> None:
    groups = 24 if bits == 8 else 60
    for kind in oracles.KINDS:
        x, w = oracles.values(kind, groups, 128), oracles.importance(groups, 128, log_sigma)
        scale, zero = search(x, group(bits), w)
        found = oracles.error(x, w, scale, zero, group(bits))
        best = oracles.best_symmetric(x, w, bits)
        assert (found >= best * (1 - 1e-4)).all(), "better than the exact optimum: a wrong oracle"
        bound = (
            {0: 0.001, 1: 0.001, 2: 0.005}[log_sigma] if bits < 8 else [0.01, 0.01, 0.05][log_sigma]
        )
        assert excess(found, best) < bound, kind


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rough_scales_are_near_the_exact_optimum(bits: int) -> None:
    for kind in oracles.KINDS:
        x, w = oracles.values(kind, 24, 128), oracles.importance(24, 128, 1)
        scale, zero = search(x, group(bits), w, rough=True)
        found = oracles.error(x, w, scale, zero, group(bits))
        fine = oracles.error(x, w, *search(x, group(bits), w), group(bits))
        assert 0 <= excess(found, oracles.best_symmetric(x, w, bits)) < 0.1, kind
        assert (found != fine).any(), "that is no less work"


def test_there_are_no_rough_scales_with_zero_points_or_codes() -> None:
    x = oracles.values("gauss", 24, 128)
    for args in (group(4, symmetric=False), preset("MXFP4")):
        for rough, fine in zip(search(x, args, rough=True), search(x, args), strict=True):
            assert torch.equal(rough, fine)


@pytest.mark.slow
@pytest.mark.parametrize("log_sigma", [0, 1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_symmetric_integers_against_the_exact_optimum_at_length(bits: int, log_sigma: int) -> None:
    groups = 150 if bits == 8 else 600
    for kind in oracles.KINDS:
        x, w = oracles.values(kind, groups, 128, 7), oracles.importance(groups, 128, log_sigma, 8)
        scale, zero = search(x, group(bits), w)
        found = oracles.error(x, w, scale, zero, group(bits))
        bound = (
            {0: 0.001, 1: 0.001, 2: 0.005}[log_sigma] if bits < 5 else [0.01, 0.01, 0.05][log_sigma]
        )
        assert excess(found, oracles.best_symmetric(x, w, bits)) < bound, kind


@pytest.mark.parametrize("log_sigma", [0, 1])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_asymmetric_integers_against_a_dense_search(bits: int, log_sigma: int) -> None:
    args = group(bits, symmetric=False)
    for kind in ("gauss", "laplace"):
        x = oracles.values(kind, 16, 128) + 0.5
        w = oracles.importance(16, 128, log_sigma)
        scale, zero = search(x, args, w)
        found = oracles.error(x, w, scale, zero, args)
        width = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / (2**bits - 1)
        ratios = torch.logspace(-0.9, 0.2, 300).unsqueeze(1)
        zeros = tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        best = oracles.best_of(x, w, width * ratios, args, zeros)
        assert excess(found, best) < 0.001, (kind, bits)


@pytest.mark.parametrize("log_sigma", [0, 1])
@pytest.mark.parametrize(
    "args",
    [QuantizationArgs(num_bits=8, type="float", strategy="channel"), group(4, 128, type="float")],
    ids=["fp8", "fp4"],
)
def test_floats_against_a_dense_search(args: QuantizationArgs, log_sigma: int) -> None:
    x, w = oracles.values("laplace", 16, 128), oracles.importance(16, 128, log_sigma)
    scale, zero = search(x, args, w)
    base = x.abs().amax(1) / (448 if args.num_bits == 8 else 6)
    best = oracles.best_of(x, w, base * torch.logspace(-0.6, 0.31, 400).unsqueeze(1), args)
    assert excess(oracles.error(x, w, scale, zero, args), best) < 0.01


@pytest.mark.parametrize("log_sigma", [0, 1, 2])
def test_nvfp4_against_all_codes(log_sigma: int) -> None:
    args = preset("NVFP4")
    x, w = oracles.values("student", 120, 16), oracles.importance(120, 16, log_sigma)
    x[::11] *= 1e-4  # below the smallest normal code: no octave of eight codes there
    x[5], x[6, 1:] = 0, 0
    for factor in (0.5, 1.0):
        global_scale = (factor * 448 * 6 / x.abs().amax()).reshape(1)
        scale, zero = search(x, args, w, global_scale=global_scale)
        stored = scale * global_scale
        rounded = stored.to(torch.float8_e4m3fn).float()
        torch.testing.assert_close(stored, rounded, rtol=3e-7, atol=0)
        stored = rounded
        codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        scales = codes.unsqueeze(1).expand(-1, len(x))
        best = oracles.best_of(x, w, scales, args, global_scale=global_scale)
        found = oracles.error(x, w, stored, zero, args, global_scale)
        # Group by group; float32 sums tell errors apart to some 1e-6.
        assert (found <= best * (1 + 1e-5)).all()


@pytest.mark.parametrize("log_sigma", [0, 2])
@pytest.mark.parametrize("name", ["MXFP4", "MXFP8"])
def test_mx_against_all_exponents(name: str, log_sigma: int) -> None:
    x, w = oracles.values("outliers", 120, 32), oracles.importance(120, 32, log_sigma)
    scale, zero = search(x, preset(name), w)
    assert torch.equal(scale.log2(), scale.log2().round())
    scales = torch.exp2(torch.arange(-30.0, 6.0)).unsqueeze(1).expand(-1, len(x))
    best = oracles.best_of(x, w, scales, preset(name))
    assert (oracles.error(x, w, scale, zero, preset(name)) <= best * (1 + 1e-5)).all()


SCHEMES = {
    **{f"int{bits}": group(bits, 32) for bits in range(2, 9)},
    **{f"int{bits} asymmetric": group(bits, 32, symmetric=False) for bits in range(2, 9)},
    "fp8": QuantizationArgs(num_bits=8, type="float", strategy="channel"),
    "fp4": group(4, 32, type="float"),
    "nvfp4": preset("NVFP4"),
    "mxfp4": preset("MXFP4"),
    "mxfp8": preset("MXFP8"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_never_worse_than_min_max_as_stored(name: str, dtype: torch.dtype) -> None:
    args = SCHEMES[name]
    size = args.group_size or 32
    x = oracles.values("student", 64, size).to(dtype)
    x[3], x[4, 1:], x[5] = 0, 0, 0.25
    for log_sigma in (0, 2):
        w = oracles.importance(64, size, log_sigma)
        global_scale = None
        if args.strategy == "tensor_group":
            global_scale = (448 * 6 / x.float().abs().amax()).reshape(1)
        plain, plain_zero = calculate_qparams(x.amin(1), x.amax(1), args, global_scale)
        before = oracles.error(x.float(), w, plain.float(), plain_zero, args, global_scale)
        for signed in {False, args.type == "int" and args.symmetric}:
            scale, zero = search(x, args, w, global_scale=global_scale, negative_scales=signed)
            if global_scale is None:
                assert torch.equal(scale.to(dtype).float(), scale), "not as stored"
            else:
                scale = scale * global_scale
            after = oracles.error(
                x.float(), w, scale, zero.to(plain_zero.dtype), args, global_scale
            )
            # The last term: what a group that min/max meets exactly has by rounding.
            assert (after <= before * (1 + 1e-5) + 1e-11 * (w * x.float().square()).sum(1)).all()
            assert after.sum() < before.sum() or name == "mxfp8"


def test_signed_scales_serve_the_longer_side() -> None:
    x = oracles.values("gauss", 200, 32)
    w = torch.ones_like(x)
    plain, zero = search(x, group(4, 32))
    signed, _ = search(x, group(4, 32), negative_scales=True)
    assert (plain > 0).all()
    assert 0.2 < float((signed < 0).float().mean()) < 0.8
    before = oracles.error(x, w, plain, zero, group(4, 32)).sum()
    # The figure at int4 is -8 to -10 % of squared error.
    assert oracles.error(x, w, signed, zero, group(4, 32)).sum() < 0.94 * before


@pytest.mark.parametrize("name", ["int4", "int4 asymmetric", "fp8"])
def test_a_scale_stated_as_a_range(name: str) -> None:
    args = SCHEMES[name]
    x = oracles.values("laplace", 20, 32) + 0.3
    scale, zero = search(x, args)
    back, back_zero = calculate_qparams(*range_of_qparams(scale, zero, args), args)
    torch.testing.assert_close(back.float(), scale, rtol=1e-6, atol=0)
    assert torch.equal(back_zero.float(), zero)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_groups_that_come_in_pieces(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = QuantizationArgs(num_bits=4, strategy=strategy)
    x, w = oracles.values("laplace", 40, 5000), oracles.importance(1, 5000, 1).expand(40, -1)
    expected = search(x, args, w)[0]
    monkeypatch.setattr(grouping, "CPU_CHUNK", 3000)
    monkeypatch.setattr(grouping, "SMALLEST_CHUNK", 1000)
    # Sums of many values in another order: 1e-6 of them.
    torch.testing.assert_close(search(x, args, w)[0], expected, rtol=1e-5, atol=0)


def assert_engines_agree(engine: str, args: QuantizationArgs, groups: int, **options: Any) -> None:
    size = args.group_size or 256
    x, w = oracles.values("laplace", groups, size), oracles.importance(groups, size, 1)
    if args.strategy == "tensor_group":
        options["global_scale"] = (448 * 3 / x.abs().amax()).reshape(1)
    found, zero = search(x, args, w, engine=engine, **options)
    expected, expected_zero = search(x, args, w, engine="eager", **options)
    assert not dispatch._failures, "the engine did not take part"
    factor = options.get("global_scale", torch.ones(1))
    mine = oracles.error(x, w, found * factor, zero, args, options.get("global_scale"))
    theirs = oracles.error(
        x, w, expected * factor, expected_zero, args, options.get("global_scale")
    )
    # Where candidates are tied an engine may choose either: their errors are the same.
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=0)
    assert float(((found - expected).abs() > 1e-6 * expected.abs()).float().mean()) < 0.005


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_the_native_engine_agrees_about_rough_scales(name: str) -> None:
    assert_engines_agree("native", SCHEMES[name], 300, rough=True)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_native_engine_agrees_with_the_reference(name: str) -> None:
    assert_engines_agree("native", SCHEMES[name], 5000)
    if SCHEMES[name].type == "int" and SCHEMES[name].symmetric:
        assert_engines_agree("native", SCHEMES[name], 1000, negative_scales=True)
