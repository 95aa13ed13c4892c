"""Number formats, each against a plain enumeration of its codes; a new one is one row."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers import formats
from calipers.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    FloatFormat,
    Format,
    has_plain_mx_scales,
    is_known_to_library,
)
from calipers.observers import Observer
from calipers.ranges import (
    ShrinkGrid,
    group_values,
    min_max,
    qparams,
    range_of_qparams,
    search_grid_ranges,
    search_optimal_scales,
)
from calipers.ranges.qparams import fake_quantized, qparams_of_range
from ranges.strategies import MX, NVFP4

MXFP6 = QuantizationArgs(**MX, num_bits=6)
NVFP4_ARGS = QuantizationArgs(**NVFP4)
CHANNEL = QuantizationArgs(num_bits=8, type="float", strategy="channel")
#: Exponent and mantissa bits, as their names say.
ROWS = {"E2M1": (E2M1, 2, 1), "E2M3": (E2M3, 2, 3), "E3M2": (E3M2, 3, 2), "E4M3": (E4M3, 4, 3)}


def enumerated(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """The value of each code from zero up, by the definition of a float."""
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        fraction = mantissa / 2**mantissa_bits
        if exponent == 0:
            values.append(fraction * 2.0 ** (1 - bias))
        else:
            values.append((1 + fraction) * 2.0 ** (exponent - bias))
    return values[:-1] if exponent_bits == 4 else values  # the last code of E4M3 is NaN


def nearest(value: float, codes: list[float]) -> float:
    """The nearest code, of two the one with an even number."""
    size = abs(value)
    best = min(range(len(codes)), key=lambda i: (abs(codes[i] - size), i % 2))
    return codes[best] if value >= 0 else -codes[best]


@pytest.fixture(params=["E2M3", "E3M2"])
def six_bits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FloatFormat:
    """A format of six bits, in the place of the one that arguments name."""
    row = ROWS[request.param][0]
    monkeypatch.setitem(formats.FLOAT_FORMATS, 6, row)
    return row


@pytest.mark.parametrize("name", ROWS)
class TestRows:
    def test_codes(self, name: str) -> None:
        row, *bits = ROWS[name]
        assert row.positive_codes().tolist() == enumerated(*bits)[1:]
        assert row.high == enumerated(*bits)[-1] == -row.low
        assert 2.0**row.mx_offset <= row.high < 2.0 ** (row.mx_offset + 1)

    def test_rounding(self, name: str) -> None:
        row, *bits = ROWS[name]
        codes = enumerated(*bits)
        between = [(low + high) / 2 for low, high in pairwise(codes)]
        beyond = [row.high * 1.01, row.high * 2, row.high * 100]
        values = torch.tensor([*codes, *between, *beyond])
        values = torch.cat([values, values.nextafter(torch.zeros(1)), values * 1.0001])
        values = torch.cat([values, -values, torch.randn(200), 10 * torch.randn(200)])
        expected = [nearest(value, codes) for value in values.tolist()]
        assert row.round(values).tolist() == expected

    def test_largest_error(self, name: str) -> None:
        row, *bits = ROWS[name]
        last, largest = enumerated(*bits)[-2:]
        assert row.largest_error == (largest - last) / 2 / largest


def test_bits_that_no_format_has() -> None:
    with pytest.raises(NotImplementedError, match="have 4, 6, 8 bits, got 5"):
        Format.of(QuantizationArgs(num_bits=5, type="float", zp_dtype=torch.uint8))


class TestSixBits:
    """All of it, without a line that knows of six bits but the row."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_scales_are_powers_of_two_that_come_back(
        self, six_bits: FloatFormat, dtype: torch.dtype
    ) -> None:
        high = torch.rand(100).exp2().to(dtype) * 3
        scale, zero_point = qparams_of_range(-high, high, MXFP6)
        assert scale.dtype == dtype
        assert zero_point.dtype == torch.uint8
        assert bool((scale.float().log2() % 1 == 0).all())
        # The largest value lies in the last octave of codes, or rounds to the first beyond it.
        covered = high.float() / scale.float() / 2.0**six_bits.mx_offset
        assert bool(((covered >= 0.875) & (covered < 2)).all())
        low_again, high_again = range_of_qparams(scale, None, MXFP6)
        assert torch.equal(qparams_of_range(low_again, high_again, MXFP6)[0].to(dtype), scale)

    def test_mx_scale_of_e2m3(self) -> None:
        """2 ** -2 of the largest value's power of two, rounded up from 15.5 / 16 of the next."""
        sizes = torch.tensor([4.0, 7.5, 7.74, 7.76, 8.0, 0.0, torch.inf])
        assert E2M3.mx_scale(sizes).tolist() == [1, 1, 1, 2, 2, 2.0**-127, torch.inf]

    @pytest.mark.parametrize("name", ["memoryless_minmax", "memoryless_mse", "mse", "optimal"])
    def test_observers(self, six_bits: FloatFormat, name: str) -> None:
        weight = torch.randn(8, 128)
        scale, zero_point = observe(name, weight, MXFP6)
        assert scale.shape == (8, 4)
        assert not bool(zero_point.any())
        assert error(weight, scale) <= 1.01 * error(weight, min_max_scale(weight))

    @pytest.mark.parametrize("engine", ["eager", "native"])
    def test_optimal_is_the_best_power_of_two(self, six_bits: FloatFormat, engine: str) -> None:
        weight = torch.randn(8, 128)
        views = group_values(weight, "weight", MXFP6)
        extremes = [min_max(view) for view in views]
        found = search_optimal_scales(views, extremes, MXFP6, engine=engine)[0][0]
        powers = [torch.full((8, 4), 2.0**power) for power in range(-8, 3)]
        errors = torch.stack([group_errors(weight, scale) for scale in powers])
        assert bool((found.log2() % 1 == 0).all())
        assert bool((group_errors(weight, found) <= errors.amin(0) * (1 + 1e-5)).all())

    def test_what_a_kernel_does_not_know_goes_to_the_reference(self, six_bits: FloatFormat) -> None:
        view = group_values(torch.randn(64, 256), "weight", MXFP6)[0]
        grid = ShrinkGrid(0.8, 40, 0, 2.4)
        found = [
            search_grid_ranges([view], [min_max(view)], MXFP6, grid, engine=engine)[0]
            for engine in ("eager", "native")
        ]
        if not has_plain_mx_scales(MXFP6):
            assert torch.equal(found[0][0], found[1][0])
        scales = [qparams_of_range(*each, MXFP6)[0] for each in found]
        assert torch.equal(*scales)

    @pytest.mark.parametrize("strategy", ["channel", "tensor"])
    @pytest.mark.parametrize("name", ["memoryless_mse", "optimal"])
    def test_scales_of_any_size(self, six_bits: FloatFormat, name: str, strategy: str) -> None:
        zp_dtype = torch.float8_e4m3fn
        args = QuantizationArgs(num_bits=6, type="float", strategy=strategy, zp_dtype=zp_dtype)
        scale, _ = observe(name, torch.randn(8, 128), args)
        assert bool((scale > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("strategy", ["group", "tensor_group", "channel"])
@pytest.mark.parametrize("num_bits", [4, 6, 8])
def test_as_the_library_does_it(
    num_bits: int, strategy: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands in for a library that does not know a format, where it knows it."""
    options = {"group": MXFP6, "tensor_group": NVFP4_ARGS, "channel": CHANNEL}[strategy]
    args = options.model_copy(update={"num_bits": num_bits})
    if not is_known_to_library(args):
        pytest.skip("the installed compressed-tensors does not know the format")
    global_scale = torch.tensor([300.0]) if strategy == "tensor_group" else None
    high = torch.cat([torch.logspace(-44, 38, 2000), torch.linspace(1, 8, 2001), torch.zeros(1)])
    high = high[high <= torch.finfo(dtype).max / 4].to(dtype)
    # Denormal numbers of a dtype are powers of two to the library in a way of their own.
    high = high[(high == 0) | (high >= torch.finfo(dtype).smallest_normal)]
    values = torch.randn(len(high)) * high.float()
    found = []
    for known in (True, False):
        monkeypatch.setattr(qparams, "is_known_to_library", lambda args, known=known: known)
        scale, zero_point = qparams_of_range(-high, high / 2, args, global_scale)
        rounded = fake_quantized(values, scale.float(), zero_point, args, global_scale)
        found.append((scale, zero_point, rounded))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.float().nan_to_num(), theirs.float().nan_to_num())


def observe(name: str, weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    options = {"objective": "mse"} if name == "optimal" else {}
    observer = Observer.load_from_registry(name, base_name="weight", args=args, **options)
    scale, zero_point = observer(weight)
    return scale, zero_point


def min_max_scale(weight: Tensor) -> Tensor:
    return observe("memoryless_minmax", weight, MXFP6)[0]


def group_errors(weight: Tensor, scale: Tensor) -> Tensor:
    values = weight.view(*scale.shape, -1)
    zero_point = torch.zeros_like(scale, dtype=torch.uint8).unsqueeze(-1)
    return (
        (fake_quantized(values, scale.unsqueeze(-1), zero_point, MXFP6) - values).square().sum(-1)
    )


def error(weight: Tensor, scale: Tensor) -> float:
    return float(group_errors(weight, scale).sum())
