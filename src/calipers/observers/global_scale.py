"""The global scale of TENSOR_GROUP (NVFP4): what it follows from, and which one holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import QuantizationStrategy
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP8_E4M3_DATA
from torch import Tensor

from calipers.grouping import Grouping
from calipers.observers.sharded import gather, is_spread
from calipers.observers.statistics import whole_update
from calipers.observers.value_statistics import Observation, Range, ValueStatistics
from calipers.ranges.qparams import cast_range, checked_global_scale, global_scale_of_range

__all__ = ["GlobalScaleStatistics"]

#: Largest value times its global scale: the largest local scale in float8 times the largest code.
_GLOBAL_TOP = FP8_E4M3_DATA.max * FP4_E2M1_DATA.max


class GlobalScaleStatistics(ValueStatistics):
    """The range of a whole value, and the global scale that follows from it.

    A global scale is read from the module, unless one was given for the call.
    """

    #: Whether the global range follows from the extremes of a value; a subclass that measures it
    #: in another way is asked for the whole of a weight that is spread over ranks.
    global_by_extremes: ClassVar[bool] = True

    _given_global_scale: Tensor | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """As `HoldsStatistics`; who measures the global range anew need say how."""
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        if "global_by_extremes" not in own:
            anew = {"measure_global", "get_global_min_max", "_take_in_global"} & own.keys()
            cls.global_by_extremes = cls.global_by_extremes and not anew

    @property
    def global_scale(self) -> Tensor | None:
        """The global scale that the module holds for this value, shape (1,), float32."""
        scale: Tensor | None = getattr(self.module, f"{self.base_name}_global_scale", None)
        return scale

    @whole_update
    def observe_global(self, observed: Tensor, mask: Tensor | None = None) -> None:
        """Update the statistics behind the global scale (TENSOR_GROUP); see `observe`."""
        shard = self._shard_of(observed)
        if shard is not None and self.global_by_extremes and mask is None:
            self._take_in_global(self._look_at_shard(shard, whole=True))
            return
        if is_spread(observed) and self._name_of_layout() == "weight":
            observed = gather(observed, self.name, "its global range needs all of it")
        value = self._masked(self._as_value(observed), mask)
        if value.numel() == 0:
            return
        self._take_in_global(
            self._look_at(value, Grouping.whole(value.shape, self._name_of_layout()))
        )

    def _take_in_global(self, observation: Observation) -> None:
        """Update the global statistics by a value: its range, unless a subclass keeps more."""
        low, high = self.measure_global(observation)
        current = (low.reshape(1), high.reshape(1))
        self._remember(self.global_range_names, current, observation.value.dtype)

    def measure_global(self, observation: Observation) -> Range:
        """Minimum and maximum of all values, one element each, for the global scale."""
        if type(self).get_global_min_max is not GlobalScaleStatistics.get_global_min_max:
            return self.get_global_min_max(observation.views[0].canonical())
        return observation.extremes[0]

    @whole_update
    def get_global_min_max(self, observed: Tensor) -> Range:
        """Minimum and maximum of a whole value, `(num_observations, 1, group_size)`, shape (1,)."""
        self._take_in_global(self._look_at_canonical(observed))
        return self._range(self.global_range_names)

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

    def _global_scale_on(self, device: torch.device) -> Tensor | None:
        """The given or the module's global scale, shape (1,), float32, where the strategy has one.

        Raises:
            ValueError: It is not one positive finite number.
        """
        if self.args.strategy != QuantizationStrategy.TENSOR_GROUP:
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
