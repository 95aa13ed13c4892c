"""The shrink grid on the CPU by torch.compile: each value is loaded once for a tile of candidates.

Two small functions are compiled for a kind of search: one makes the scales of a tile of candidates
once it has kept the best of the last tile in each group; one sums the errors of all of them in one
loop over the values. Sizes are dynamic, so that one compilation serves the weights of a model.

Compiled errors are off by some millionths. Groups whose two best candidates lie closer than `CLOSE`
are searched again by the reference, so that it is the reference's step that is chosen there too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from calipers.ranges import grid_eager
from calipers.ranges.compiling import SchemeKey, compile_quietly
from calipers.ranges.group_pieces import (
    GroupPiece,
    group_pieces,
    group_size,
    mark_dynamic,
    number_of_runs,
)
from calipers.ranges.rounding import Rounding, power_of_square, quantization_error
from calipers.ranges.shrink import ShrinkGrid
from calipers.ranges.views import GroupedView

__all__ = ["search", "supports"]

#: Candidates of one pass over the values: their sums stay in registers. Powers other than squares
#: take longer to compile than it takes to load the values once more.
TILE, TILE_OF_SQUARES = 5, 10
#: From so many groups on, `patience` steps in a row without a gain are rare enough to take all
#: steps with a piece at hand; with fewer groups all pieces take a tile of steps first.
MANY_GROUPS = 512
#: Part of the smallest error by which the next one must be larger to leave no doubt: squares are
#: summed to some 1e-7, other powers to some 1e-6.
CLOSE, CLOSE_OF_SQUARES = 5e-6, 1e-6
#: Values of a piece: large enough that calls cost nothing, small enough to bound scratch memory.
PIECE = 2**20
Range = tuple[Tensor, Tensor]


def supports(args: QuantizationArgs) -> bool:
    """Whether this engine rounds to a number format."""
    if args.type == QuantizationType.INT:
        return True
    return args.num_bits in (4, 8) and bool(args.symmetric)


def search(
    views: Sequence[GroupedView],
    extremes: Sequence[Range],
    args: QuantizationArgs,
    grid: ShrinkGrid,
    importance: Sequence[GroupedView | None],
    global_scale: Tensor | None,
) -> list[Range]:
    """As `calipers.ranges.search_grid_ranges`, whose arguments are checked and completed.

    Args:
        views: The views of one value.
        extremes: For each view the minimum and maximum of its groups, float32, expanded.
        args: Quantization arguments, without the scale's dtype where it is not to be rounded.
        grid: The candidates.
        importance: For each view the weights of its values, or None.
        global_scale: TENSOR_GROUP only, shape (1,).
    """
    searches = [
        _Search(view, low, high, weights, args, grid, global_scale)
        for view, (low, high), weights in zip(views, extremes, importance, strict=True)
    ]
    many = sum(low.numel() for low, _ in extremes) >= MANY_GROUPS
    steps_of_round = grid.num_steps if many else _tile_size(grid.norm)
    without_gain = 0
    for first in range(0, grid.num_steps, steps_of_round):
        steps = range(first, min(first + steps_of_round, grid.num_steps))
        before = [each.state.clone() if first else None for each in searches]
        for position, gain in enumerate(gains := _try_steps(searches, steps)):
            without_gain = 0 if gain else without_gain + 1
            if grid.patience and without_gain >= grid.patience:
                if any(gains[position + 1 :]):
                    # Steps that the search would not have come to: back, and without them.
                    for each, state in zip(searches, before, strict=True):
                        each.state = each.start() if state is None else state
                    _try_steps(searches, steps[: position + 1])
                return [each.result(steps[position] + 1) for each in searches]
    return [each.result(grid.num_steps) for each in searches]


def _try_steps(searches: list[_Search], steps: range) -> list[bool]:
    """Try the steps in every view; for each whether it made any group better."""
    gains = torch.stack([each.try_steps(steps) for each in searches])
    flags: list[bool] = gains.any(0).tolist()
    return flags


class _Search:
    """The search in one view.

    `state` holds four numbers of each group: the smallest error, the next one of another scale,
    the scale of the smallest, and its step.
    """

    def __init__(
        self,
        view: GroupedView,
        min_vals: Tensor,
        max_vals: Tensor,
        importance: GroupedView | None,
        args: QuantizationArgs,
        grid: ShrinkGrid,
        global_scale: Tensor | None,
    ) -> None:
        self.view, self.importance = view, importance
        self.min_vals, self.max_vals = min_vals, max_vals
        self.args, self.grid, self.global_scale = args, grid, global_scale
        self.state = self.start()
        self._advance = _compiled_advance(SchemeKey(args), _tile_size(grid.norm))
        self._errors = _compiled_errors(SchemeKey(args), grid.norm)
        self._clip_limit = None if importance is not None else ClipLimit.of(args)

    def start(self) -> Tensor:
        """The state before the first step."""
        state = self.min_vals.new_full((4, *self.min_vals.shape), torch.inf)
        state[2:] = 0
        return state

    def try_steps(self, steps: range) -> Tensor:
        """Take candidates in; which of them made a group better, shape (steps,)."""
        gains = torch.zeros(len(steps), dtype=torch.bool)
        for block in self._blocks():
            low, high = self.min_vals[block.where], self.max_vals[block.where]
            index = (slice(None), *block.where)
            state = self.state[index].reshape(4, -1).contiguous()
            gains |= self._search_block(block, low.reshape(-1), high.reshape(-1), state, steps)
            self.state[index] = state.view(self.state[index].shape)
        return gains

    def _search_block(
        self, block: _Block, low: Tensor, high: Tensor, state: Tensor, steps: range
    ) -> Tensor:
        size = _tile_size(self.grid.norm)
        gains = torch.zeros(-(-len(steps) // size) * size, dtype=torch.bool)
        errors = torch.full((size, low.numel()), torch.inf)
        scale = torch.zeros_like(errors)
        first = steps[0]
        while True:
            # A short tile repeats its last step: equals do not win.
            tile = [min(first + i, steps[-1]) for i in range(size)]
            shrink = torch.tensor([self.grid.shrink(step) for step in tile], dtype=torch.float32)
            found, gained, *scales = self._advance(
                low, high, shrink, self.global_scale, state, errors, scale, float(first - size)
            )
            state.copy_(found)
            if first > steps[0]:
                gains[first - size - steps[0] : first - steps[0]] = gained < 0
            if first > steps[-1] or self._is_decided(state, low, high, first):
                return gains[: len(steps)]
            errors, scale = self._sum_errors(block, scales), scales[0]
            first += size

    def _is_decided(self, state: Tensor, low: Tensor, high: Tensor, step: int) -> bool:
        """Whether no step from this one on can make any group of the block better."""
        if self._clip_limit is None or step == 0:
            return False
        shrink = self.grid.shrink(step)
        # Most often a few groups show that there is more to do.
        for groups in (slice(64), slice(None)):
            best = state[0, groups]
            least = self._clip_limit.least_error(low[groups], high[groups], shrink, self.grid)
            if not bool(((least > best) | (best == 0)).all()):
                return False
        return True

    def result(self, num_steps: int) -> Range:
        """The range of the best of the first `num_steps` steps in each group."""
        factors = torch.tensor([self.grid.shrink(step) for step in range(self.grid.num_steps)])
        best = factors[self.state[3].long()]
        low, high = self.min_vals * best, self.max_vals * best
        doubt = CLOSE_OF_SQUARES if self.grid.norm == 2 else CLOSE
        close = self.state[1] <= self.state[0] * (1 + doubt)
        if bool(close.any()):
            self._search_again(close, low, high, num_steps)
        return low, high

    def _search_again(self, close: Tensor, low: Tensor, high: Tensor, num_steps: int) -> None:
        """Let the reference decide in the groups marked; what it finds goes into the range."""
        weights = None if self.importance is None else self.importance.pieces(PIECE)
        found: list[tuple[tuple[slice, ...], Tensor, Tensor, Tensor | None]] = []
        for where, piece in self.view.pieces(PIECE):
            weight = None if weights is None else next(weights)[1]
            marked = close[where]
            if piece.numel() < group_size(self.view) * marked.numel() or not bool(marked.any()):
                continue  # parts of groups: sums of so many values leave little doubt
            values = piece[marked].flatten(1)
            its_weight = None if weight is None else weight[marked].flatten(1)
            found.append((where, marked, values, its_weight))
            if sum(values.numel() for _, _, values, _ in found) >= PIECE:
                self._let_reference_decide(found, low, high, num_steps)
                found = []
        if found:
            self._let_reference_decide(found, low, high, num_steps)

    def _let_reference_decide(
        self,
        found: list[tuple[tuple[slice, ...], Tensor, Tensor, Tensor | None]],
        low: Tensor,
        high: Tensor,
        num_steps: int,
    ) -> None:
        values = torch.cat([values for _, _, values, _ in found])
        view = GroupedView(values, (1,), finite_only=self.view.finite_only)
        weights = [weight for *_, weight in found if weight is not None]
        its_weights = GroupedView(torch.cat(weights), (1,)) if weights else None
        extremes = tuple(
            torch.cat([whole[where][marked] for where, marked, *_ in found])
            for whole in (self.min_vals, self.max_vals)
        )
        without_end = replace(self.grid, patience=0)
        ((lows, highs),) = grid_eager.search(
            [view],
            [(extremes[0], extremes[1])],
            self.args,
            without_end,
            [its_weights],
            self.global_scale,
            num_steps,
        )
        sizes = [len(values) for _, _, values, _ in found]
        for (where, marked, *_), its_low, its_high in zip(
            found, lows.split(sizes), highs.split(sizes), strict=True
        ):
            low[where][marked], high[where][marked] = its_low, its_high

    def _blocks(self) -> Iterator[_Block]:
        """Groups to search together: those of a piece, or all where groups are larger than one."""
        if group_size(self.view) > PIECE:
            yield _Block(tuple(slice(None) for _ in self.view.qparam_shape), self._pieces)
            return
        for piece in self._pieces():
            everything = tuple(slice(None) for _ in piece.where)
            alone = replace(piece, where=everything)
            yield _Block(piece.where, lambda alone=alone: iter((alone,)))  # type: ignore[misc]

    def _pieces(self) -> Iterator[GroupPiece]:
        return group_pieces(self.view, self.importance, PIECE)

    def _sum_errors(self, block: _Block, scales: list[Tensor]) -> Tensor:
        """Errors of a tile of candidates in each group of the block, shape (tile, groups)."""
        total: Tensor | None = None
        shape = self.min_vals[block.where].shape
        for piece in block.pieces():
            index = (slice(None), *piece.where)
            its_scales = [each.view(-1, *shape)[index].reshape(len(each), -1) for each in scales]
            errors = self._sum_piece(piece, *its_scales)
            if piece.values.numel() == group_size(self.view) * errors.shape[1] and total is None:
                return errors
            if total is None:
                total = errors.new_zeros(len(errors), *shape)
            total[index] += errors.view(total[index].shape)
        assert total is not None
        return total.view(len(total), -1)

    def _sum_piece(
        self, piece: GroupPiece, scale: Tensor, inverse: Tensor, zero_point: Tensor
    ) -> Tensor:
        values, weight = piece.values, piece.weight
        groups, runs = len(values), number_of_runs(values.shape[1])
        if runs > 1:
            scale, inverse, zero_point = (
                each.repeat_interleave(runs, dim=1) for each in (scale, inverse, zero_point)
            )
            values = values.view(groups * runs, -1)
            weight = None if weight is None else weight.view(values.shape)
        rows = mark_dynamic([values, weight], [scale, inverse, zero_point])
        zero = None if self.args.symmetric else zero_point
        errors = self._errors(rows[0], scale, inverse, zero, rows[1])
        return errors.view(-1, groups, runs).sum(-1) if runs > 1 else errors


@dataclass(frozen=True)
class _Block:
    """Some groups of a view, and a way to walk through their values."""

    where: tuple[slice, ...]
    pieces: Callable[[], Iterator[GroupPiece]]


@dataclass(frozen=True)
class ClipLimit:
    """The error that clipping the largest value costs at least: it grows from step to step.

    Args:
        steps: Number of scales that the whole range spans.
    """

    steps: float

    @classmethod
    def of(cls, args: QuantizationArgs) -> ClipLimit | None:
        """The limit for a number format; None where scales are rounded up to a range far larger."""
        if args.scale_dtype is not None or args.num_bits < 4:
            return None
        levels = 2**args.num_bits - 1
        return cls(levels if args.type == QuantizationType.INT else 2 * 448 if levels > 15 else 12)

    def least_error(self, low: Tensor, high: Tensor, shrink: float, grid: ShrinkGrid) -> Tensor:
        """No step from the one of this factor on has a smaller error; shape of `low`.

        Args:
            low: Expanded minimum of each group.
            high: Expanded maximum.
            shrink: Factor of the first step in question.
            grid: The candidates.
        """
        # Codes reach no further than the shrunk range and one scale, whatever the zero point is.
        largest = torch.maximum(high, -low)
        reach = largest * shrink * (1 + 2 / self.steps)
        over = (largest / grid.expand - reach).clamp(min=0)
        return over.pow(grid.norm) * (1 - 1e-4)


def _tile_size(norm: float) -> int:
    return TILE_OF_SQUARES if norm == 2 else TILE


@functools.lru_cache(maxsize=64)
def _compiled_advance(key: SchemeKey, tile: int) -> Callable[..., tuple[Tensor, ...]]:
    """What happens between two passes over the values.

    The best of the last tile's candidates is kept, and the next tile's scales are made.
    """
    args = key.args

    def advance(
        low: Tensor,
        high: Tensor,
        shrink: Tensor,
        global_scale: Tensor | None,
        state: Tensor,
        errors: Tensor,
        scale: Tensor,
        first: float,
    ) -> tuple[Tensor, ...]:
        best, following, best_scale, step = state.unbind(0)
        gains = []
        for position in range(tile):
            error, its_scale = errors[position], scale[position]
            better = error < best
            gains.append(torch.where(better, -1.0, 0.0).amin())
            loser = torch.maximum(best, error)
            # The same scale again, as rounded scales come, is no other candidate.
            nearer = (its_scale != best_scale) & (loser < following)
            following = torch.where(nearer, loser, following)
            best = torch.where(better, error, best)
            best_scale = torch.where(better, its_scale, best_scale)
            step = torch.where(better, first + position, step)
        factors = shrink.unsqueeze(1)
        next_scale, zero_point = calculate_qparams(
            low * factors, high * factors, args, global_scale=global_scale
        )
        if global_scale is not None:
            next_scale = next_scale / global_scale
        state = torch.stack((best, following, best_scale, step))
        return state, torch.stack(gains), next_scale, 1 / next_scale, zero_point.float()

    compiled = compile_quietly(advance)

    def call(low: Tensor, high: Tensor, shrink: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        global_scale, state, errors, scale, first = rest
        mark_dynamic([], [low, high, state, errors, scale])
        found: tuple[Tensor, ...] = compiled(
            low, high, shrink, global_scale, state, errors, scale, torch.tensor(first)
        )
        return found

    return call


@functools.lru_cache(maxsize=64)
def _compiled_errors(key: SchemeKey, norm: float) -> Callable[..., Tensor]:
    rounding = Rounding.of(key.args)

    def errors(
        values: Tensor,
        scale: Tensor,
        inverse: Tensor,
        zero_point: Tensor | None,
        weight: Tensor | None,
    ) -> Tensor:
        sums = []
        for i in range(_tile_size(norm)):
            zero = None if zero_point is None else zero_point[i].unsqueeze(-1)
            error = quantization_error(
                values, scale[i].unsqueeze(-1), inverse[i].unsqueeze(-1), zero, rounding
            )
            loss = power_of_square(error * error, norm)
            sums.append((loss if weight is None else loss * weight).sum(-1))
        return torch.stack(sums)

    return compile_quietly(errors)
