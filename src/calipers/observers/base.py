"""The base of all observers: construction, dispatch by strategy, statistics, qparams."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from compressed_tensors import InternalModule
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP8_E4M3_DATA
from compressed_tensors.registry import RegistryMixin
from loguru import logger
from torch import Tensor
from torch.nn.parameter import is_lazy

from calipers._words import did_you_mean
from calipers.errors import UnknownObserverError
from calipers.grouping import ATTENTION_NAMES, Grouping, Groups
from calipers.observers.hooks import Seen, add_hook, remove_hooks
from calipers.observers.masks import blank_tokens, select_tokens
from calipers.observers.options import ObserverOptions, build_options
from calipers.observers.plugins import load_entry_points
from calipers.observers.state_checks import (
    Problem,
    check_dtype,
    check_range,
    check_scales,
)
from calipers.observers.statistics import (
    COUNT,
    LAST,
    TOKENS,
    HoldsStatistics,
    Statistic,
    read_values,
    whole_update,
)
from calipers.ranges import min_max, range_of_qparams
from calipers.ranges.qparams import (
    cast_range,
    checked_global_scale,
    global_scale_of_range,
    qparams_of_range,
    scale_dtype_problem,
)

__all__ = ["Observation", "Observer"]

Range = tuple[Tensor, Tensor]
QParams = tuple[Tensor | None, Tensor | None]

_TENSOR_GROUP = QuantizationStrategy.TENSOR_GROUP
_TOKEN = QuantizationStrategy.TOKEN
#: Largest value times its global scale: the largest local scale in float8 times the largest code.
_GLOBAL_TOP = FP8_E4M3_DATA.max * FP4_E2M1_DATA.max
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
    """

    value: Tensor
    grouping: Grouping
    views: tuple[Groups, ...]
    extremes: list[Range]


