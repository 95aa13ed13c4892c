"""What an observer remembers of a value: its arguments, its arrangement by scales, its ranges."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, ClassVar

import torch
from compressed_tensors import InternalModule
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from loguru import logger
from torch import Tensor

from calipers.grouping import ATTENTION_NAMES, Grouping, Groups
from calipers.observers.masks import blank_tokens, select_tokens
from calipers.observers.options import ObserverOptions, build_options
from calipers.observers.sharded import QParamLayout, Shard, is_spread, reduce_extremes
from calipers.observers.state_checks import Problem, check_dtype, check_range
from calipers.observers.statistics import (
    COUNT,
    LAST,
    TOKENS,
    HoldsStatistics,
    Statistic,
    read_values,
    whole_update,
)
from calipers.ranges import min_max
from calipers.ranges.qparams import scale_dtype_problem

__all__ = ["Observation", "Range", "ValueStatistics"]

Range = tuple[Tensor, Tensor]

_TOKEN = QuantizationStrategy.TOKEN
#: In the first form of construction no base name is given: these strategies tell by themselves
#: that the value is no weight.
_LAYOUT_OF_STRATEGY = {_TOKEN: "input", QuantizationStrategy.ATTN_HEAD: "q"}


@dataclass(frozen=True)
class Observation:
    """A value that an observer looks at, grouped by the scales it will get.

    Args:
        value: The values, floating, detached.
        grouping: Which values share a scale: it splits another tensor of the value's shape (the
            importance of the values) the same way.
        views: The groups of the value, which together hold every value once.
        extremes: For each view the minimum and maximum of its groups, of its `qparam_shape`; Inf
            and -Inf for a group of nothing but NaN and Inf.
        columns: Those of the whole weight that `value` has, where it is a shard; None for all.
    """

    value: Tensor
    grouping: Grouping
    views: tuple[Groups, ...]
    extremes: list[Range]
    columns: slice | None = None


class ValueStatistics(HoldsStatistics, InternalModule):
    """The half of `Observer` that holds: arguments, options, statistics of one value.

    It reads values, arranges them by the scales that they get, and lets statistics grow; what is
    measured of a value, and what qparams follow from it, is the business of `Observer`.
    """

    #: The options of this observer.
    Options: ClassVar[type[ObserverOptions]] = ObserverOptions
    #: Options of peers that have no meaning here: taken and ignored.
    ignored_options: ClassVar[frozenset[str]] = frozenset()
    #: What is remembered, by attribute name; a subclass names what it adds or changes.
    statistics: ClassVar[dict[str, Statistic]] = {
        "min_vals": LAST,
        "max_vals": LAST,
        "global_min_vals": LAST,
        "global_max_vals": LAST,
        "num_batches": COUNT,
        "num_global_batches": COUNT,
        "_num_observed_tokens": TOKENS,
        "_observed_dtype": LAST,
    }
    #: Statistics that hold the local range (or the scale and zero point, of observers that find
    #: those) and the global range.
    range_names: ClassVar[tuple[str, str]] = ("min_vals", "max_vals")
    global_range_names: ClassVar[tuple[str, str]] = ("global_min_vals", "global_max_vals")

    _changing = (*HoldsStatistics._changing, "_scale", "_zero_point", "_stale", "_layout")
    _scale: Tensor | None
    _zero_point: Tensor | None
    #: Whether statistics have changed since the qparams were derived.
    _stale: bool
    #: Where the qparams lie, of a weight that is spread over ranks.
    _layout: QParamLayout | None
    _num_observed_tokens: int | None
    num_batches: int
    num_global_batches: int
    #: An empty tensor of the dtype of the values, so that it is saved like any statistic.
    _observed_dtype: Tensor | None

    def __init__(
        self,
        base_name: str | QuantizationArgs | None = None,
        args: QuantizationArgs | None = None,
        module: torch.nn.Module | None = None,
        *,
        quantization_args: QuantizationArgs | None = None,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        self._begin()
        if isinstance(base_name, QuantizationArgs):
            base_name, quantization_args = None, base_name
        if (args is None) == (quantization_args is None):
            raise ValueError(
                f"{type(self).__name__}: expected QuantizationArgs once, as args or "
                f"quantization_args, got {'none' if args is None else 'both'}"
            )
        args = quantization_args if args is None else args
        if not isinstance(args, QuantizationArgs):
            raise ValueError(
                f"{type(self).__name__}: args must be QuantizationArgs, got {type(args).__name__}"
            )
        self._layout_name: str | None = base_name
        self.base_name: str = base_name or "weight"
        self.args: QuantizationArgs = args.model_copy(
            update={"observer_kwargs": {**(args.observer_kwargs or {}), **observer_kwargs}}
        )
        self.options = self._build_options()
        self._module_ref = None if module is None else weakref.ref(module)
        self._given_global_scale: Tensor | None = None
        kind = "value" if module is None else type(module).__name__
        #: What warnings and errors call the observed value.
        self.name: str = f"{kind}.{self.base_name}"
        #: Whether it was said that tokens of values of another rank than 2 are not counted.
        self._told_rank = False
        self.reset()

    def _build_options(self) -> ObserverOptions:
        options = dict(self.args.observer_kwargs)
        for name in self.ignored_options & options.keys():
            logger.debug("{}: option {!r} has no effect here", type(self).__name__, name)
            del options[name]
        return build_options(type(self).__name__, self.Options, options)

    @property
    def quantization_args(self) -> QuantizationArgs:
        """The same object as `args`."""
        return self.args

    @property
    def module(self) -> torch.nn.Module | None:
        """The observed module, while it lives."""
        return None if self._module_ref is None else self._module_ref()

    def extra_repr(self) -> str:
        """Base name, strategy and format, for `print(module)`."""
        return f"{self.base_name}, {self.args.strategy}, {self.args.type}{self.args.num_bits}"

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle: all but references to the module and to other processes."""
        return {**super().__getstate__(), "_module_ref": None, "_layout": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ValueStatistics:
        """A copy that refers to the copy of the module, where that is copied too."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        module = self.module
        if module is not None:
            copied.__dict__["_module_ref"] = weakref.ref(memo.get(id(module), module))
        return copied

    @property
    def observed_dtype(self) -> torch.dtype | None:
        """The dtype in which values were read last, that of the scales; None before any."""
        return None if self._observed_dtype is None else self._observed_dtype.dtype

    @property
    def has_statistics(self) -> bool:
        """Whether there is something to derive qparams from."""
        return getattr(self, self.range_names[0]) is not None

    @whole_update
    def reset(self) -> None:
        """Forget the qparams and every statistic."""
        self._scale = None
        self._zero_point = None
        self._layout = None
        super().reset()

    def check_state(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        """What is wrong with a state, entry by entry; `load_state` asks before it takes it over.

        A subclass with statistics of its own adds what it expects of them.

        Args:
            state: Its entries are known tensors of the right kind, without NaN; no count is
                missing or negative.

        Yields:
            Name of an entry, and what is wrong with it.
        """
        yield from check_dtype(state)
        yield from self._check_local(state)
        yield from check_range(self, state, self.global_range_names, "num_global_batches")

    def _check_local(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        yield from check_range(self, state, self.range_names, "num_batches")

    def merge(self, other: ValueStatistics) -> None:
        """Take in what another observer of the same kind has seen, as if it had come afterwards.

        Exact for extremes, sums and counts: two halves merged equal one observer of all the data.
        Moving averages are weighed by the number of batches behind them, which is approximate,
        since the order of batches matters to them.

        Raises:
            ValueError: Another class, other quantization arguments, or statistics of another shape;
                nothing is changed then.

        Example:
            >>> from calipers.observers import StaticMinMaxObserver
            >>> args = QuantizationArgs(num_bits=8, strategy="tensor")
            >>> first, second = (StaticMinMaxObserver("input", args) for _ in range(2))
            >>> first.observe(torch.tensor([[-1.0, 2.0]]))
            >>> second.observe(torch.tensor([[-3.0, 1.0]]))
            >>> first.merge(second)
            >>> first.get_range()
            (tensor([-3.]), tensor([2.]))
        """
        if type(other) is not type(self) or other.args != self.args:
            raise ValueError(
                f"{self.name}: cannot merge {type(other).__name__}({other.extra_repr()}) into "
                f"{type(self).__name__}({self.extra_repr()}): class and args must be the same"
            )
        self.merge_statistics(other)

    def _changed(self) -> None:
        self._stale = self.has_statistics

    def _remember(self, names: tuple[str, str], current: Range, dtype: torch.dtype) -> None:
        grown = {}
        for name, value in zip(names, current, strict=True):
            statistic, past = self.statistics[name], getattr(self, name)
            if statistic.reduce == "mean" and value.dtype != torch.float64:
                value = value.float()
            if past is not None and not self._is_replaced(name):
                if past.shape != value.shape:
                    raise ValueError(
                        f"{self.name}: {name} has shape {tuple(past.shape)}, the observed value "
                        f"gives {tuple(value.shape)}; call reset() before observing another shape"
                    )
                constant = 1.0
                if statistic.reduce == "mean":
                    constant = getattr(self.options, "averaging_constant", constant)
                value = statistic.grow(past.to(value.device), value, constant)
            grown[name] = value
        count = "num_batches" if names == self.range_names else "num_global_batches"
        if self._observed_dtype is None or self._observed_dtype.dtype != dtype:
            grown["_observed_dtype"] = torch.empty(0, dtype=dtype, device="cpu")
        # All at once, past the checks of nn.Module for parameters, which these are not.
        self.__dict__.update(
            grown,
            **{count: getattr(self, count) + 1},
            _stale=self._stale or names == self.range_names,
        )

    def _is_replaced(self, name: str) -> bool:
        """Whether a new value takes the place of the old one, whatever its shape.

        The range of a token belongs to that token alone: there is nothing to carry over.
        """
        by_token = self.args.strategy == _TOKEN and name in self.range_names
        return by_token or super()._is_replaced(name)

    def _range(self, names: tuple[str, str]) -> Range:
        return getattr(self, names[0]), getattr(self, names[1])

    def _name_of_layout(self) -> str:
        if self._layout_name is not None:
            return self._layout_name
        return _LAYOUT_OF_STRATEGY.get(QuantizationStrategy(self.args.strategy), "weight")

    def _group(self, value: Tensor, g_idx: Tensor | None) -> Grouping:
        try:
            return Grouping.of(value.shape, self._name_of_layout(), self.args, g_idx)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _as_value(self, observed: Tensor) -> Tensor:
        """A plain floating tensor that shares memory with `observed` where it can."""
        value = read_values(observed, self.name)
        problem = scale_dtype_problem(self.args, value.dtype)
        if problem is not None:
            raise ValueError(f"{self.name}: {problem}: leave scale_dtype out, or observe it in it")
        return value

    def _masked(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens of an activation that count; under strategy "token" zeros for the others."""
        if mask is None:
            return value
        layout = self._name_of_layout()
        tensor = self.args.strategy == QuantizationStrategy.TENSOR
        try:
            if layout == "weight" and not (tensor and self._layout_name is None):
                raise ValueError("mask: tells which tokens count, and a weight has none")
            if self.args.strategy == _TOKEN:
                return blank_tokens(value, mask)
            return select_tokens(value, mask, heads=layout in ATTENTION_NAMES)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def _look_at(self, value: Tensor, grouping: Grouping) -> Observation:
        """Take the extremes of a value; leave out and count what is not finite."""
        views = grouping.split(value)
        later = self._counts_on_device(value)
        finite = False
        if not later:
            extremes = [min_max(view) for view in views]
            finite = all(_are_finite(low, high) for low, high in extremes)
        if not finite:
            self._count_nonfinite(value, later=later)
            views = tuple(view.finite() for view in views)
            extremes = [min_max(view) for view in views]
        return Observation(value, grouping, views, extremes)

    def _shard_of(self, observed: Tensor) -> Shard | None:
        """This rank's shard of a weight that is spread over ranks; None of any other value."""
        if self._name_of_layout() != "weight" or not is_spread(observed):
            return None
        shard = Shard.of(observed, self.args)
        return None if shard is None else replace(shard, local=self._as_value(shard.local))

    def _look_at_shard(self, shard: Shard, *, whole: bool = False) -> Observation:
        """Take the extremes of a weight whose groups lie in several shards, which all take part.

        Args:
            shard: This rank's part.
            whole: Whether all of the weight is one group.
        """
        whole = whole or shard.one
        dtype, device = shard.local.dtype, shard.local.device
        shape = (1,) if whole else shard.layout().local
        low = torch.full(shape, torch.inf, dtype=dtype, device=device)
        high = -low
        count = 0
        for piece, place in shard.pieces():
            grouping = self._group(piece, None)
            if whole:
                grouping, place = Grouping.whole(tuple(piece.shape), "weight"), (slice(None),)
            views = grouping.split(piece)
            found = grouping.join([min_max(view) for view in views])
            if not all(bool(each.isfinite().all()) for each in found):
                count += piece.numel() - int(piece.isfinite().sum())
                found = grouping.join([min_max(view.finite()) for view in views])
            low[place] = torch.minimum(low[place], found[0].reshape(low[place].shape))
            high[place] = torch.maximum(high[place], found[1].reshape(high[place].shape))
        low, high = reduce_extremes(shard, low, high, tuple(shard.cuts) if whole else shard.torn)
        self._leave_out(count, shard.local.numel(), "NaN or Inf")
        if bool(low.isposinf().all()):
            raise ValueError(f"{self.name}: all observed values are NaN or Inf")
        return Observation(shard.local, Grouping.over(shape, ()), (), [(low, high)])

    def _look_at_canonical(self, observed: Tensor) -> Observation:
        dims = (0, observed.dim() - 1)
        value = self._as_value(observed)
        return self._look_at(value, Grouping.over(value.shape, dims))

    def _without_nonfinite(self, value: Tensor) -> Tensor:
        """The value with zeros in place of NaN and Inf, which are counted."""
        later = self._counts_on_device(value)
        if not later:
            low, high = torch.aminmax(value)
            if low.isfinite() and high.isfinite():
                return value
        self._count_nonfinite(value, later=later)
        return torch.where(value.isfinite(), value, 0)

    def _counts_on_device(self, value: Tensor) -> bool:
        """Whether NaN and Inf of a value are counted where it lies, until scales are derived.

        So it is for activations on an accelerator: reading a number back would hold up every layer
        of the model until the device has come that far.
        """
        return value.device.type != "cpu" and self._name_of_layout() != "weight"

    def _settle_counts(self) -> None:
        """Read counts that were left on a device.

        Raises:
            ValueError: Nothing but NaN and Inf was seen.
        """
        self._settle()
        if bool(getattr(self, self.range_names[0]).isposinf().all()):
            raise ValueError(f"{self.name}: all observed values are NaN or Inf")


def _are_finite(low: Tensor, high: Tensor) -> bool:
    """Whether all ranges are finite; where one overflows, all is counted, and nothing found."""
    if low.numel() == 1:
        return isfinite(float(low) - float(high))
    return isfinite(float((high - low).sum(dtype=torch.float32)))
