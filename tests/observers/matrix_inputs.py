"""What observers are given in the bad-input matrix: each row is made of ordinary values."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from observers.samples import NVFP4, sample


@dataclass(frozen=True)
class Layout:
    """A strategy for a kind of value, and the shape of its ordinary values."""

    name: str
    base_name: str
    shape: tuple[int, ...]
    #: Values that the native engine takes minimum and maximum of.
    large: tuple[int, ...]
    options: Mapping[str, Any] = field(compare=False)
    group_size: int = 16

    @property
    def is_weight(self) -> bool:
        return self.base_name == "weight"

    def value(self, *, large: bool = False) -> Tensor:
        return sample(self.large if large else self.shape, 1)


_WEIGHT, _LARGE_WEIGHT = (6, 64), (72, 256)
_INPUT, _LARGE_INPUT = (2, 5, 64), (4, 18, 256)
_STATE, _LARGE_STATE = (2, 3, 5, 16), (4, 3, 24, 64)
_GROUP = {"strategy": "group", "group_size": 16}
_MX_GROUP = {"strategy": "group", "group_size": 32}

LAYOUTS = [
    Layout("tensor", "weight", _WEIGHT, _LARGE_WEIGHT, {"strategy": "tensor"}),
    Layout("channel", "weight", _WEIGHT, _LARGE_WEIGHT, {"strategy": "channel"}),
    Layout("group", "weight", _WEIGHT, _LARGE_WEIGHT, _GROUP),
    Layout(
        "block",
        "weight",
        _WEIGHT,
        _LARGE_WEIGHT,
        {"strategy": "block", "block_structure": [4, 24]},
    ),
    Layout("tensor-input", "input", _INPUT, _LARGE_INPUT, {"strategy": "tensor"}),
    Layout("group-input", "input", _INPUT, _LARGE_INPUT, _GROUP),
    Layout("token", "output", _INPUT, _LARGE_INPUT, {"strategy": "token", "dynamic": True}),
    Layout("attn_head", "k", _STATE, _LARGE_STATE, {"strategy": "attn_head"}),
    Layout("tensor-state", "q", _STATE, _LARGE_STATE, {"strategy": "tensor"}),
]
_BY_NAME = {layout.name: layout for layout in LAYOUTS}

FORMATS: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8},
    "int8-asymmetric": {"num_bits": 8, "symmetric": False},
    "int4": {"num_bits": 4},
    "int4-asymmetric": {"num_bits": 4, "symmetric": False},
    "int3": {"num_bits": 3},
    "fp8": {"num_bits": 8, "type": "float"},
    "nvfp4": {**NVFP4},
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "scale_dtype": torch.uint8,
        "zp_dtype": torch.uint8,
        **_MX_GROUP,
    },
}


def combinations() -> list[tuple[Layout, str]]:
    """Layouts and formats that go together: NVFP4 and MX have strategies of their own."""
    found = [
        (layout, name)
        for layout in LAYOUTS
        for name, options in FORMATS.items()
        if "strategy" not in options
    ]
    for like in ("group", "group-input"):
        for name in ("nvfp4", "mxfp4"):
            base = _BY_NAME[like]
            size = FORMATS[name]["group_size"]
            found.append((replace(base, options={}, group_size=size), name))
    return found


def arguments(layout: Layout, name: str) -> QuantizationArgs:
    return QuantizationArgs(**{**layout.options, **FORMATS[name]})


@dataclass(frozen=True)
class Given:
    """What an observer is given, and what must come of it.

    Args:
        value: What is observed.
        counted: The values that count: the value itself, unless tokens are masked or batches come.
        before: A batch before it.
        g_idx: Group of each column.
        mask: Which tokens count.
        refused: The error's message; None where it must work.
    """

    value: Any
    counted: Tensor | None = None
    before: Tensor | None = None
    g_idx: Tensor | None = None
    mask: Any = None
    refused: str | None = None


#: Makes of ordinary float32 values, and of the layout that they are in, what is given; None where
#: it means nothing there.
Make = Callable[[Tensor, Layout], "Given | Tensor | None"]
INPUTS: dict[str, Make] = {}
#: What only minimum and maximum are tried on, and in large: it differs in memory alone.
IN_LARGE: list[str] = []


def row(make: Make) -> Make:
    INPUTS[make.__name__] = make
    return make


def simple(**rows: Callable[[Tensor], Any]) -> None:
    """Rows that need to know the values alone."""
    for name, make in rows.items():
        INPUTS[name] = lambda x, _, make=make: make(x)


def put(x: Tensor, **kinds: float) -> Tensor:
    """The values with others in a few places."""
    x = x.clone()
    flat = x.view(-1)
    for start, kind in enumerate(kinds.values()):
        flat[3 + 5 * start :: 29] = kind
    return x


def one(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[7] = value
    return x


# -- nothing, or nothing that counts ------------------------------------------------------------

simple(
    plain=lambda x: x,
    empty=lambda x: x[:0],
    without_columns=lambda x: x[..., :0],
    zeros=torch.zeros_like,
    negative_zeros=lambda x: -torch.zeros_like(x),
    zero_row=lambda x: torch.cat([torch.zeros_like(x[:1]), x[1:]]),
    zero_columns=lambda x: torch.cat([torch.zeros_like(x[..., :16]), x[..., 16:]], -1),
)

# -- NaN and Inf --------------------------------------------------------------------------------

simple(
    nan=lambda x: put(x, nan=torch.nan),
    inf=lambda x: put(x, inf=torch.inf),
    minus_inf=lambda x: put(x, inf=-torch.inf),
    nan_and_inf=lambda x: put(x, a=torch.nan, b=torch.inf, c=-torch.inf),
    nan_and_inf_bfloat16=lambda x: put(x, a=torch.nan, b=torch.inf, c=-torch.inf).bfloat16(),
    nan_and_inf_half=lambda x: put(x, a=torch.nan, b=torch.inf, c=-torch.inf).half(),
    nan_and_inf_double=lambda x: put(x, a=torch.nan, b=torch.inf, c=-torch.inf).double(),
    nan_columns=lambda x: torch.cat([x[..., ::2] * torch.nan, x[..., x.shape[-1] // 2 :]], -1),
    nan_but_one=lambda x: one(torch.full_like(x, torch.nan), -0.7),
    all_nan=lambda x: Given(torch.full_like(x, torch.nan), refused="NaN"),
    all_inf=lambda x: Given(torch.full_like(x, torch.inf), refused="NaN"),
    all_inf_of_both_signs=lambda x: Given(x.sign() * torch.inf, refused="NaN"),
)

# -- few different values -----------------------------------------------------------------------

simple(
    constant=lambda x: torch.full_like(x, 1.3),
    negative_constant=lambda x: torch.full_like(x, -0.07),
    two_valued=lambda x: torch.where(x > 0.3, 1.3, -0.7),
    three_valued=lambda x: (x * 0.7).round().clamp(-1, 1) * 0.1,
    positive=lambda x: x.abs() + 0.01,
    negative=lambda x: -x.abs() - 3,
    outlier=lambda x: one(x, 1e4),
    single_element=lambda x: x.reshape(-1)[:1].reshape([1] * x.dim()),
    one_column=lambda x: x[..., :1],
)

# -- shapes -------------------------------------------------------------------------------------


def _needing(rank: int, x: Tensor) -> Given:
    """Refused where a strategy needs more dimensions."""
    return Given(x, refused="got " + re.escape(str(tuple(x.shape))) if x.dim() < rank else None)


def _rank(layout: Layout) -> int:
    if layout.base_name == "k":
        return 3
    strategy = layout.options.get("strategy", "group")
    if not layout.is_weight:
        return 0 if strategy == "tensor" else 1
    return {"tensor": 0, "channel": 1}.get(strategy, 2)


@row
def no_dimension(x: Tensor, layout: Layout) -> Given:
    return _needing(_rank(layout), x.reshape(-1)[3])


@row
def one_dimension(x: Tensor, layout: Layout) -> Given:
    return _needing(_rank(layout), x.reshape(-1)[:48])


@row
def more_dimensions(x: Tensor, layout: Layout) -> Tensor:
    return torch.stack([x, x * 2, x * -0.5])


@row
def ragged(x: Tensor, layout: Layout) -> Tensor:
    return x[..., :-7]


@row
def narrow(x: Tensor, layout: Layout) -> Tensor:
    return x[..., :5]


@row
def two_batches(x: Tensor, layout: Layout) -> Given:
    return Given(x * 0.5 + 0.1, before=x)


# -- places in memory ---------------------------------------------------------------------------


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x * 5], -1)[..., 0]


def _offset(x: Tensor) -> Tensor:
    return torch.cat([x, x * 5])[: len(x)]


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": _transposed,
    "strided": _strided,
    "flipped": lambda x: x.flip(0, -1),
    "offset": _offset,
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded_columns": lambda x: x[..., :1].expand_as(x),
}
simple(**MEMORY)
simple(
    strided_bfloat16=lambda x: _strided(x.bfloat16()),
    transposed_with_nan=lambda x: _transposed(put(x, nan=torch.nan)),
    requires_grad=lambda x: x.clone().requires_grad_() * 1,
    parameter=lambda x: nn.Parameter(x.clone()),
)
IN_LARGE += [*MEMORY, "plain", "bfloat16", "half", "nan_and_inf", "nan_and_inf_half", "ragged"]


@row
def inference_tensor(x: Tensor, layout: Layout) -> Tensor:
    with torch.inference_mode():
        return x.clone()


# -- dtypes -------------------------------------------------------------------------------------

simple(
    half=lambda x: x.half(),
    bfloat16=lambda x: x.bfloat16(),
    double=lambda x: x.double(),
    float8=lambda x: x.to(torch.float8_e4m3fn),
    uint8=lambda x: (x.abs() * 60).to(torch.uint8),
    int8=lambda x: (x * 30).to(torch.int8),
    int16=lambda x: (x * 8000).to(torch.int16),
    int32=lambda x: (x * 2e8).to(torch.int32),
    int64=lambda x: (x * 1e12).to(torch.int64),
    boolean=lambda x: x > 0,
    all_true=lambda x: torch.ones_like(x, dtype=torch.bool),
)

# -- sizes --------------------------------------------------------------------------------------


def scaled(x: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    x = x.double()
    return (x / x.abs().amax() * largest).to(dtype)


simple(
    huge_float=lambda x: scaled(x, 2e38, torch.float32),
    huge_bfloat16=lambda x: scaled(x, 2e38, torch.bfloat16),
    huge_half=lambda x: scaled(x, 4e4, torch.float16),
    huge_double=lambda x: scaled(x, 1e300, torch.float64),
    beyond_float=lambda x: scaled(x, 1e39, torch.float64),
    largest_float=lambda x: x.sign() * torch.finfo(torch.float32).max,
    largest_bfloat16=lambda x: x.bfloat16().sign() * torch.finfo(torch.bfloat16).max,
    largest_half=lambda x: x.half().sign() * torch.finfo(torch.float16).max,
    largest_double=lambda x: x.double().sign() * torch.finfo(torch.float64).max,
    huge_positive_float=lambda x: scaled(x, 3e38, torch.float32).abs(),
    huge_positive_half=lambda x: scaled(x, 6e4, torch.float16).abs(),
    one_huge_float=lambda x: one(x, 3e38),
    one_huge_half=lambda x: one(x.half(), -6e4),
    one_huge_double=lambda x: one(x.double(), 1e300),
    small_float=lambda x: scaled(x, 1e-30, torch.float32),
    small_double=lambda x: scaled(x, 1e-60, torch.float64),
    denormal_float=lambda x: scaled(x, 1e-40, torch.float32),
    denormal_bfloat16=lambda x: scaled(x, 2e-39, torch.bfloat16),
    denormal_half=lambda x: scaled(x, 3e-6, torch.float16),
    denormal_double=lambda x: scaled(x, 1e-310, torch.float64),
    smallest_float=lambda x: x.sign() * 2.0**-149,
)

# -- columns in groups --------------------------------------------------------------------------


@row
def g_idx_in_order(x: Tensor, layout: Layout) -> Given | None:
    return _with_g_idx(x, layout, lambda groups: groups)


@row
def g_idx_permuted(x: Tensor, layout: Layout) -> Given | None:
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(5))
    return _with_g_idx(x, layout, lambda groups: groups[order])


@row
def g_idx_permuted_int32_bfloat16(x: Tensor, layout: Layout) -> Given | None:
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(6))
    return _with_g_idx(x.bfloat16(), layout, lambda groups: groups[order].int())


@row
def g_idx_uneven(x: Tensor, layout: Layout) -> Given | None:
    def uneven(groups: Tensor) -> Tensor:
        groups = groups.clone()
        groups[groups.numel() // 2 - 3 : groups.numel() // 2] = 0
        return groups.flip(0)

    return _with_g_idx(x, layout, uneven)


@row
def g_idx_undecided(x: Tensor, layout: Layout) -> Given | None:
    given = _with_g_idx(x, layout, lambda groups: groups)
    if given is not None:
        given.g_idx[3] = -1
    return given


@row
def g_idx_of_too_many_groups(x: Tensor, layout: Layout) -> Given | None:
    return _with_g_idx(x, layout, lambda groups: torch.arange(groups.numel()), refused="g_idx")


@row
def g_idx_too_short(x: Tensor, layout: Layout) -> Given | None:
    return _with_g_idx(x, layout, lambda groups: groups[:-1], refused="g_idx")


def _with_g_idx(
    x: Tensor, layout: Layout, change: Callable[[Tensor], Tensor], refused: str | None = None
) -> Given | None:
    if not (layout.is_weight and layout.name == "group"):
        return None
    groups = torch.arange(x.shape[-1]) // layout.group_size
    return Given(x, g_idx=change(groups), refused=refused)


# -- masks --------------------------------------------------------------------------------------


def _tokens(x: Tensor, layout: Layout) -> tuple[int, int]:
    return (x.shape[0], x.shape[2]) if x.dim() == 4 else (x.shape[0], x.shape[1])


def _masked(x: Tensor, layout: Layout, mask: Tensor) -> Given | None:
    """NaN stands for what does not count: it is left out of the reference, as masked tokens are."""
    if layout.is_weight:
        return None
    keep = mask.bool().expand(_tokens(x, layout))
    keep = keep[:, None, :, None] if x.dim() == 4 else keep[..., None]
    return Given(x, counted=torch.where(keep, x, torch.nan), mask=mask)


@row
def mask(x: Tensor, layout: Layout) -> Given | None:
    batch, tokens = _tokens(x, layout) if not layout.is_weight else (1, 1)
    return _masked(x, layout, (torch.arange(batch * tokens) % 3 != 1).view(batch, tokens).long())


@row
def boolean_mask_of_one_sequence(x: Tensor, layout: Layout) -> Given | None:
    return _masked(x, layout, torch.arange(_tokens(x, layout)[1]) > 1)


@row
def mask_of_all(x: Tensor, layout: Layout) -> Given | None:
    return _masked(x, layout, torch.ones(_tokens(x, layout)))


@row
def masked_nan(x: Tensor, layout: Layout) -> Given | None:
    if layout.is_weight:
        return None
    x = x.clone()
    x.select(-2, 0).fill_(torch.nan)
    keep = torch.ones(_tokens(x, layout))
    keep[:, 0] = 0
    return _masked(x, layout, keep)


@row
def mask_of_another_shape(x: Tensor, layout: Layout) -> Given | None:
    if layout.is_weight:
        return None
    return Given(x, mask=torch.ones(3, 7), refused="mask")


@row
def additive_mask(x: Tensor, layout: Layout) -> Given | None:
    if layout.is_weight:
        return None
    return Given(x, mask=torch.zeros(_tokens(x, layout)) - 1e9, refused="mask")


@row
def mask_of_a_weight(x: Tensor, layout: Layout) -> Given | None:
    return Given(x, mask=torch.ones(len(x)), refused="mask") if layout.is_weight else None


# -- no tensors ---------------------------------------------------------------------------------

simple(
    none=lambda x: Given(None, refused="NoneType"),
    a_list=lambda x: Given([1.0, 2.0], refused="list"),
    meta=lambda x: Given(torch.empty_like(x, device="meta"), refused="meta"),
)

# -- odd tensors --------------------------------------------------------------------------------

#: Whether tensors of no plain memory are among the rows: a ValueError, or the values' own result.
ODD_TENSORS = True


def _quietly(make: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def made(x: Tensor) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about tensors in beta state
            return make(x)

    return made


def _nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x[0], x[0]])


def _quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


def _fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


_REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda x: x.to_sparse(), "dense"),
    "sparse_rows": (lambda x: x.flatten(0, -2).to_sparse_csr(), "dense"),
    "nested": (_nested, "nested"),
    "quantized": (_quantized, "quantized"),
    "complex": (lambda x: torch.complex(x, x), "complex"),
    "complex_conjugate": (lambda x: torch.complex(x, x).conj(), "complex"),
    "fake": (_fake, "FakeTensor"),
}


def _refused_row(make: Callable[[Tensor], Any], says: str) -> Make:
    return lambda x, _: Given(_quietly(make)(x), counted=x, refused=says)


if ODD_TENSORS:
    INPUTS.update({name: _refused_row(*each) for name, each in _REFUSED.items()})
    simple(
        negative_view=lambda x: Given(torch.conj(torch.complex(x, x)).imag, counted=-x),
        real_view=lambda x: torch.complex(x, x * 3).real,
        zero_tensor=lambda x: Given(
            torch._efficientzerotensor(x.shape), counted=torch.zeros_like(x)
        ),
    )


@functools.cache
def rows_of(layout: Layout, *, large: bool) -> tuple[tuple[str, Given], ...]:
    """The inputs that mean something in a layout, those in large too if they are asked for."""
    found = []
    for name, make in INPUTS.items():
        for size in ("", " large")[: 2 if large and name in IN_LARGE else 1]:
            given = make(layout.value(large=bool(size)), layout)
            if given is not None:
                given = given if isinstance(given, Given) else Given(given)
                found.append((name + size, given))
    return tuple(found)
