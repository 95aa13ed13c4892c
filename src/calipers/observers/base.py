"""`Observer`, the base of all: it observes values and derives qparams, by what subclasses measure.

What it holds is in `value_statistics.py`, and for NVFP4's global scale in `global_scale.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import QuantizationStrategy
from loguru import logger
from torch import Tensor
from torch.nn.parameter import is_lazy

from calipers.grouping import Grouping
from calipers.observers.global_scale import GlobalScaleStatistics
from calipers.observers.hooks import Seen, add_hook, remove_hooks
from calipers.observers.plugins import ObserverRegistry
from calipers.observers.sharded import QParamLayout, Shard, gather, is_spread
from calipers.observers.state_checks import Problem, check_scales
from calipers.observers.statistics import LAST, whole_update
from calipers.observers.value_statistics import Observation, Range
from calipers.ranges import range_of_qparams
from calipers.ranges.qparams import cast_range, qparams_of_range

__all__ = ["Observation", "Observer", "Range"]

QParams = tuple[Tensor | None, Tensor | None]

_TENSOR_GROUP = QuantizationStrategy.TENSOR_GROUP


class Observer(GlobalScaleStatistics, ObserverRegistry):
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

    Example:
        >>> from compressed_tensors.quantization import QuantizationArgs
        >>> from calipers.observers import Observer
        >>> args = QuantizationArgs(num_bits=4, strategy="group", group_size=2)
        >>> observer = Observer.load_from_registry("memoryless_minmax", "weight", args)
        >>> scale, zero_point = observer(torch.tensor([[0.0, 7.5, -3.75, 1.0]]))
        >>> scale, zero_point
        (tensor([[1.0000, 0.5000]]), tensor([[0, 0]], dtype=torch.int8))
    """

    #: Whether a weight observer wants to see the inputs of its module first.
    needs_data: ClassVar[bool] = False
    #: Whether a range states the qparams, which `get_range` gives: no range gives negative scales.
    gives_range: ClassVar[bool] = True
    #: Whether the range of a value is that of its extremes.
    extremes_only: ClassVar[bool] = False
    #: Whether the first-form hook `calculate_qparams` is overridden, whose scales are remembered.
    _first_form: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """As `HoldsStatistics`; in the first form scales are remembered, too."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        if "extremes_only" not in own and {"measure", "get_min_max", "_take_in"} & own.keys():
            cls.extremes_only = False
        cls._first_form = cls.calculate_qparams is not Observer.calculate_qparams
        if cls._first_form:
            cls.range_names = ("_scale", "_zero_point")
            cls.statistics.update(dict.fromkeys(cls.range_names, LAST))

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
        if g_idx is None:
            g_idx = getattr(self.module, f"{self.base_name}_g_idx", None)
        columns = layout = None
        if is_spread(observed) and self._name_of_layout() == "weight":
            shard = self._shard_of(observed)
            problem = self._why_whole(shard, g_idx) if mask is None else "a mask is given"
            if shard is None or problem is not None:
                observed = gather(observed, self.name, problem or "of the way it is spread")
            else:
                columns, observed = shard.columns, shard.local
                layout = shard.layout()
                if shard.torn:
                    self._take_in(self._look_at_shard(shard))
                    self._layout = layout
                    return
        value = self._masked(self._as_value(observed), mask)
        self._layout = layout
        if value.numel() == 0:
            return
        if self._first_form:
            self._observe_first_form(value, g_idx)
            return
        observation = self._look_at(value, self._group(value, g_idx))
        if columns is not None:
            observation = replace(observation, columns=columns)
        self._take_in(observation)

    def _why_whole(self, shard: Shard | None, g_idx: Tensor | None) -> str | None:
        """Why a weight that is spread over ranks must be observed as a whole, if so."""
        if shard is None:
            return "of the way it is spread"
        cut = shard.local.dim() - 1 in shard.cuts
        if cut and g_idx is not None and bool((g_idx != -1).all()):
            return "g_idx takes columns of a group from several shards"
        if shard.torn and not self.extremes_only:
            return f"{type(self).__name__} measures whole groups, which lie in several shards"
        if self.args.strategy == _TENSOR_GROUP and not self.extremes_only:
            given = self.global_scale if self._given_global_scale is None else True
            return "it has no global scale yet" if given is None else None
        return None

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
            if self._uncounted is not None:
                self._settle_counts()
            if not self._first_form:
                self._derive()
            self._stale = False
            self.post_calculate_qparams()
        if self._layout is None:
            return self._scale, self._zero_point
        return self._spread_qparams(self._layout)

    def _spread_qparams(self, layout: QParamLayout) -> QParams:
        """Qparams of a weight that is spread over ranks; a rank without a value has none."""
        scale, zero_point = self._scale, self._zero_point
        if scale is None or zero_point is None:
            nothing = torch.empty(layout.local, dtype=layout.dtype, device=layout.mesh.device_type)
            scale, zero_point = nothing, nothing.to(self.args.zp_dtype)
            if not self._first_form:
                scale, zero_point = self._to_qparams(nothing, nothing, layout.dtype)
        return layout.spread(scale), layout.spread(zero_point)

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

    @property
    def has_data(self) -> bool:
        """Whether an observer that wants to see inputs (`needs_data`) has seen any; else True."""
        return True

    def _check_local(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        if self._first_form:
            return check_scales(self, state, self.range_names)
        return super()._check_local(state)

    def _take_in(self, observation: Observation) -> None:
        """Update the local statistics by a value: its range, unless a subclass keeps more."""
        low, high = observation.grouping.join(self.measure(observation))
        self._remember(self.range_names, (low, high), observation.value.dtype)

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
        """Scale and zero point by the subclass' `calculate_qparams`: one call for each view."""
        value = self._without_nonfinite(value)
        grouping = self._group(value, g_idx)
        strategy = QuantizationStrategy(self.args.strategy)
        if strategy == QuantizationStrategy.TENSOR:
            parts = [self.calculate_qparams(value, reduce_dims=None)]
        elif strategy == QuantizationStrategy.CHANNEL:
            rows = value if value.dim() > 1 else value.unsqueeze(-1)
            parts = [self.get_qparams_along_dim(rows, range(rows.dim() - 1))]
        else:
            parts = [
                self.calculate_qparams(view.gathered(), reduce_dims=view.reduce_dims, tensor_id=i)
                for i, view in enumerate(grouping.split(value))
            ]
        scale, zero_point = grouping.join(parts)
        self._remember(self.range_names, (scale, zero_point), value.dtype)
