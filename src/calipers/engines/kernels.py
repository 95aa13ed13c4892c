"""What engines know how to do, and what they are handed for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from calipers.formats import Format
from calipers.ranges.views import GroupedView

__all__ = [
    "CANDIDATE_SUMS",
    "COUPLED_SUMS",
    "MIN_MAX",
    "SHRINK_GRID",
    "CandidateSums",
    "EngineGroups",
    "GridReference",
    "Kernel",
    "Problem",
]

Code = TypeVar("Code")
Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """What decides whether an engine is chosen, and whether it knows how to do a piece of work.

    Args:
        device: Where the values are.
        work: Number of values, each counted as often as a search works on it.
        dtypes: Of the values, and of their weights.
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
    """A piece of work for which engines have code of their own.

    Args:
        name: Name of that code in each of the modules, which also have a function
            `supports(problem)`.
        modules: The module of each engine that has such code, imported when it is first needed.
    """

    name: str
    modules: Mapping[str, str]


@dataclass(frozen=True)
class GridReference:
    """The shrink grid by plain torch operations, for what a kernel leaves open.

    Args:
        search: Finds the ranges; arguments are those of the kernel.
        ties: Searches the groups of a view that are marked, and corrects what was found for them.
        units: Makes the unit of error of each group of a view.
    """

    search: Callable[..., list[Range]]
    ties: Callable[..., None]
    units: Callable[..., Tensor]


class EngineGroups(Protocol):
    """Some whole groups of a view, which an engine reads where they lie."""

    @property
    def where(self) -> tuple[slice, ...]:
        """Index of the groups in the view's `qparam_shape`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of that part of the qparams."""

    @property
    def in_one_run(self) -> bool:
        """Whether no group is cut into runs, so that `project` and `search_codes` can be had."""

    def sum(self, inverse_base: Tensor, ratio: Tensor, zero_point: Tensor | None) -> Tensor:
        """All sums for candidates, shape (3 * candidates + 1, groups), float64."""

    def project(
        self,
        inverse_base: Tensor,
        zero_point: Tensor | None,
        ratios: Tensor,
        offsets: Tensor,
        factors: Tensor,
        rounds: int,
        residual: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The best scale of each group in units of its base, and its zero point."""

    def search_codes(self, table: Tensor, covering: Tensor, above: int, start: int) -> Tensor:
        """Index of the best scale of each group, int64."""


@dataclass(frozen=True)
class CandidateSums:
    """How an engine makes sums for candidate scales: in one of two ways, the reference in none.

    Args:
        read_groups: Reads the groups of a view, with the weights of its values, in the number
            format of arguments.
        sum_rows: Sums rows in memory, shape (rows, n), float32: all sums, shape
            (3 * candidates + 1, rows).
    """

    read_groups: (
        Callable[[GroupedView, GroupedView | None, QuantizationArgs], Iterator[EngineGroups]] | None
    ) = None
    sum_rows: (
        Callable[[Format, Tensor, Tensor | None, Tensor, Tensor, Tensor | None], Tensor] | None
    ) = None


_NATIVE, _TRITON = "calipers.engines.native", "calipers.engines.triton"

#: Smallest and largest value of each group of a view.
MIN_MAX: Kernel[Callable[[GroupedView], Range]] = Kernel(
    "min_max", {"native": f"{_NATIVE}.min_max"}
)
#: The best range of a shrink grid for each group of some views.
SHRINK_GRID: Kernel[Callable[..., list[Range]]] = Kernel(
    "search", {"native": f"{_NATIVE}.grid", "triton": f"{_TRITON}.grid"}
)
#: Sums for candidate scales, of which scales with the smallest squared error are made.
CANDIDATE_SUMS: Kernel[CandidateSums] = Kernel(
    "candidate_sums", {"native": f"{_NATIVE}.optimal", "triton": f"{_TRITON}.sums"}
)
#: Sums for candidate scales over columns that a matrix couples.
COUPLED_SUMS: Kernel[Callable[..., Tensor]] = Kernel(
    "sum_coupled", {"native": f"{_NATIVE}.hessian"}
)
