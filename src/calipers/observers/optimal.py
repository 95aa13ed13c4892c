"""`OptimalObserver`: the scale that minimises the error of the layer's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, fake_quantize
from compressed_tensors.quantization.quant_args import round_to_quantized_type_dtype
from pydantic import Field
from torch import Tensor

from calipers.errors import CalipersError, MissingDataError
from calipers.grouping import Groups
from calipers.observers.base import Observation, Observer, Range
from calipers.observers.input_moments import InputObserver
from calipers.observers.options import ObserverOptions
from calipers.observers.sharded import Shard
from calipers.observers.state_checks import Problem, check_scales, check_sum, count_in
from calipers.observers.statistics import LAST, Statistic, whole_update
from calipers.ranges import range_of_qparams, search_optimal_scales
from calipers.ranges.hessian import refine_by_hessian
from calipers.ranges.in_float32 import search_in_float32, times
from calipers.ranges.input_gram import ColumnGroups, column_groups, factor_of_sketch, rank_for
from calipers.ranges.least_squares import ScaleSpec
from calipers.ranges.qparams import cast_range, checked_global_scale, global_scale_of_range, widened

__all__ = ["OptimalObserver"]

#: Exponents of values whose errors' squares float32 holds; and how small units may be.
_ORDINARY, _LEAST = 40, 100

_GROUP, _TENSOR_GROUP = QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP

Objective = Literal["imatrix", "hessian", "mse"]

#: From so many bits on the default is "imatrix": what rounding adds to a model is small there.
_MANY_BITS = 8
#: For each of the columns that are taken together. SmolLM2-135M, int4 in groups of 64, errors of
#: the layers' outputs on other text: with 64 tokens 3% larger than by "imatrix", with 256 3% less.
_ENOUGH_TOKENS = 2


class OptimalOptions(ObserverOptions):
    """Options of the optimal scale."""

    former_names: ClassVar[Mapping[str, str]] = {"signed": "negative_scales"}

    negative_scales: bool = Field(
        False, description="allow negative scales: symmetric integers, kernels that take them"
    )
    objective: Literal["auto", Objective] = Field(
        "auto",
        description="what to minimise: error by inputs that go together (hessian), by the size of "
        "each (imatrix), or plain (mse); auto: hessian below 8 bits, else imatrix",
    )


@Observer.register("optimal")
class OptimalObserver(InputObserver):
    """The scale with the smallest error of the layer's output, in every format.

    The option `objective` says which error:

    - "auto", the default: "hessian" below 8 bits, unless what was seen of the inputs holds no
      products of them (of a statistics file, say), or fewer tokens than twice the columns that it
      takes together (fewer than that tell nothing of how inputs go together); else "imatrix";
    - "imatrix": squared error of a weight times E[x^2] of its input column;
    - "hessian": d'Hd for the errors d of a row's group, H the sum of x x' over the tokens x of
      its columns, plus what groups of a row add to each other's error, as far as a sketch of the
      whole sum of x x' tells (`calipers.ranges.input_gram`): groups are chosen one after the other,
      each with the others as they are. Half of group_size values are kept for each column, 128
      where groups are wider, and 256 for the strategies channel and tensor, whose rows are taken
      in blocks of 512 columns; and 32 more of the sketch;
    - "mse": squared error of the values alone, for activations and where there is no data. On
      weights it can make a model worse than minimum and maximum: use `memoryless_minmax` there.

    Integers and floats with a free scale: candidates over a window around the range, ranked by the
    error after projection (the best scale for given codes), then more of them about the best.
    NVFP4 and MX: all scale codes, short of those that two bounds exclude. In no group is the error
    (of "hessian" d'Hd) greater than that of minimum and maximum.

    With `negative_scales` a scale of symmetric integers may be negative, which gives the extra code
    of the range (-8 of -8..7) to the positive side. compressed-tensors and transformers run it, as
    do kernels that multiply by the scale in floating point (Marlin and other weight-only kernels of
    vLLM). Kernels that fold scales into integers (W4A8) or store them unsigned cannot.

    NVFP4's global scale is 448 * 6 / amax / 2, half of what the largest value needs: local scales
    of every group, also the one of the largest value, then have an octave of codes above them.
    `calibrate` takes the best of a few scales below the smallest of a fused layer's members, by the
    sum of their errors (`global_scale_errors`).
    """

    Options = OptimalOptions
    range_names = ("found_scale", "found_zero_point")
    global_by_extremes = True
    statistics: ClassVar[dict[str, Statistic]] = {
        "found_scale": LAST,
        "found_zero_point": LAST,
    }

    #: As stored, but float32 and with the global scale divided out.
    found_scale: Tensor | None
    found_zero_point: Tensor | None

    def __init__(
        self,
        base_name: str | QuantizationArgs | None = None,
        args: QuantizationArgs | None = None,
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_name, args, module, **kwargs)
        self.needs_data = self.objective != "mse"  # type: ignore[misc]  # of this one alone
        self.gives_range = not self.negative_scales  # type: ignore[misc]  # likewise
        if self.negative_scales and not (self.args.symmetric and self.args.type == "int"):
            raise CalipersError(
                f"{self.name}: negative_scales=True needs symmetric integers, got "
                f"{self.args.type}{self.args.num_bits}, symmetric={self.args.symmetric}"
            )

    @property
    def _asked(self) -> Literal["auto", Objective]:
        return cast(OptimalOptions, self.options).objective

    @property
    def objective(self) -> Objective:
        """The option `objective`, and what "auto" comes to with the inputs seen so far."""
        if self._asked != "auto":
            return self._asked
        if not self._sums_products:
            return "imatrix"
        sums = self.moments.input_square_sum
        if sums is None:
            return "hessian"
        enough = _ENOUGH_TOKENS * self._column_groups(sums.numel()).size
        return "hessian" if self.moments.num_input_tokens >= enough else "imatrix"

    @property
    def _sums_products(self) -> bool:
        """Whether the objective is "hessian", or is it once there are tokens enough."""
        if self._asked != "auto":
            return self._asked == "hessian"
        few_bits = (self.args.num_bits or _MANY_BITS) < _MANY_BITS
        return few_bits and not self.moments.lacks_products

    @property
    def can_lack_products(self) -> bool:
        """Where the option `objective` is "auto"."""
        return self._asked == "auto"

    @property
    def negative_scales(self) -> bool:
        """The option `negative_scales`."""
        return cast(OptimalOptions, self.options).negative_scales

    @property
    def has_data(self) -> bool:
        """Whether any token has been seen; True where none is wanted."""
        return self.objective == "mse" or super().has_data

    @property
    def wanted_products(self) -> Callable[[int], ColumnGroups] | None:
        """Those of the columns that share a scale, for "hessian"."""
        return self._column_groups if self._sums_products else None

    def by_importance(self) -> OptimalObserver:
        """One with the objective "imatrix" that reads the same sums over inputs."""
        options = {**(self.args.observer_kwargs or {}), "objective": "imatrix"}
        args = self.args.model_copy(update={"observer_kwargs": options})
        found = OptimalObserver(self.base_name, args, self.module)
        found.moments, found.name = self.moments, self.name
        return found

    def measure(self, observation: Observation) -> list[Range]:
        """Scale and zero point (in place of a range) of each view, float32."""
        found = search_optimal_scales(
            observation.views,
            observation.extremes,
            self.args,
            importance=self.importance(observation),
            global_scale=self._global_scale_for(observation),
            negative_scales=self.negative_scales,
            # Where groups are few there is little work to save.
            rough=self.objective == "hessian" and self.args.strategy == _GROUP,
        )
        return self._refine(observation, found) if self.objective == "hessian" else found

    def measure_global(self, observation: Observation) -> Range:
        """Twice the extremes of the whole value: an octave of scale codes above its own."""
        return widened(observation.extremes[0], 2)

    @whole_update
    def global_scale_errors(self, observed: Tensor, scales: Sequence[Tensor]) -> Tensor | None:
        """Squared errors with the best local scales, weighted as for "imatrix" unless by "mse"."""
        rows = self._as_value(observed)
        if self._module_g_idx() is not None:
            return None
        observation = self._look_at(rows, self._group(rows, None))
        importance = self.importance(observation)
        weights = 1 if importance is None else self.moments.mean_squares(rows)
        try:
            scales = [checked_global_scale(scale, rows.device) for scale in scales]
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        errors = []
        for scale in scales:
            found = search_optimal_scales(
                observation.views,
                observation.extremes,
                self.args,
                importance=importance,
                global_scale=scale,
            )
            local, zero_point = observation.grouping.join(found)
            rounded = fake_quantize(rows.float(), local * scale, zero_point, self.args, scale)
            square = (rounded - rows.float()).square() * weights
            errors.append(square.sum(dtype=torch.float64))
        return torch.stack(errors)

    def importance(self, observation: Observation) -> list[Groups] | None:
        """E[x^2] of each value's column; None for the objective "mse".

        Raises:
            MissingDataError: No input was seen, none that fits, or this is no weight.
        """
        if self.objective == "mse":
            return None
        problem = self._input_problem(observation)
        if problem is not None:
            raise MissingDataError(
                f"{self.name}: objective {self.objective!r} {problem}; run calibration data "
                "through it, or choose objective='mse' or the observer memoryless_minmax, which "
                "need none"
            )
        return list(observation.grouping.split(self.mean_squares(observation)))

    def _refine(self, observation: Observation, start: list[Range]) -> list[Range]:
        """By the objective "hessian"; of its diagonal the scales are the optimum already."""
        shape = observation.value.shape
        moments = self.moments
        assert moments.input_products is not None
        assert moments.input_square_sum is not None
        assert moments.input_sketch is not None
        columns = self._column_groups(shape[-1])
        device = observation.value.device
        size = moments.size()
        products = columns.products((moments.input_products / size).float().to(device))
        factors = factor_of_sketch(
            moments.input_sketch, moments.num_input_tokens, moments.input_square_sum
        )
        factors = columns.by_block(factors.T / size.sqrt()).transpose(-1, -2).float().to(device)
        spec = ScaleSpec(
            self.args,
            observation.value.dtype,
            self.negative_scales,
            self._global_scale_for(observation),
        )
        found = []
        for view, extremes, pair in zip(
            observation.views, observation.extremes, start, strict=True
        ):
            which = slice(None) if len(products) == 1 else cast("slice | Tensor", view.where[-1])
            if len(shape) < 2 or not columns.fit(view, which):
                raise CalipersError(
                    f"{self.name}: objective 'hessian' needs a weight (..., rows, cols) in groups "
                    f"of the columns that its inputs were summed by ({self.base_name}_g_idx of the "
                    f"module, if any), got shape {tuple(shape)}"
                )

            def refine(
                views: Sequence[Groups],
                extremes: Sequence[Range],
                factor: float,
                pair: Range = pair,
                which: slice | Tensor = which,
            ) -> list[Range]:
                its_spec, start = spec, pair[0]
                views, extremes, more = _of_ordinary_size(views, extremes, factor)
                factor *= more
                if factor != 1:
                    global_scale = spec.global_scale
                    if global_scale is not None:
                        global_scale = times(global_scale, factor)
                    its_spec = replace(spec, global_scale=global_scale, unit=factor)
                    start = start.double() / factor
                limits = torch.finfo(torch.float32)
                start = start.clamp(-limits.max, limits.max).float()
                scale, zero = refine_by_hessian(
                    views[0],
                    (start, pair[1].float()),
                    extremes[0],
                    products[which],
                    factors[which],
                    its_spec,
                )
                if factor == 1:
                    return [(scale.to(pair[0].dtype), zero)]
                return [(cast_range(scale.double() * factor, pair[0].dtype), zero)]

            found += search_in_float32([view], [extremes], refine)
        return found

    def _why_whole(self, shard: Shard | None, g_idx: Tensor | None) -> str | None:
        if self.objective == "hessian" and shard is not None and len(shard.shape) - 1 in shard.cuts:
            return "objective 'hessian' weighs all groups of a row against each other"
        return super()._why_whole(shard, g_idx)

    def _column_groups(self, cols: int) -> ColumnGroups:
        try:
            return column_groups(self.args, cols, self._module_g_idx())
        except ValueError as error:
            raise type(error)(f"{self.name}: {error}") from error

    def _module_g_idx(self) -> Tensor | None:
        index: Tensor | None = getattr(self.module, f"{self.base_name}_g_idx", None)
        return index

    def check_state(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        """As `Observer.check_state`; for "hessian" sums must be those of the inputs' columns."""
        yield from super().check_state(state)
        found = state.get("input_square_sum")
        seen = self._sums_products and count_in(state, "num_input_tokens") > 0
        if found is None or not seen:
            return
        if self.can_lack_products and "input_products" not in state:
            return
        columns = column_groups(self.args, found.numel(), self._module_g_idx())
        triangle = columns.size * (columns.size + 1) // 2
        shapes = {
            "input_products": (len(columns.index), columns.blocks, triangle),
            "input_sketch": (found.numel(), rank_for(found.numel()) + 1),
        }
        for name, shape in shapes.items():
            yield from check_sum(state, name, shape, needed=True, negative=True)

    def _check_local(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        yield from check_scales(self, state, self.range_names, negative=self.negative_scales)

    @whole_update
    def get_min_max(self, observed: Tensor) -> Range:
        """The range that gives the optimal scale back, each of `qparam_shape`; float32.

        Raises:
            CalipersError: With `negative_scales`: no range gives a negative scale.
        """
        observation = self._look_at_canonical(observed)
        self._remember(self.range_names, self.measure(observation)[0], observed.dtype)
        low, high = self._as_range()
        return low.float(), high.float()

    @whole_update
    def get_range(self) -> Range | None:
        """The range that gives the qparams back, float64; None while nothing was observed.

        Raises:
            CalipersError: With `negative_scales`: no range gives a negative scale.
        """
        return self._as_range() if self.has_statistics else None

    def _as_range(self) -> Range:
        if not self.gives_range:
            raise CalipersError(f"{self.name}: a negative scale cannot be stated as a range")
        return range_of_qparams(*self._range(self.range_names), self.args)

    def _to_qparams(self, low: Tensor, high: Tensor, dtype: torch.dtype) -> Range:
        scale, zero_point = low, high
        if self.args.strategy == _TENSOR_GROUP:
            scale = scale * self._need_global_scale(scale.device)
            if self.args.scale_dtype is not None:
                scale = round_to_quantized_type_dtype(scale, self.args.scale_dtype)
                limits = torch.finfo(self.args.scale_dtype)
                scale = torch.where(scale == 0, limits.smallest_normal * limits.eps, scale)
        else:
            scale = scale.to(dtype)
        return scale, round_to_quantized_type_dtype(
            zero_point, self.args.zp_dtype, cast_to_original_dtype=False
        )

    def _global_scale_for(self, observation: Observation) -> Tensor | None:
        """The module's; where it has none yet, the one that this value alone would get."""
        if self.args.strategy != _TENSOR_GROUP:
            return None
        device = observation.value.device
        scale = self._global_scale_on(device)
        if scale is None:
            ends = [torch.stack([end.reshape(-1).amin() for end, _ in observation.extremes])]
            ends += [torch.stack([end.reshape(-1).amax() for _, end in observation.extremes])]
            scale = global_scale_of_range(*widened((ends[0].amin(), ends[1].amax()), 2))
        return scale.to(device)


def _of_ordinary_size(
    views: Sequence[Groups], extremes: Sequence[Range], factor: float
) -> tuple[Sequence[Groups], Sequence[Range], float]:
    """Views, extremes and the power of two they are divided by, 1.0 where none is needed.

    It is where all groups are so large, or so small, that squares leave float32. `factor` is what
    they were divided by before: the product of both must have an inverse in float32.
    """
    ends = torch.stack([torch.cat([end.reshape(-1) for end in pair]) for pair in extremes]).double()
    sizes = ends[ends.isfinite() & (ends != 0)].abs()
    if not sizes.numel():
        return views, extremes, 1.0
    least, most = (int(torch.frexp(size).exponent) for size in (sizes.min(), sizes.max()))
    exponent = 0
    if least > _ORDINARY:
        exponent = least
    elif most < -_ORDINARY:
        exponent = max(most, -_LEAST if factor == 1 else -_ORDINARY)
    if exponent == 0 or most > 127:
        return views, extremes, 1.0
    more = 2.0**exponent

    def divided(tensor: Tensor) -> Tensor:
        return (tensor.double() / more).to(tensor.dtype)

    return (
        [replace(view, values=divided(view.values)) for view in views],
        [(divided(low), divided(high)) for low, high in extremes],
        more,
    )
