"""The shrink grid on CUDA by Triton: one pass over the values, nothing of it waits for the host.

Each group's values are loaded once and tried with all steps of the grid (groups too long for that
are searched in splits, whose errors are added in a fixed order). The search notes which
steps made any group better, a kernel finds where the patience ends, and a second search, which ends
at once where there is nothing to do, takes back what later steps have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from calipers.engines.kernels import GridProblem, GridReference, Problem, ShrinkGrid
from calipers.engines.strides import MOST_DIMS, Dim, Strides
from calipers.engines.triton import grid_kernels as kernels
from calipers.engines.triton import launch
from calipers.formats import Format, has_plain_mx_scales, range_dtype

__all__ = ["search", "supports"]

#: Values of a program: 32 in each of 128 threads.
TILE = 4096
#: Most groups of a program: their ranges and best steps lie in registers too.
MOST_GROUPS = 256
#: Bits of a word in which it is noted which steps made a group better.
WORD = 32
#: Highest norm: above it powers of errors reach the ends of float32.
HIGHEST_NORM = 8

Range = tuple[Tensor, Tensor]

#: How the kernel rounds scales: name, largest scale, what stands for a scale of zero.
_SCALE_TYPES: dict[torch.dtype | None, tuple[str, float, float]] = {
    None: ("none", 0.0, torch.finfo(torch.float32).eps),
    **{
        dtype: (name, torch.finfo(dtype).max, torch.finfo(dtype).eps)
        for dtype, name in (
            (torch.float32, "fp32"),
            (torch.bfloat16, "bf16"),
            (torch.float16, "fp16"),
            (torch.float8_e4m3fn, "fp8"),
        )
    },
    # As the MX exponents are made, no scale is zero.
    torch.uint8: ("mx", 0.0, 0.0),
}


def supports(problem: Problem) -> bool:
    """Whether the kernels know how these arguments scale and round.

    They make scales of float32 ranges, and take errors as they are: powers above 8 may vanish.
    """
    args = problem.args
    assert args is not None
    if problem.norm > HIGHEST_NORM:
        return False
    if range_dtype(args, problem.dtypes[0]) != torch.float32:
        return False
    if args.scale_dtype not in _SCALE_TYPES:
        return False
    if Format.of(args).integer:
        whole = args.zp_dtype is not None and not args.zp_dtype.is_floating_point
        return args.num_bits <= 16 and args.scale_dtype != torch.uint8 and (args.symmetric or whole)
    return bool(args.symmetric) and (args.scale_dtype != torch.uint8 or has_plain_mx_scales(args))


def search(problems: Sequence[GridProblem], reference: GridReference) -> list[Range]:
    """The ranges of all views of a value.

    Args:
        problems: The views, with arguments that the engine `supports`.
        reference: Not asked: what is found stays on the device.
    """
    one = problems[0]
    device = one.view.values.device
    with launch.on_device(device):
        steps = _Steps.of(one.grid, device)
        searches = [_Search(problem, steps) for problem in problems]
        constants = _constants(one)
        for each in searches:
            each.try_candidates(constants)
        if 0 < one.grid.patience < one.grid.num_candidates:
            steps.cut(one.grid.patience)
            for each in searches:
                each.try_again(constants)
    return [each.result() for each in searches]


@dataclass(frozen=True)
class _Steps:
    """The steps of a search, on the device.

    Args:
        number: How many there are.
        factors: Factor on the range at each step, float32.
        state: What the kernels tell each other, int32: the number of steps to try, and a bit for
            each step that made a group better.
    """

    number: int
    factors: Tensor
    state: Tensor

    @classmethod
    def of(cls, grid: ShrinkGrid, device: torch.device) -> _Steps:
        number = grid.num_candidates
        # Made there, since a copy would wait; as `ShrinkGrid.shrink` does it, in doubles. (Divided
        # by a number, CUDA would multiply with its inverse.)
        index = torch.arange(number, dtype=torch.float64, device=device)
        factors = (1 - index / torch.full_like(index, grid.grid)).float()
        state = torch.zeros(1 + -(-number // WORD), dtype=torch.int32, device=device)
        state[:1].fill_(number)
        return cls(number, factors, state)

    @property
    def words(self) -> int:
        return self.state.numel() - 1

    def cut(self, patience: int) -> None:
        """Keep the steps up to the end of the patience; none where later ones changed nothing."""
        arguments = {"state": self.state, "num_steps": self.number, "patience": patience}
        launch.launch(kernels.cut_steps, 1, arguments)


class _Search:
    """The search in one view."""

    def __init__(self, problem: GridProblem, steps: _Steps) -> None:
        view = problem.view
        self._shape = view.qparam_shape
        self._steps = steps
        self._groups = prod(self._shape)
        self._length = view.group_size
        self._splits, self._split_length = _splits(self._length)
        self._strides = Strides.of(view, problem.importance)
        self._finite_only = view.finite_only
        self._low, self._high = problem.low.contiguous(), problem.high.contiguous()
        self._units = problem.unit.contiguous()
        self._best_low, self._best_high = self._low.clone(), self._high.clone()
        self._global_scale = problem.global_scale
        self._errors: Tensor | None = None

    def try_candidates(self, constants: dict[str, Any]) -> None:
        """Try as many steps as the state says; note which ones made a group better."""
        if not self._groups:
            return
        partial = None
        if self._splits > 1:
            partial = self._low.new_empty(self._steps.number, self._groups, self._splits)
        block = launch.power_of_two(self._split_length)
        per_program = 1
        if partial is None:
            per_program = min(MOST_GROUPS, TILE // block, launch.power_of_two(self._groups))
        arguments = {
            **self._ranges(),
            **_stride_arguments(self._strides),
            **constants,
            "units": self._units,
            "global_scale": self._low if self._global_scale is None else self._global_scale,
            "partial": self._low if partial is None else partial,
            "length": self._length,
            "run_length": self._split_length,
            "num_runs": self._splits,
            "FINITE_ONLY": self._finite_only,
            "WIDE": self._length >= 2**31 - TILE,
            "LONG": partial is not None,
            "BLOCK_G": per_program,
            "BLOCK_N": block,
        }
        programs = -(-self._groups // per_program) * self._splits
        launch.launch(kernels.search_steps, programs, arguments)
        if partial is not None:
            self._errors = partial.sum(-1)
            self._pick()

    def try_again(self, constants: dict[str, Any]) -> None:
        """Try the steps that are left; the errors of long groups are still known."""
        if self._errors is None:
            self.try_candidates(constants)
        else:
            self._pick()

    def result(self) -> Range:
        """The range of the best step of each group."""
        return self._best_low.view(self._shape), self._best_high.view(self._shape)

    def _pick(self) -> None:
        block = min(128, launch.power_of_two(self._groups))
        arguments = {**self._ranges(), "errors": self._errors, "BLOCK_G": block}
        launch.launch(kernels.pick_steps, -(-self._groups // block), arguments)

    def _ranges(self) -> dict[str, Any]:
        return {
            "low": self._low,
            "high": self._high,
            "best_low": self._best_low,
            "best_high": self._best_high,
            "factors": self._steps.factors,
            "state": self._steps.state,
            "num_groups": self._groups,
            "num_words": self._steps.words,
        }


def _splits(length: int) -> tuple[int, int]:
    """Number and length of the splits that a group is searched in; one where it fits a tile."""
    if length <= TILE:
        return 1, length
    splits = -(-length // TILE)
    # A multiple of 16, so that splits can be loaded in wide words.
    split_length = -(-length // splits // 16) * 16
    return -(-length // split_length), split_length


def _constants(problem: GridProblem) -> dict[str, Any]:
    """The format, as the constants that the kernel is compiled for."""
    args = problem.args
    codes = Format.of(args)
    name, limit, eps = _SCALE_TYPES[args.scale_dtype]
    return {
        "NORM": float(problem.grid.norm),
        "INTEGER": codes.integer,
        "SYMMETRIC": bool(args.symmetric),
        "LOWEST": codes.low,
        "HIGHEST": codes.high,
        "HALF_RANGE": codes.width / 2,
        "SHIFT": codes.shift,
        "SMALLEST": codes.smallest_bits,
        "MX_OFFSET": codes.mx_offset,
        "SCALED_GLOBALLY": problem.global_scale is not None,
        "SCALE_TYPE": name,
        "SCALE_LIMIT": limit,
        "SCALE_EPS": eps,
    }


def _stride_arguments(strides: Strides) -> dict[str, Any]:
    """The arguments that tell the kernel where values lie."""
    found: dict[str, Any] = {
        "values": strides.values,
        "weights": strides.values if strides.importance is None else strides.importance,
        "columns": strides.values if strides.columns is None else strides.columns,
        "num_column_groups": 1 if strides.columns is None else strides.columns.shape[0],
        "KEPT": len(strides.kept),
        "REDUCED": len(strides.reduced),
        "GATHERED": strides.columns is not None,
        "WEIGHTED": strides.importance is not None,
    }
    for name, dims in (("kept", strides.kept), ("reduced", strides.reduced)):
        padded = [Dim(1, 0, 0)] * (MOST_DIMS - len(dims)) + dims
        for position, dim in enumerate(padded):
            found[f"value_{name}_{position}"] = dim.value
            found[f"weight_{name}_{position}"] = dim.importance
            if position > 0:
                found[f"{name}_size_{position}"] = dim.size
    return found
