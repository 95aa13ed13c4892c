"""The observer of NVFP4 activations whose global scale has headroom, and is deaf to one freak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor

from calipers.observers.base import Observation, Observer, Range
from calipers.observers.min_max import StaticMinMaxObserver
from calipers.observers.options import ObserverOptions
from calipers.observers.state_checks import Problem, check_sum, count_in
from calipers.observers.statistics import SUM, Statistic
from calipers.ranges.block_maxima import NUM_BINS, count_block_maxima, largest_with_headroom

__all__ = ["HeadroomObserver", "HeadroomOptions"]


class HeadroomOptions(ObserverOptions):
    """Options of the headroom."""

    low: float = Field(
        1.0, ge=0, le=100, description="percentile of the block maxima that keeps a precise scale"
    )
    high: float = Field(
        99.99, ge=0, le=100, description="percentile of the block maxima that is not clipped"
    )
    headroom: float = Field(
        16384.0, ge=1, description="room above the block maximum at `low`, as a factor"
    )


@Observer.register("nvfp4_headroom")
class HeadroomObserver(StaticMinMaxObserver):
    """As static_minmax, with a global scale (NVFP4) by the sizes of blocks, not by one value.

    NVFP4 rounds the scale of each block to E4M3, relative to the global scale; that of an input is
    fixed while its blocks come and go. By minimum and maximum one freak value makes the scales of
    all other blocks denormal, or zero, and a value larger than any seen is clipped. Here the maxima
    of blocks are counted by size: the global scale leaves room for `headroom` times the block at
    the percentile `low`, and at least for the block at the percentile `high`. The rule is that of
    ModelOpt for the inputs of NVFP4.

    Counts add up: any order of batches and any split over observers that are merged gives the same.
    Under strategies without groups it is static_minmax.
    """

    Options = HeadroomOptions
    statistics: ClassVar[dict[str, Statistic]] = {"block_maxima": SUM}

    #: Blocks by the size of their largest value, shape (NUM_BINS,), int64.
    block_maxima: Tensor | None

    def check_state(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        """As `Observer.check_state`; block maxima must be counted where values were."""
        yield from super().check_state(state)
        needed = self.args.group_size is not None and count_in(state, "num_global_batches") > 0
        yield from check_sum(state, "block_maxima", (NUM_BINS,), needed=needed)

    def _take_in_global(self, observation: Observation) -> None:
        super()._take_in_global(observation)
        if self.args.group_size is not None:
            found = count_block_maxima(observation.value, self.args.group_size)
            past = self.block_maxima
            self.block_maxima = found if past is None else found + past.to(found.device)

    def _range(self, names: tuple[str, str]) -> Range:
        low, high = super()._range(names)
        if names != self.global_range_names or self.block_maxima is None:
            return low, high
        options = cast(HeadroomOptions, self.options)
        largest = largest_with_headroom(
            self.block_maxima.to(low.device),
            low.abs().maximum(high.abs()),
            low=options.low,
            high=options.high,
            headroom=options.headroom,
        )
        return -largest, largest
