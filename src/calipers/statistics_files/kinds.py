"""The kinds of statistics that a file holds: their entries, how two merge, how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from calipers.errors import StatisticsError
from calipers.observers.histogram import HistogramObserver
from calipers.observers.input_moments import InputMoments
from calipers.observers.min_max import StaticMinMaxObserver
from calipers.observers.statistics import LAST, HoldsStatistics, Statistic
from calipers.ranges.histogram import NUM_PATTERNS

__all__ = ["KINDS", "State", "entries", "merge_states", "pack", "unpack"]

State: TypeAlias = dict[str, Tensor]

#: What gathers each kind, and so declares by what word its entries merge.
#: - moments: of a weight, what the inputs of its module teach;
#: - extremes: of an activation by column, of an attention state by head;
#: - histogram: of an activation as a whole, of an attention state by head.
KINDS: dict[str, type[HoldsStatistics]] = {
    "moments": InputMoments,
    "extremes": StaticMinMaxObserver,
    "histogram": HistogramObserver,
}
#: Counts by pattern are nearly all zero: where they are not, and what they are there.
_SPARSE = ("counts", "offsets")
_WHERE, _WHAT = ".where", ".values"


def entries(kind: str) -> dict[str, Statistic]:
    """Entries that a state of a kind may have, each with the word by which it merges."""
    declared = KINDS[kind].statistics
    return {name.lstrip("_"): statistic for name, statistic in declared.items()}


def stored_entries(kind: str) -> set[str]:
    """Names of entries as `pack` gives them."""
    names = entries(kind).keys()
    packed = {f"{name}{end}" for name in names if name in _SPARSE for end in (_WHERE, _WHAT)}
    return {name for name in names if name not in _SPARSE} | packed


def pack(state: Mapping[str, Tensor]) -> State:
    """A state as it is kept and stored: on the CPU, counts by pattern without their zeros."""
    packed: State = {}
    for entry, value in state.items():
        value = value.detach().cpu().contiguous()
        if entry not in _SPARSE:
            packed[entry] = value
            continue
        flat = value.reshape(-1)
        where = flat.nonzero().flatten()
        packed[f"{entry}{_WHERE}"] = where.to(torch.int32)
        packed[f"{entry}{_WHAT}"] = flat[where]
    return packed


def unpack(packed: Mapping[str, Tensor]) -> State:
    """The state that `pack` was given."""
    state: State = {}
    for entry, value in packed.items():
        if entry.endswith(_WHERE):
            continue
        name = entry.removesuffix(_WHAT)
        if name not in _SPARSE:
            state[entry] = value
            continue
        shape = (*packed["min_vals"].shape, NUM_PATTERNS)
        whole = torch.zeros(shape, dtype=torch.int64, device="cpu")
        whole.view(-1)[packed[f"{name}{_WHERE}"].long()] = value
        state[name] = whole
    return state


def merge_states(name: str, kind: str, first: State, second: State) -> State:
    """What both packed states know together: by each entry's word, `first` coming first.

    Exact for extremes, counts and histograms; sums are added in float64.

    Raises:
        StatisticsError: Entries of other shapes, or values of other dtypes.
    """
    a, b = unpack(first), unpack(second)
    merged: State = {}
    for entry, statistic in entries(kind).items():
        mine, theirs = a.get(entry), b.get(entry)
        if mine is None or theirs is None:
            if mine is not None or theirs is not None:
                merged[entry] = theirs if mine is None else mine  # type: ignore[assignment]
        elif statistic is LAST:
            if mine.dtype != theirs.dtype:
                raise StatisticsError(
                    f"{name}: values were {mine.dtype} in one file and {theirs.dtype} in the other"
                )
            merged[entry] = mine
        elif mine.shape != theirs.shape:
            raise StatisticsError(
                f"{name}: {entry} has shape {tuple(mine.shape)} in one file and "
                f"{tuple(theirs.shape)} in the other"
            )
        else:
            merged[entry] = statistic.merge(mine, theirs, 0, 0)
    return pack(merged)
