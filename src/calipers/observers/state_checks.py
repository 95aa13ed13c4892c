"""What a saved state of an observer must be: entry by entry, before any of it is taken over."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationStrategy
from torch import Tensor

from calipers.grouping import Grouping

if TYPE_CHECKING:
    from calipers.observers.base import Observer
    from calipers.observers.statistics import HoldsStatistics

__all__ = [
    "Problem",
    "check_dtype",
    "check_entries",
    "check_range",
    "check_scales",
    "check_sum",
    "count_in",
]

#: Name of an entry, and what is wrong with it.
Problem: TypeAlias = tuple[str, str]
State: TypeAlias = Mapping[str, Tensor]

#: Dimensions of the qparams of an activation or attention state, and of a weight at least.
_RANKS = {
    QuantizationStrategy.GROUP: (1, 2),
    QuantizationStrategy.TENSOR_GROUP: (1, 2),
    QuantizationStrategy.BLOCK: (1, 2),
    QuantizationStrategy.ATTN_HEAD: (3, 3),
}


def count_in(state: State, entry: str) -> int:
    """A count, 0 where there is none."""
    return int(state[entry]) if entry in state else 0


def check_entries(owner: HoldsStatistics, state: Mapping[str, Any]) -> Iterator[Problem]:
    """Kinds, counts, NaN, and shapes against what is held."""
    for entry, (part, name) in owner.entries().items():
        value, statistic = state.get(entry), part.statistics[name]
        if value is None:
            if statistic.initial is not None:
                yield entry, "is missing"
            continue
        if not isinstance(value, Tensor):
            yield entry, f"must be a tensor, got {type(value).__name__}"
        elif value.is_meta:
            yield entry, "is a meta tensor, which has no values"
        elif statistic.integer:
            if value.numel() != 1 or value.is_floating_point() or value.is_complex():
                yield entry, f"must be one integer, got {_kind(value)}"
            elif int(value) < 0:
                yield entry, f"must not be negative, got {int(value)}"
        elif value.is_complex():
            yield entry, f"must be real, got {_kind(value)}"
        elif bool(value.isnan().any()):
            yield entry, f"has {int(value.isnan().sum())} NaN"
        else:
            held = None if part._is_replaced(name) else getattr(part, name)
            if held is not None and held.shape != value.shape:
                shapes = f"has shape {tuple(value.shape)}, where {tuple(held.shape)} is held"
                yield entry, f"{shapes}; call reset() before loading another shape"


def check_dtype(state: State) -> Iterator[Problem]:
    """The empty tensor that tells the dtype of the values."""
    dtype = state.get("observed_dtype")
    if dtype is not None:
        if dtype.numel() or not dtype.is_floating_point():
            yield "observed_dtype", f"must be an empty tensor of floats, got {_kind(dtype)}"
    elif count_in(state, "num_batches") or count_in(state, "num_global_batches"):
        yield "observed_dtype", "is missing"


def check_range(
    observer: Observer, state: State, names: tuple[str, str], count: str
) -> Iterator[Problem]:
    """The minimum and maximum under two names, which must be there once something was seen."""
    low, high = yield from _find_pair(state, names, count)
    if low is None or high is None:
        return
    yield from _check_shape(observer, names[0], low, whole=names != observer.range_names)
    if low.shape != high.shape:
        return
    nothing = low.isposinf() & high.isneginf()  # the range of a group without a finite value
    if not bool((nothing | (low.isfinite() & high.isfinite())).all()):
        yield names[0], "and its maximum must be finite"
    elif not bool((nothing | (low <= high)).all()):
        yield names[0], f"is above {names[1]}"


def check_scales(
    observer: Observer, state: State, names: tuple[str, str], *, negative: bool = False
) -> Iterator[Problem]:
    """The scale and zero point under two names, which must be there once something was seen."""
    scale, zero_point = yield from _find_pair(state, names, "num_batches")
    if scale is None or zero_point is None:
        return
    entry = names[0].lstrip("_")
    yield from _check_shape(observer, entry, scale, whole=False)
    if not scale.is_floating_point():
        yield entry, f"must be floating, got {scale.dtype}"
    elif not bool(scale.isfinite().all()):
        yield entry, "must be finite"
    elif not bool(((scale != 0) if negative else (scale > 0)).all()):
        yield entry, "must not be zero" if negative else "must be positive"


def check_sum(
    state: State, entry: str, shape: tuple[int, ...] | None, *, needed: bool, negative: bool = False
) -> Iterator[Problem]:
    """A sum over values: there if `needed`, of a shape (if that is known), finite, >= 0."""
    value = state.get(entry)
    if value is None:
        if needed:
            yield entry, "is missing"
    elif shape is not None and tuple(value.shape) != shape:
        yield entry, f"must have shape {shape}, got {tuple(value.shape)}"
    elif not bool(value.isfinite().all()):
        yield entry, "must be finite"
    elif not negative and bool((value < 0).any()):
        yield entry, "must not be negative"


def _find_pair(
    state: State, names: tuple[str, str], count: str
) -> Generator[Problem, None, tuple[Tensor | None, Tensor | None]]:
    entries = [name.lstrip("_") for name in names]
    first, second = (state.get(entry) for entry in entries)
    needed = count_in(state, count) > 0 or first is not None or second is not None
    for entry, value in zip(entries, (first, second), strict=True):
        if needed and value is None:
            yield entry, "is missing"
    if first is None or second is None:
        return None, None
    if first.shape != second.shape:
        yield (
            entries[1],
            f"has shape {tuple(second.shape)}, and {entries[0]} has {tuple(first.shape)}",
        )
    return first, second


def _check_shape(
    observer: Observer, entry: str, value: Tensor, *, whole: bool
) -> Iterator[Problem]:
    """The shape of qparams, as far as the strategy and the module's weight tell it."""
    strategy = QuantizationStrategy(observer.args.strategy)
    shape = tuple(value.shape)
    expected = (1,) if whole or strategy == QuantizationStrategy.TENSOR else _of_module(observer)
    if expected is not None:
        if shape != expected:
            yield entry, f"must have shape {expected}, got {shape}"
        return
    if strategy in _RANKS:
        activation, weight = _RANKS[strategy]
        is_weight = observer._name_of_layout() == "weight"
        if not (len(shape) >= weight if is_weight else len(shape) == activation):
            yield entry, f"has {len(shape)} dimensions, which strategy {strategy.value!r} never has"
    elif shape[-1:] != (1,):
        yield entry, f"must end in a dimension of 1 under strategy {strategy.value!r}, got {shape}"


def _of_module(observer: Observer) -> tuple[int, ...] | None:
    """Shape of the qparams of the module's weight; None where that does not tell."""
    module = observer.module
    if observer.base_name != "weight" or module is None:
        return None
    with disable_onloading():
        weight = getattr(module, "weight", None)
        g_idx = getattr(module, "weight_g_idx", None)
    if not isinstance(weight, Tensor):
        return None
    try:
        return Grouping.of(weight.shape, "weight", observer.args, g_idx).qparam_shape
    except (ValueError, NotImplementedError):
        return None


def _kind(value: Tensor) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}"