class Observer(HoldsStatistics, InternalModule, RegistryMixin):
    """Watches values and answers with a scale and a zero point for `QuantizationArgs`.

    Both forms of construction work: `Observer(quantization_args)` (the base name is then "weight")
    and `Observer(base_name, args, module=None, **options)`.

    Observing and deriving are two acts: `observe` updates statistics, `get_qparams` derives scales
    from them at any time and any number of times; `forward` does one after the other.

    An update is done wholly or not at all: where a value is refused, statistics are what they were.
    Threads may share an observer: a lock of its own is held over each update. Statistics are
    replaced, never changed in place, and autocast has no influence.

    An observer of one's own overrides one of

    - `get_min_max(observed)`: minimum and maximum of values in the canonical layout
      `(num_observations, *qparam_shape, group_size)`, reduced over the first and last dimension;
    - `calculate_qparams(observed, reduce_dims, tensor_id)`: scale and zero point of a tensor, of
      size 1 along `reduce_dims`;
    - `measure(observation)`: as `get_min_max`, on views instead of on a tensor in canonical layout,
      which spares a copy for blocks and reordered columns.

    Args:
        base_name: weight, input, output, q, k or v (or, in the first form, the arguments).
        args: Quantization arguments. They are copied, never changed.
        module: Supplies `{base_name}_g_idx` and `{base_name}_global_scale`; held weakly.
        quantization_args: First form: the arguments, by keyword.
        **observer_kwargs: Options, merged over `args.observer_kwargs`.

    Raises:
        ValueError: Arguments missing or of the wrong type; an option that is unknown or invalid.
    """

    #: The options of this observer.
    Options: ClassVar[type[ObserverOptions]] = ObserverOptions
    #: Options of peers that have no meaning here: taken and ignored.
    ignored_options: ClassVar[frozenset[str]] = frozenset()
    #: Whether a weight observer wants to see the inputs of its module first.
    needs_data: ClassVar[bool] = False
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
    #: Statistics that hold the local and the global range.
    range_names: ClassVar[tuple[str, str]] = ("min_vals", "max_vals")
    global_range_names: ClassVar[tuple[str, str]] = ("global_min_vals", "global_max_vals")

    _first_form: ClassVar[bool] = False
    _changing = (*HoldsStatistics._changing, "_scale", "_zero_point", "_stale")
    _scale: Tensor | None
    _zero_point: Tensor | None
    #: Whether statistics have changed since the qparams were derived.
    _stale: bool
    _num_observed_tokens: int | None
    num_batches: int
    num_global_batches: int
    #: An empty tensor of the dtype of the values, so that it is saved like any statistic.
    _observed_dtype: Tensor | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """As `HoldsStatistics`; in the first form scales are remembered, too."""
        super().__init_subclass__(**kwargs)
        cls._first_form = cls.calculate_qparams is not Observer.calculate_qparams
        if cls._first_form:
            cls.statistics.update(_scale=LAST, _zero_point=LAST)

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

    # -- construction and identity -------------------------------------------------------------

    @classmethod
    def get_value_from_registry(cls, name: str) -> type[Observer]:
        """The observer class registered under `name`.

        Where none is, packages that offer observers (entry points of the group
        "calipers.observers") are imported first.

        Raises:
            UnknownObserverError: A ValueError that lists the registered names, and packages whose
                observers could not be imported.
        """
        try:
            found: type[Observer] = super().get_value_from_registry(name)
        except KeyError:
            failures = load_entry_points()
            try:
                return super().get_value_from_registry(name)  # type: ignore[no-any-return]
            except KeyError:
                pass
            names = (*cls.registered_names(), *cls.registered_aliases())
            known = sorted(n.replace("-", "_") for n in names)
            near = did_you_mean(str(name).lower().replace("-", "_"), known)
            raise UnknownObserverError(
                " ".join(
                    [
                        f"unknown observer {name!r}.{near} Registered: {', '.join(known)}.",
                        *(f"{each}." for each in failures),
                    ]
                )
            ) from None
        return found

    @classmethod
    def load_from_registry(cls, name: str, *args: Any, **kwargs: Any) -> Observer:
        """Build the observer registered under `name`, in either form of construction.

        Raises:
            UnknownObserverError: A ValueError that lists the registered names.
        """
        return cls.get_value_from_registry(name)(*args, **kwargs)

    @property
    def quantization_args(self) -> QuantizationArgs:
        """The same object as `args`."""
        return self.args

    @property
    def module(self) -> torch.nn.Module | None:
        """The observed module, while it lives."""
        return None if self._module_ref is None else self._module_ref()

    @property
    def global_scale(self) -> Tensor | None:
        """The global scale that the module holds for this value, shape (1,), float32."""
        scale: Tensor | None = getattr(self.module, f"{self.base_name}_global_scale", None)
        return scale

    def attach(self, module: torch.nn.Module) -> None:
        """Collect the inputs of `module` by a hook, where they are needed (`needs_data`).

        A second call counts nothing twice. An observer of one's own may set hooks of its own here:
        its inputs are left to it then.
        """
        self.detach(module)
        if self.needs_data:
            add_hook(module, "input", self._see_input)

    def detach(self, module: torch.nn.Module) -> None:
        """Stop collecting; what was collected stays."""
        remove_hooks(module, self)

    def _see_input(self, seen: Seen) -> None:
        self.observe_input(seen.value)

    def extra_repr(self) -> str:
        """Base name, strategy and format, for `print(module)`."""
        return f"{self.base_name}, {self.args.strategy}, {self.args.type}{self.args.num_bits}"

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle: all but the reference to the module."""
        return {**super().__getstate__(), "_module_ref": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Observer:
        """A copy that refers to the copy of the module, where that is copied too."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        module = self.module
        if module is not None:
            copied.__dict__["_module_ref"] = weakref.ref(memo.get(id(module), module))
        return copied

    # -- observing ---------------------------------------------------------------------------

    @whole_update
    def forward(
        self, observed: Tensor, g_idx: Tensor | None = None, mask: Tensor | None = None
    ) -> QParams:
        """Observe a value and derive qparams: `observe`, then `get_qparams`; counts tokens.

        Args:
            observed: The value.
            g_idx: Group of each column, shape (cols,); None takes the module's.
            mask: Which tokens of an activation count; see `observe`.

        Returns:
            Scale and zero point; see `get_qparams`.
        """
        self.record_observed_tokens(observed, mask)
        return self.get_qparams(observed, g_idx, mask)

    @whole_update
    def observe(
        self, observed: Tensor, g_idx: Tensor | None = None, mask: Tensor | None = None
    ) -> None:
        """Update the statistics by a value; no scale is computed.

        Args:
            observed: The value, of a shape that the strategy takes. Integers and booleans are read
                as float32; NaN and Inf are left out, counted and warned about once. An empty
                tensor changes nothing.
            g_idx: Group of each column, shape (cols,); None takes the module's.
            mask: Which tokens of an activation count, shape (batch, tokens) or (tokens,), 1 where
                one counts; None counts all. Others enter no statistic; under strategy "token" they
                get the scale of zeros. A value without a token that counts changes nothing.

        Raises:
            ValueError: A shape that the strategy cannot take, a `g_idx` or a mask that does not
                fit, a mask for a weight, a meta tensor, or nothing but NaN and Inf. Nothing is
                changed then.
        """
        value = self._masked(self._as_value(observed), mask)
        if value.numel() == 0:
            return
        if g_idx is None:
            g_idx = getattr(self.module, f"{self.base_name}_g_idx", None)
        if self._first_form:
            self._observe_first_form(value, g_idx)
            return
        self._take_in(self._look_at(value, self._group(value, g_idx)))

    @whole_update
    def observe_global(self, observed: Tensor, mask: Tensor | None = None) -> None:
        """Update the statistics behind the global scale (TENSOR_GROUP); see `observe`."""
        value = self._masked(self._as_value(observed), mask)
        if value.numel() == 0:
            return
        observation = self._look_at(value, Grouping.whole(value.shape, self._name_of_layout()))
        low, high = self.measure_global(observation)
        self._remember(self.global_range_names, (low.reshape(1), high.reshape(1)), value.dtype)

    def observe_input(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Take in a batch of the inputs of the module whose weight is observed.

        Observers with `needs_data` implement it; `attach` and integrations call it.

        Args:
            inputs: Shape (..., cols).
            mask: Which tokens count; see `observe`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not look at inputs")

    @whole_update
    def record_observed_tokens(self, observed: Tensor, mask: Tensor | None = None) -> None:
        """Count tokens: those of a 2-D `(tokens, features)` tensor; other ranks are not counted.

        Args:
            observed: The value.
            mask: Which of its tokens count; None counts all.

        Raises:
            ValueError: `observed` is no tensor.
        """
        if not isinstance(observed, Tensor):
            raise ValueError(f"{self.name}: expected a tensor, got {type(observed).__name__}")
        if is_lazy(observed):
            self._as_value(observed)  # says that it is not initialized
        if observed.dim() != 2:
            if not self._told_rank:
                self._told_rank = True
                logger.debug(
                    "{}: tokens are counted for (tokens, features), not for rank {}",
                    self.name,
                    observed.dim(),
                )
            return
        if mask is not None or observed.is_nested:
            observed = self._masked(self._as_value(observed), mask)
        if observed.numel():
            self._num_observed_tokens = (self._num_observed_tokens or 0) + observed.shape[0]

    def measure(self, observation: Observation) -> list[Range]:
        """Minimum and maximum for each view of a value, of its `qparam_shape`: this value alone.

        By default the canonical tensor of each view goes through `get_min_max`.
        """
        return [self.get_min_max(view.canonical()) for view in observation.views]

    def measure_global(self, observation: Observation) -> Range:
        """Minimum and maximum of all values, one element each, for the global scale."""
        if type(self).get_global_min_max is not Observer.get_global_min_max:
            return self.get_global_min_max(observation.views[0].canonical())
        return observation.extremes[0]

    @whole_update
    def get_min_max(self, observed: Tensor) -> Range:
        """Minimum and maximum of values in the canonical layout.

        Args:
            observed: `(num_observations, *qparam_shape, group_size)`.

        Returns:
            Each of `qparam_shape`. Observers with running statistics take the value in first.
        """
        if type(self).measure is Observer.measure:
            raise NotImplementedError(
                f"{type(self).__name__} must override calculate_qparams, get_min_max or measure"
            )
        observation = self._look_at_canonical(observed)
        self._take_in(observation)
        return self._range(self.range_names)

    @whole_update
    def get_global_min_max(self, observed: Tensor) -> Range:
        """Minimum and maximum of a whole value, `(num_observations, 1, group_size)`, shape (1,)."""
        observation = self._look_at_canonical(observed)
        self._remember(self.global_range_names, self.measure_global(observation), observed.dtype)
        return self._range(self.global_range_names)

    # -- deriving ----------------------------------------------------------------------------

    @whole_update
    def get_qparams(
        self,
        observed: Tensor | None = None,
        g_idx: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        global_scale: Tensor | None = None,
    ) -> QParams:
        """Scale and zero point.

        Args:
            observed: A value to observe first; None derives from what was observed so far.
            g_idx: Group of each column of `observed`.
            mask: Which tokens of `observed` count.
            global_scale: For TENSOR_GROUP, one positive number, shape (1,); None takes the
                module's. It holds for this call.

        Returns:
            `scale` in the dtype of the observed values (float32 for integers; what
            compressed-tensors makes of `args.scale_dtype`) and `zero_point` in `args.zp_dtype`,
            both on their device; `value ~ (code - zero_point) * scale`. `(None, None)` while
            nothing was observed.

        Raises:
            ValueError: TENSOR_GROUP without a global scale, given or on the module; one that is no
                positive number, or that another strategy has no use for; see also `observe`.
        """
        if global_scale is None:
            return self._get_qparams(observed, g_idx, mask)
        if self.args.strategy != _TENSOR_GROUP:
            strategy = QuantizationStrategy(self.args.strategy).value
            raise ValueError(
                f"{self.name}: global_scale: strategy '{strategy}' has none, 'tensor_group' has"
            )
        self.__dict__["_given_global_scale"] = global_scale
        try:
            self._stale = self._stale or self.has_statistics
            return self._get_qparams(observed, g_idx, mask)
        finally:
            self.__dict__["_given_global_scale"] = None

    def _get_qparams(
        self, observed: Tensor | None, g_idx: Tensor | None, mask: Tensor | None
    ) -> QParams:
        if observed is not None:
            if self.args.strategy == _TENSOR_GROUP:
                self._need_global_scale(torch.device("cpu"))
            self.observe(observed, g_idx, mask)
        if self._stale:
            if not self._first_form:
                self._derive()
            self._stale = False
            self.post_calculate_qparams()
        return self._scale, self._zero_point

    @whole_update
    def calculate_qparams(
        self,
        observed: Tensor,
        reduce_dims: tuple[int, ...] | None = None,
        tensor_id: Any = None,
    ) -> Range:
        """Scale and zero point of a tensor, of size 1 along `reduce_dims`: the first-form hook.

        The observers of this package answer for `observed` alone, without touching statistics.

        Args:
            observed: The value.
            reduce_dims: Dimensions that share one scale; None: all, with a result of shape (1,).
            tensor_id: Tells calls apart that belong to one value (groups of different size).

        Raises:
            NotImplementedError: The subclass overrides no hook at all.
        """
        if type(self).measure is Observer.measure and (
            type(self).get_min_max is Observer.get_min_max
        ):
            raise NotImplementedError(f"{type(self).__name__} must override calculate_qparams")
        value = self._as_value(observed)
        dims: tuple[int, ...] = (1,)
        if reduce_dims is None:
            value = value.reshape(1, -1)
        else:
            dims = tuple(sorted(d % value.dim() for d in reduce_dims))
        shape = tuple(1 if d in dims else s for d, s in enumerate(value.shape))
        if len(dims) == value.dim():
            value, dims = value.unsqueeze(0), tuple(d + 1 for d in dims)
        observation = self._look_at(value, Grouping.over(value.shape, dims))
        low, high = self.measure(observation)[0]
        scale, zero_point = self._to_qparams(low, high, value.dtype)
        if reduce_dims is None:
            return scale.reshape(1), zero_point.reshape(1)
        return scale.reshape(shape), zero_point.reshape(shape)

    def get_qparams_along_dim(
        self, observed: Tensor, dim: int | Iterable[int], tensor_id: Any = None
    ) -> Range:
        """`calculate_qparams` with all dimensions reduced but `dim`.

        Args:
            observed: The value.
            dim: The dimension, or dimensions, to keep; negative ones count from the end.
            tensor_id: Handed on.
        """
        kept = {d % observed.dim() for d in ([dim] if isinstance(dim, int) else dim)}
        reduce_dims = tuple(d for d in range(observed.dim()) if d not in kept)
        return self.calculate_qparams(observed, reduce_dims=reduce_dims, tensor_id=tensor_id)

    def post_calculate_qparams(self) -> None:
        """Hook, called once after each recalculation of the qparams."""

    @whole_update
    def get_global_scale(
        self, observed: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | None:
        """Global scale for NVFP4, float32, shape (1,).

        Args:
            observed: A value to observe first; None derives from what was observed so far.
            mask: Which tokens of `observed` count.

        Returns:
            The factor that brings the largest local scale to the top of float8 (448 * 6 / amax);
            local scales are stored multiplied by it. None while nothing was observed.
        """
        if observed is not None:
            self.observe_global(observed, mask)
        if not self.has_global_statistics:
            return None
        assert self._observed_dtype is not None
        low, high = self._range(self.global_range_names)
        dtype = self._observed_dtype.dtype
        return global_scale_of_range(cast_range(low, dtype), cast_range(high, dtype))

    def global_scale_errors(self, observed: Tensor, scales: Sequence[Tensor]) -> Tensor | None:
        """How well a value would be quantized with other global scales (NVFP4).

        Args:
            observed: Rows of a weight, shape (rows, cols).
            scales: Global scales, shape (1,) each.

        Returns:
            An error for each, shape (len(scales),), float64, that can be added to those of layers
            with the same inputs; None of an observer that has no opinion.
        """
        return None

    @whole_update
    def get_range(self) -> Range | None:
        """The minimum and maximum that the qparams follow from, of their shape.

        Returns:
            Both in the dtype of the observed values. Of an observer that finds scales
            (`calculate_qparams`) the float64 range that stands for them, see
            `calipers.ranges.range_of_qparams`. None while nothing was observed.
        """
        if not self.has_statistics:
            return None
        if self._first_form:
            assert self._scale is not None
            global_scale = self._global_scale_on(self._scale.device)
            return range_of_qparams(self._scale, self._zero_point, self.args, global_scale)
        assert self.observed_dtype is not None
        low, high = self._range(self.range_names)
        return cast_range(low, self.observed_dtype), cast_range(high, self.observed_dtype)

    # -- statistics --------------------------------------------------------------------------

    @property
    def observed_dtype(self) -> torch.dtype | None:
        """The dtype in which values were read last, that of the scales; None before any."""
        return None if self._observed_dtype is None else self._observed_dtype.dtype

    @property
    def has_statistics(self) -> bool:
        """Whether there is something to derive qparams from."""
        first = "_scale" if self._first_form else self.range_names[0]
        return getattr(self, first) is not None

    @property
    def has_global_statistics(self) -> bool:
        """Whether there is something to derive a global scale from."""
        return getattr(self, self.global_range_names[0]) is not None

    @property
    def has_global_values(self) -> bool:
        """Whether the global scale says something about values: not where all of them are zero.

        It is a stand-in then, as for values so small that no float32 brings them up to float8.
        """
        if not self.has_global_statistics:
            return False
        low, high = self._range(self.global_range_names)
        largest = torch.maximum(-low.float(), high.float()).amax()
        return bool((largest > 0) & (_GLOBAL_TOP / largest).isfinite())

    @property
    def has_data(self) -> bool:
        """Whether an observer that wants to see inputs (`needs_data`) has seen any; else True."""
        return True

    @whole_update
    def reset(self) -> None:
        """Forget the qparams and every statistic."""
        self._scale = None
        self._zero_point = None
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
        if self._first_form:
            yield from check_scales(self, state, ("_scale", "_zero_point"))
        else:
            yield from check_range(self, state, self.range_names, "num_batches")

    def merge(self, other: Observer) -> None:
        """Take in what another observer of the same kind has seen, as if it had come afterwards.

        Exact for extremes, sums and counts: two halves merged equal one observer of all the data.
        Moving averages are weighed by the number of batches behind them, which is approximate,
        since the order of batches matters to them.

        Raises:
            ValueError: Another class, other quantization arguments, or statistics of another shape;
                nothing is changed then.
        """
        if type(other) is not type(self) or other.args != self.args:
            raise ValueError(
                f"{self.name}: cannot merge {type(other).__name__}({other.extra_repr()}) into "
                f"{type(self).__name__}({self.extra_repr()}): class and args must be the same"
            )
        self.merge_statistics(other)

    def _changed(self) -> None:
        self._stale = self.has_statistics

    def _take_in(self, observation: Observation) -> None:
        """Update the local statistics by a value: its range, unless a subclass keeps more."""
        low, high = observation.grouping.join(self.measure(observation))
        self._remember(self.range_names, (low, high), observation.value.dtype)

    def _remember(self, names: tuple[str, str], current: Range, dtype: torch.dtype) -> None:
        grown = {}
        for name, value in zip(names, current, strict=True):
            statistic, past = self.statistics[name], getattr(self, name)
            if statistic.float32 and value.dtype != torch.float64:
                value = value.float()
            if past is not None and not self._is_replaced(name):
                if past.shape != value.shape:
                    raise ValueError(
                        f"{self.name}: {name} has shape {tuple(past.shape)}, the observed value "
                        f"gives {tuple(value.shape)}; call reset() before observing another shape"
                    )
                constant = getattr(self.options, "averaging_constant", 1.0)
                value = statistic.grow(past.to(value.device), value, constant)
            grown[name] = value
        count = "num_batches" if names == self.range_names else "num_global_batches"
        # All at once, past the checks of nn.Module for parameters, which these are not.
        self.__dict__.update(
            grown,
            **{count: getattr(self, count) + 1},
            _observed_dtype=torch.empty(0, dtype=dtype, device="cpu"),
            _stale=self._stale or names == self.range_names,
        )

    def _is_replaced(self, name: str) -> bool:
        """Whether a new value takes the place of the old one, whatever its shape.

        The range of a token belongs to that token alone: there is nothing to carry over.
        """
        by_token = self.args.strategy == _TOKEN and name in self.range_names
        return by_token or self.statistics[name] is LAST

    def _range(self, names: tuple[str, str]) -> Range:
        return getattr(self, names[0]), getattr(self, names[1])

    # -- details -----------------------------------------------------------------------------

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
        extremes = [min_max(view) for view in views]
        # A range that is too wide for its dtype is looked at as well, and nothing comes of it.
        if not all(
            isfinite(float((high - low).sum(dtype=torch.float32))) for low, high in extremes
        ):
            self._count_nonfinite(value)
            views = tuple(view.finite() for view in views)
            extremes = [min_max(view) for view in views]
        return Observation(value, grouping, views, extremes)

    def _look_at_canonical(self, observed: Tensor) -> Observation:
        dims = (0, observed.dim() - 1)
        value = self._as_value(observed)
        return self._look_at(value, Grouping.over(value.shape, dims))

    def _global_scale_on(self, device: torch.device) -> Tensor | None:
        """The given or the module's global scale, shape (1,), float32, where the strategy has one.

        Raises:
            ValueError: It is not one positive finite number.
        """
        if self.args.strategy != _TENSOR_GROUP:
            return None
        scale = self._given_global_scale
        scale = self.global_scale if scale is None else scale
        if scale is None:
            return None
        try:
            return checked_global_scale(scale, device)
        except ValueError as error:
            raise ValueError(f"{self.name}_{error}") from error

    def _need_global_scale(self, device: torch.device) -> Tensor:
        scale = self._global_scale_on(device)
        if scale is None:
            raise ValueError(
                f"{self.name}: strategy 'tensor_group' needs {self.base_name}_global_scale on the "
                "module: compute it first with get_global_scale and set it there, or pass it as "
                "get_qparams(..., global_scale=)"
            )
        return scale

    def _derive(self) -> None:
        assert self._observed_dtype is not None
        low, high = self._range(self.range_names)
        scale, zero_point = self._to_qparams(low, high, self._observed_dtype.dtype)
        self.__dict__.update(_scale=scale, _zero_point=zero_point)  # as in _remember

    def _to_qparams(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Range:
        global_scale = None
        if self.args.strategy == _TENSOR_GROUP:
            global_scale = self._need_global_scale(low.device)
        return qparams_of_range(
            cast_range(low, dtype), cast_range(high, dtype), self.args, global_scale
        )

    def _observe_first_form(self, value: Tensor, g_idx: Tensor | None) -> None:
        """Scale and zero point by the subclass' `calculate_qparams`, view by view."""
        low, high = torch.aminmax(value)
        if not (low.isfinite() and high.isfinite()):
            self._count_nonfinite(value)
            value = torch.where(value.isfinite(), value, 0)
        grouping = self._group(value, g_idx)
        strategy = QuantizationStrategy(self.args.strategy)
        dim = value.dim()
        if strategy == QuantizationStrategy.TENSOR:
            parts = [self.calculate_qparams(value, reduce_dims=None)]
        elif strategy == QuantizationStrategy.CHANNEL:
            rows = value if dim > 1 else value.unsqueeze(-1)
            parts = [self.get_qparams_along_dim(rows, range(rows.dim() - 1))]
        elif strategy == _TOKEN:
            parts = [self.get_qparams_along_dim(value, range(dim - 1))]
        elif strategy == QuantizationStrategy.ATTN_HEAD:
            parts = [self.get_qparams_along_dim(value, -3)]
        else:
            parts = [
                self.calculate_qparams(view.gathered(), reduce_dims=view.reduce_dims, tensor_id=i)
                for i, view in enumerate(grouping.split(value))
            ]
        self._scale, self._zero_point = grouping.join(list(parts))
        self._observed_dtype = torch.empty(0, dtype=value.dtype, device="cpu")
        self.num_batches += 1
        self._stale = True
