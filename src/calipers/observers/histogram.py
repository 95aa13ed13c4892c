"""The observer of static activations that pools all values in a histogram."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import ClassVar, Literal, cast

import torch
from compressed_tensors.quantization import QuantizationStrategy
from pydantic import Field
from torch import Tensor

from calipers.observers.base import Observation, Observer, Range
from calipers.observers.options import ObserverOptions
from calipers.observers.state_checks import Problem, check_sum, count_in
from calipers.observers.statistics import MAX, MIN, SUM, Statistic
from calipers.ranges import (
    Histogram,
    count_patterns,
    percentile_range,
    search_histogram_range,
)
from calipers.ranges.histogram import NUM_PATTERNS

__all__ = ["HistogramObserver"]

#: Counts of one scale take 512 KiB (1 MiB for float32), so this many take 256 MiB (512).
MOST_SCALES = 512


class HistogramOptions(ObserverOptions):
    """Options of the histogram."""

    percentile: float = Field(
        99.99, gt=0, le=100, description="percent of the values that method 'percentile' keeps"
    )
    method: Literal["mse", "percentile", "minmax"] = Field(
        "mse", description="what the range is derived by: mse, percentile or minmax"
    )


@Observer.register("histogram")
class HistogramObserver(Observer):
    """Range with the smallest squared error over all values seen, pooled in a histogram.

    Made for static activations. Values are counted by their bit pattern (bfloat16 and float16; for
    float32 by the upper half of it, with the mean of each bin, see `calipers.ranges.Histogram`), in
    512 KiB a scale (1 MiB for float32) however much data comes. Counts add up: any order of batches
    and any split over observers that are merged gives the same scales. The range is searched once,
    when scales are derived, over the patterns that occurred.

    Any strategy works that gives at most 512 scales: tensor, attn_head, and group for activations;
    small weights as well. For TENSOR_GROUP the global scale is that of the extremes.

    Options:
        method: "mse" (squared error), "percentile" (the size that `percentile` percent of the
            values do not exceed), or "minmax" (the extremes).

    Raises:
        ValueError: More scales than that, or values of a dtype with other patterns than before
            (bfloat16 after float16, say): they cannot be counted together.
    """

    Options = HistogramOptions
    statistics: ClassVar[dict[str, Statistic]] = {
        "min_vals": MIN,
        "max_vals": MAX,
        "global_min_vals": MIN,
        "global_max_vals": MAX,
        "counts": SUM,
        "offsets": SUM,
    }

    #: Values by pattern, shape (*qparam_shape, 65536), int64.
    counts: Tensor | None
    #: For float32, sum of the lower halves of the patterns; same shape, int64.
    offsets: Tensor | None

    def measure(self, observation: Observation) -> list[Range]:
        """The best range for each view of this value alone."""
        self._need_few_scales(sum(prod(view.qparam_shape) for view in observation.views))
        return [
            self._search(count_patterns(view), *extremes, observation.value.dtype)
            for view, extremes in zip(observation.views, observation.extremes, strict=True)
        ]

    def measure_global(self, observation: Observation) -> Range:
        """The extremes of the whole value."""
        return observation.extremes[0]

    def merge(self, other: Observer) -> None:
        """Add what another histogram counted; see `Observer.merge`.

        Raises:
            ValueError: As there, or a dtype whose patterns mean something else.
        """
        theirs = getattr(other, "_observed_dtype", None)
        if isinstance(other, HistogramObserver) and other.counts is not None:
            assert theirs is not None
            self._need_same_patterns(theirs.dtype)
        super().merge(other)

    def check_state(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        """As `Observer.check_state`; counts must fit the range and the dtype of the values."""
        yield from super().check_state(state)
        low, dtype = state.get(self.range_names[0]), state.get("observed_dtype")
        shape = None if low is None else (*low.shape, NUM_PATTERNS)
        seen = count_in(state, "num_batches") > 0
        with_offsets = dtype is not None and Histogram.dtype_for(dtype.dtype) == torch.float32
        for name, needed in (("counts", seen), ("offsets", seen and with_offsets)):
            yield from check_sum(state, name, shape, needed=needed)
            value = state.get(name)
            if value is not None and value.dtype != torch.int64:
                yield name, f"must be int64, got {value.dtype}"
        if seen and not with_offsets and "offsets" in state:
            yield "offsets", "belongs to float32 values alone"

    def _take_in(self, observation: Observation) -> None:
        dtype, grouping = observation.value.dtype, observation.grouping
        self._need_same_patterns(dtype)
        self._need_few_scales(prod(grouping.qparam_shape))
        low, high = grouping.join(observation.extremes)
        histograms = [count_patterns(view) for view in observation.views]
        self._remember(self.range_names, (low, high), dtype)
        for name in ("counts", "offsets"):
            parts = [(getattr(histogram, name),) for histogram in histograms]
            if parts[0][0] is not None:
                (current,) = grouping.join(parts, (NUM_PATTERNS,))
                past = getattr(self, name)
                if past is not None and not self._is_replaced(name):
                    current += past.to(current.device)
                setattr(self, name, current)

    def _is_replaced(self, name: str) -> bool:
        by_token = self.args.strategy == QuantizationStrategy.TOKEN
        return super()._is_replaced(name) or (by_token and name in ("counts", "offsets"))

    def _range(self, names: tuple[str, str]) -> Range:
        low, high = super()._range(names)
        if names != self.range_names:
            return low, high
        assert self.counts is not None
        assert self._observed_dtype is not None
        dtype = self._observed_dtype.dtype
        histogram = Histogram(self.counts, self.offsets, Histogram.dtype_for(dtype))
        return self._search(histogram, low, high, dtype)

    def _search(self, histogram: Histogram, low: Tensor, high: Tensor, dtype: torch.dtype) -> Range:
        options = cast(HistogramOptions, self.options)
        if options.method == "minmax":
            return low, high
        if options.method == "percentile":
            return percentile_range(histogram, low, high, options.percentile)
        return search_histogram_range(
            histogram,
            low,
            high,
            self.args,
            dtype,
            global_scale=self._global_scale_on(low.device),
        )

    def _need_few_scales(self, scales: int) -> None:
        if scales > MOST_SCALES:
            raise ValueError(
                f"{self.name}: histogram keeps 65536 counts for each scale, for at most "
                f"{MOST_SCALES} scales; strategy {str(self.args.strategy)!r} gives {scales} here. "
                "Take another observer (for weights memoryless_mse or imatrix_mse)"
            )

    def _need_same_patterns(self, dtype: torch.dtype) -> None:
        if self.counts is None:
            return
        assert self._observed_dtype is not None
        self._check_dtypes("_observed_dtype", [self._observed_dtype.dtype, dtype])

    def _check_dtypes(self, name: str, dtypes: Sequence[torch.dtype]) -> None:
        past = dtypes[0]
        for dtype in dtypes:
            if name != "_observed_dtype" or Histogram.dtype_for(past) == Histogram.dtype_for(dtype):
                continue
            raise ValueError(
                f"{self.name}: values were {past} so far and are {dtype} now, whose bit patterns "
                "cannot be counted together; call reset() before observing another dtype"
            )
