"""The shrink grid on the CPU in C++: a group's values stay in the cache for all candidates.

Its errors are off by up to some hundred-thousandths. Groups whose two best candidates lie closer
than that are searched again by the reference, so that its candidate is chosen there
too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.engines.kernels import GridProblem, GridReference, Problem, ShrinkGrid
from calipers.engines.native import abi
from calipers.engines.native.abi import (
    GridReport,
    GridSearch,
    NativeFormat,
    NativeStrides,
    address,
    library,
    number_of_parts,
)
from calipers.formats import Format, has_mx_scales, has_plain_mx_scales
from calipers.memory import UnreadableError

__all__ = ["Evaluated", "search", "supports"]

#: Highest norm: above it errors that vanish in float32 are not those that vanish in the reference.
HIGHEST_NORM = 8
#: Of so few values the reference searches in no time.
FEW = 2**18
#: Groups of so few values may be made of one value and its likes, whose rounding adds up.
SHORT_GROUP = 64

Range = tuple[Tensor, Tensor]


def supports(problem: Problem) -> bool:
    """Whether the kernels can do a search.

    Float16 rounds powers of two in ways of its own, and so does MXFP6.
    """
    args, norm, dtypes = problem.args, problem.norm, problem.dtypes
    assert args is not None
    if not 1 <= norm <= HIGHEST_NORM:
        return False
    if has_mx_scales(args) and (not has_plain_mx_scales(args) or torch.float16 in dtypes):
        return False
    return abi.supports(args, *dtypes)


@dataclass
class Evaluated:
    """Candidates evaluated by the last search, summed over groups and runs of values."""

    count: int = 0


evaluated = Evaluated()


def search(problems: Sequence[GridProblem], reference: GridReference) -> list[Range]:
    """The ranges of all views of a value.

    Args:
        problems: The views, with arguments that the engine `supports`.
        reference: For ties, and for small searches in which ties may end the patience.
    """
    evaluated.count = 0
    searches = [_Search(problem) for problem in problems]
    grid = problems[0].grid
    candidates = grid.num_candidates
    gains = torch.stack([each.try_candidates(candidates) for each in searches]).any(0).tolist()
    last = grid.last_candidate(gains)
    values = sum(problem.view.values.numel() for problem in problems)
    if last < candidates - 1 and values <= FEW and any(bool(each.ties.any()) for each in searches):
        # Gains that rounding makes count for the patience too.
        return reference.search(problems)
    if any(gains[last + 1 :]):  # by candidates that the search would not have come to
        candidates = last + 1
        for each in searches:
            each.try_candidates(candidates)
    for each in searches:
        if bool(each.ties.any()):
            reference.ties(each.problem, (each.low, each.high), each.ties, candidates)
    return [(each.low, each.high) for each in searches]


class _Search:
    """The search in one view: the best range of each group, and in which groups there are ties."""

    def __init__(self, problem: GridProblem) -> None:
        if not problem.low.shape == problem.high.shape == problem.view.qparam_shape:
            raise UnreadableError("extremes must have the shape of the scales")
        self.problem = replace(
            problem, low=problem.low.contiguous(), high=problem.high.contiguous()
        )
        self.strides = NativeStrides.of(problem.view, problem.importance)
        self.low, self.high = torch.empty_like(self.problem.low), torch.empty_like(self.problem.low)
        self.ties = torch.empty(problem.view.qparam_shape, dtype=torch.bool, device="cpu")
        self._errors: Tensor | None = None

    def try_candidates(self, candidates: int) -> Tensor:
        """Search the first candidates; which of them made any group better, shape (candidates,)."""
        problem = self.problem
        grid, args = problem.grid, problem.args
        factors = grid.factors(candidates)
        errors = None
        if self.strides.runs > 1 and self._errors is None:
            shape = (self.strides.groups, self.strides.runs, candidates)
            errors = torch.empty(shape, dtype=torch.float64, device="cpu")
        known = None if self._errors is None else self._errors[:, :candidates].contiguous()
        task = GridSearch(
            self.strides,
            NativeFormat.of(args, problem.global_scale, problem.view.values.dtype),
            address(problem.low, count=self.strides.groups),
            address(problem.high, count=self.strides.groups),
            address(problem.unit, count=self.strides.groups),
            address(factors, count=candidates),
            candidates,
            grid.norm,
            grid.expand,
            _clip_steps(args) if problem.importance is None else 0,
            _squares_first(args, grid),
            _doubt(grid.norm),
            _noise(self.strides.size),
            address(known, torch.float64),
            address(errors, torch.float64),
            address(self.low),
            address(self.high),
            address(self.ties, torch.bool),
        )
        if known is not None:
            task.box.runs = 1
        parts = number_of_parts(
            task.box.blocks, self.strides.groups * self.strides.size * candidates
        )
        gains = torch.zeros(parts, candidates, dtype=torch.bool, device="cpu")
        reports = (GridReport * parts)(*(GridReport(address(row, torch.bool), 0) for row in gains))
        library().search_grid(ctypes.byref(task), ctypes.c_int64(parts), reports)
        evaluated.count += sum(report.evaluated for report in reports)
        if errors is not None:
            self._errors = errors.sum(1)
            return self.try_candidates(candidates)
        return gains.any(0)


def _doubt(norm: float) -> float:
    """Part of the smallest error by which the next one must be larger to leave no doubt.

    Sums of squares and cubes are right to some 1e-7. Any other power (power.h) may be off by 2.6e-6
    of itself from the exponential, and by 9e-6 from the logarithm for each power taken by it.
    """
    if norm in (2, 3):
        return 2e-6
    by_logarithm = abs(norm - 1 if norm < 2 else norm / 2 - 1)
    return 2 * (9e-6 * by_logarithm + 3e-6) + 2e-6


def _noise(size: int) -> float:
    """How far errors of single values are off by rounding, as a part of the largest value.

    The reference rounds a dequantized value before it subtracts; where a value lies between two
    codes it may take the other one.
    """
    return 2.0**-22 if size <= SHORT_GROUP else 2.0**-24


def _clip_steps(args: QuantizationArgs) -> int:
    """Scales that a range spans; 0 where scales are rounded up to a range far larger."""
    if args.scale_dtype is not None or args.num_bits < 4:
        return 0
    return int(Format.of(args).width)


def _squares_first(args: QuantizationArgs, grid: ShrinkGrid) -> bool:
    """Whether squared errors dismiss so many candidates that it pays to sum them first.

    Of int8 a fifteenth is left over, of int4 two thirds.
    """
    return grid.norm > 2 and Format.of(args).integer and args.num_bits >= 6
