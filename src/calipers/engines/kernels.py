"""The kernels that engines have, and the problems that they are handed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import Format
from calipers.grouping import Groups

__all__ = [
    "CANDIDATE_SUMS",
    "COUPLED",
    "MIN_MAX",
    "SHRINK_GRID",
    "CandidateSums",
    "Coupled",
    "CoupledColumns",
    "EngineGroups",
    "GridProblem",
    "GridReference",
    "Kernel",
    "Pair",
    "Problem",
    "ShrinkGrid",
]

Code = TypeVar("Code")
Range = tuple[Tensor, Tensor]

#: Exponents of units of error, so that neither a unit nor a value in it overflows.
MOST_EXPONENT = 120


@dataclass(frozen=True)
class Problem:
    """A problem as far as the choice of an engine depends on it.

    Args:
        device: Where the values are.
        work: Number of values, each counted as often as a search works on it.
        dtypes: Of the values, and of their importance.
        args: Quantization arguments; None where nothing is quantized.
        norm: Exponent of the errors.
    """

    device: torch.device
    work: int
    dtypes: tuple[torch.dtype, ...] = ()
    args: QuantizationArgs | None = None
    norm: float = 2.0


@dataclass(frozen=True)
class Kernel(Generic[Code]):
    """Work for which engines have code of their own.

    Args:
        name: Name of that code in each of the modules, which also have a function
            `supports(problem)`.
        modules: The module of each engine that has such code, imported when it is first needed.
    """

    name: str
    modules: Mapping[str, str]


@dataclass(frozen=True)
class ShrinkGrid:
    """The candidates of a shrink grid: candidate i is the range times `expand * (1 - i / grid)`.

    Args:
        maxshrink: Largest part of the range to give up, 0 to 1.
        grid: Number of candidates that the whole range would have.
        patience: Candidates in a row without a better group after which the search ends; 0: never.
        norm: Exponent of the absolute error.
        expand: Factor on the range before it shrinks, at least 1.
        include_end: Whether candidate `max(1, int(maxshrink * grid))` itself is a candidate.
    """

    maxshrink: float
    grid: float
    patience: int
    norm: float
    expand: float = 1.0
    include_end: bool = False

    @property
    def num_candidates(self) -> int:
        """Number of candidates, at least one."""
        candidates = int(self.maxshrink * self.grid)
        return max(1, candidates) + 1 if self.include_end else max(1, candidates)

    def factor(self, candidate: int) -> float:
        """Factor on the expanded range at `candidate`."""
        return 1 - candidate / self.grid

    def factors(self, num_candidates: int, device: torch.device | str = "cpu") -> Tensor:
        """Factors of the first candidates on the expanded range, float32, one-dimensional."""
        factors = [self.factor(candidate) for candidate in range(num_candidates)]
        return torch.tensor(factors, dtype=torch.float32, device=device)

    def last_candidate(self, gains: Iterable[bool]) -> int:
        """Where the patience ends: there a search that makes gains lazily ends, too.

        Args:
            gains: Of each candidate, whether it made any group better.
        """
        without_gain = 0
        for candidate, gain in enumerate(gains):
            without_gain = 0 if gain else without_gain + 1
            if self.patience and without_gain >= self.patience:
                return candidate
        return self.num_candidates - 1


@dataclass(frozen=True)
class GridProblem:
    """A shrink grid in one view of a value; the problems of its other views differ in the groups.

    Args:
        view: The values.
        low: Minimum of each group, float32, expanded, of the view's `qparam_shape`.
        high: Maximum of each group, like `low`.
        importance: That of each value, >= 0, of the same shape; None weighs all alike.
        args: Quantization arguments, without the scale's dtype where it is not to be rounded. The
            strategy does not count.
        grid: The candidates.
        global_scale: TENSOR_GROUP only, shape (1,).
    """

    view: Groups
    low: Tensor
    high: Tensor
    importance: Groups | None
    args: QuantizationArgs
    grid: ShrinkGrid
    global_scale: Tensor | None

    @cached_property
    def unit(self) -> Tensor:
        """Factor on values and scales of each group that brings its largest error close to 1.

        In that unit the largest rounding error with the scale of minimum and maximum lies from 0.5
        to 1, so that no norm makes it vanish, or overflow, in float32. A power of two changes no
        code and no order of errors. Float32, of the shape of `low`.
        """
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        half = torch.maximum(-low, high) if self.args.symmetric else high / 2 - low / 2
        part = Format.of(self.args).largest_error / self.grid.expand
        exponent = torch.frexp(half * part).exponent.to(torch.int32)
        exponent = torch.where(half.isfinite(), exponent, 0).clamp(-MOST_EXPONENT, MOST_EXPONENT)
        return ((127 - exponent) << 23).view(torch.float32)


@dataclass(frozen=True)
class GridReference:
    """The shrink grid by plain torch operations, for what a kernel leaves open.

    Args:
        search: Finds the ranges of all views.
        ties: Searches the groups of a view that are marked, among the first candidates,
            and corrects the ranges that were found for them.
    """

    search: Callable[[Sequence[GridProblem]], list[Range]]
    ties: Callable[[GridProblem, Range, Tensor, int], None]


class EngineGroups(Protocol):
    """Some whole groups of a view, which an engine reads where they lie."""

    @property
    def where(self) -> tuple[slice, ...]:
        """Index of the groups in the view's `qparam_shape`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of that part of the qparams."""

    @property
    def whole(self) -> bool:
        """Whether no group is cut: then there are `project` and `search_scale_codes`."""

    def sum(self, inverse_base: Tensor, factor: Tensor, zero_point: Tensor | None) -> Tensor:
        """All sums for candidates, shape (3 * candidates + 1, groups), float64."""

    def project(
        self,
        inverse_base: Tensor,
        zero_point: Tensor | None,
        factors: Tensor,
        offsets: Tensor,
        fine_factors: Tensor,
        rounds: int,
        residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The best scale of each group in units of its base, and its zero point."""

    def search_scale_codes(self, table: Tensor, covering: Tensor, above: int, start: int) -> Tensor:
        """Index of the best scale of each group, int64."""


@dataclass(frozen=True)
class CandidateSums:
    """How an engine makes sums for candidate scales: in one of two ways, the reference in none.

    Args:
        read_groups: Reads the groups of a view, with the importance of its values, in the
            number format of arguments.
        sum_rows: Sums rows in memory, shape (rows, n), float32: all sums, shape
            (3 * candidates + 1, rows).
    """

    read_groups: (
        Callable[[Groups, Groups | None, QuantizationArgs], Iterator[EngineGroups]] | None
    ) = None
    sum_rows: (
        Callable[[Format, Tensor, Tensor | None, Tensor, Tensor, Tensor | None], Tensor] | None
    ) = None


#: Scales and zero points, float32; None where all zero points are zero.
Pair = tuple[Tensor, Tensor | None]


class CoupledColumns(Protocol):
    """Columns of X'X, for groups of one row each: made of its blocks, factors, and arguments."""

    def rows_at_a_time(self, most: int) -> int:
        """How many rows to refine at a time, where about so many at most are wanted."""

    def refine(
        self, values: Tensor, start: Pair, plain: Pair, candidates: Pair, fresh: Sequence[bool]
    ) -> Pair:
        """Go through the groups of some rows once, and give each the best of its candidates.

        Args:
            values: Shape (rows, groups, columns of a group), float32.
            start: Scale and zero point of each group, (rows, groups).
            plain: Those of minimum and maximum, of the same shape, whose d'Hd is never exceeded;
                they take the place of a start that does.
            candidates: (rows, groups, count).
            fresh: For each of the count whether it lies nearer to the start than to the candidate
                before it.

        Returns:
            Scales and zero points, (rows, groups).
        """


@dataclass(frozen=True)
class Coupled:
    """How an engine finds scales of groups whose columns are coupled.

    Args:
        sum_coupled: As `calipers.ranges.hessian.sum_coupled`.
        columns: Makes `CoupledColumns` of blocks of X'X, factors and arguments, as
            `calipers.ranges.hessian.refine_by_hessian` is given them; the reference has none.
    """

    sum_coupled: Callable[..., Tensor]
    columns: Callable[[Tensor, Tensor, QuantizationArgs], CoupledColumns] | None = None


_NATIVE, _TRITON = "calipers.engines.native", "calipers.engines.triton"

#: Smallest and largest value of each group of a view.
MIN_MAX: Kernel[Callable[[Groups], Range]] = Kernel("min_max", {"native": f"{_NATIVE}.min_max"})
#: The best range of a shrink grid for each group of some views.
SHRINK_GRID: Kernel[Callable[[Sequence[GridProblem], GridReference], list[Range]]] = Kernel(
    "search", {"native": f"{_NATIVE}.grid", "triton": f"{_TRITON}.grid"}
)
#: Sums for candidate scales, of which scales with the smallest squared error are made.
CANDIDATE_SUMS: Kernel[CandidateSums] = Kernel(
    "candidate_sums", {"native": f"{_NATIVE}.optimal", "triton": f"{_TRITON}.sums"}
)
#: Scales of groups whose columns a matrix couples.
COUPLED: Kernel[Coupled] = Kernel("coupled", {"native": f"{_NATIVE}.hessian"})
