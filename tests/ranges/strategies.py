"""Random quantization arguments and values for the differential tests."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor


def modest(max_examples: int) -> settings:
    """No deadline: the machine may be busy. No database: runs do not depend on earlier ones."""
    return settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NVFP4: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "scale_dtype": torch.float8_e4m3fn,
    "zp_dtype": torch.float8_e4m3fn,
    "strategy": "tensor_group",
    "group_size": 16,
}
MX: dict[str, Any] = {
    "type": "float",
    "scale_dtype": torch.uint8,
    "zp_dtype": torch.uint8,
    "strategy": "group",
    "group_size": 32,
}


@st.composite
def formats(draw: st.DrawFn) -> dict[str, Any]:
    """Number formats that go with any strategy."""
    kind = draw(st.sampled_from(["int", "int", "int", "fp8", "fp4"]))
    if kind == "int":
        return {"num_bits": draw(st.integers(2, 8)), "symmetric": draw(st.booleans())}
    if kind == "fp8":
        return {"num_bits": 8, "type": "float"}
    return {"num_bits": 4, "type": "float"}


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    strategy = draw(st.sampled_from(["tensor", "channel", "group", "group", "block"]))
    if strategy == "group":
        return {"strategy": strategy, "group_size": draw(st.integers(1, 20))}
    if strategy == "block":
        return {
            "strategy": strategy,
            "block_structure": [draw(st.integers(1, 6)), draw(st.integers(1, 12))],
        }
    return {"strategy": strategy}


@st.composite
def arguments(draw: st.DrawFn) -> QuantizationArgs:
    """Formats and strategies of weights, NVFP4 and MX included."""
    kind = draw(st.sampled_from(["plain", "plain", "plain", "plain", "nvfp4", "mx"]))
    if kind == "nvfp4":
        return QuantizationArgs(**NVFP4)
    if kind == "mx":
        return QuantizationArgs(**MX, num_bits=draw(st.sampled_from([4, 8])))
    return QuantizationArgs(**draw(formats()), **draw(layouts()))


@st.composite
def weights(draw: st.DrawFn, *, rows: int = 6, cols: int = 70) -> Tensor:
    """Weights whose groups differ in size and offset, of any floating dtype."""
    shape = draw(st.integers(1, rows)), draw(st.integers(1, cols))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    value = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "offset", "lattice", "sparse"]))
    if kind == "heavy":
        value = value**3
    elif kind == "offset":
        value += draw(st.sampled_from([-4.0, 1.0, 30.0]))
    elif kind == "lattice":  # many equal values, and equal errors of different steps
        value = (value * 2).round()
    elif kind == "sparse":
        value = torch.where(torch.rand(shape, generator=generator) < 0.7, 0.0, value)
    value = value * 2.0 ** draw(st.integers(-7, 4))
    return value.to(draw(st.sampled_from(DTYPES)))


@st.composite
def group_indices(draw: st.DrawFn, cols: int, group_size: int) -> Tensor | None:
    """Groups of columns in any order, sometimes of unequal sizes; None for none."""
    kind = draw(st.sampled_from(["none", "permuted", "unequal"]))
    if kind == "none":
        return None
    groups = -(-cols // group_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    columns = torch.arange(cols) // group_size
    if kind == "unequal":
        columns = torch.cat(
            [torch.arange(groups), torch.randint(0, groups, (cols - groups,), generator=generator)]
        )
    return columns[torch.randperm(cols, generator=generator)].int()
