"""Statistics: what is remembered of values, each declared with how two of them become one.

`HoldsStatistics` derives from these declarations how they are reset, saved, loaded, merged, and
taken back where an update or a batch of a model fails.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeAlias, TypeVar

import torch
from loguru import logger
from torch import Tensor

from calipers._words import check_choice
from calipers.memory import named_tensor, plain_values
from calipers.observers.state_checks import Problem, check_entries
from calipers.ranges.surroundings import undisturbed

__all__ = [
    "COUNT",
    "LAST",
    "MAX",
    "MIN",
    "SUM",
    "TOKENS",
    "HoldsStatistics",
    "Statistic",
    "UpdateState",
    "Word",
    "read_values",
    "whole_update",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


#: How a statistic grows by an observation, and how those of two observers become one.
Word: TypeAlias = Literal["min", "max", "sum", "mean", "last"]


@dataclass(frozen=True)
class Statistic:
    """The one word by which a statistic grows, merges and is reduced over ranks.

    | word | a new observation | two observers, or ranks |
    |---|---|---|
    | min, max | the extreme of both | the extreme of both |
    | sum | is added | are added |
    | mean | moves the average by the observer's averaging constant | averaged by their batches |
    | last | takes the place of the old one | the other, or higher, one |

    All but "mean" are exact: merged halves give what one observer of all data has. The order of
    batches matters to a moving average, which a merge cannot know. It is kept in float32 at least:
    in bfloat16 an average with constant 0.01 stalls, since its steps fall under half a unit in the
    last place. A group of nothing but NaN has the range Inf to -Inf, which leaves no mark on an
    average.

    Args:
        reduce: The word.
        count: Name of the statistic that holds the number of batches behind a "mean".
        integer: Kept as a Python int rather than as a tensor; for "sum" alone.
        initial: What it is before any observation.

    Raises:
        ValueError: Another word, or integers that are no sum.

    Example:
        >>> smallest = Statistic("min")
        >>> smallest.merge(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 5.0]), 1, 1)
        tensor([2., 1.])
    """

    reduce: Word
    count: str = "num_batches"
    integer: bool = False
    initial: int | None = None

    def __post_init__(self) -> None:
        check_choice("reduce", self.reduce, Word)
        if self.integer and self.reduce != "sum":
            raise ValueError(f"integer: counts are added, got reduce={self.reduce!r}")

    def grow(self, past: Tensor, current: Tensor, constant: float) -> Tensor:
        """What `past` becomes by a new observation; `constant` is the averaging constant."""
        if self.reduce == "mean":
            # torch.lerp lacks some dtypes, and constant 1 must give exactly the current value.
            average = past * (1 - constant) + current * constant
            return _where_both(average, past, current)
        return self.merge(past, current, 1, 1)

    def merge(self, a: Tensor, b: Tensor, batches_a: int, batches_b: int) -> Tensor:
        """What the statistics `a` and `b` become together; of two "last" ones `b` is later."""
        if self.reduce == "min":
            return torch.minimum(a, b)
        if self.reduce == "max":
            return torch.maximum(a, b)
        if self.reduce == "sum":
            return a + b
        if self.reduce == "mean":
            return _where_both(_weighted(a, b, batches_a, batches_b), a, b)
        return b


def _weighted(a: Tensor, b: Tensor, m: int, n: int) -> Tensor:
    """(a m + b n) / (m + n), whose sum may overflow where neither side does."""
    return (a.double() * (m / (m + n)) + b.double() * (n / (m + n))).to(a.dtype)


def _where_both(average: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The average where both sides saw a finite value, else the side that did."""
    return torch.where(a.isinf(), b, torch.where(b.isinf(), a, average))


#: The latest observation alone. In a merge the other side is the later one.
LAST = Statistic("last")
#: Smallest values seen.
MIN = Statistic("min")
#: Largest values seen.
MAX = Statistic("max")
#: A sum over all observations.
SUM = Statistic("sum")
#: A number of things seen.
COUNT = Statistic("sum", integer=True, initial=0)
#: The same, None as long as none were counted.
TOKENS = Statistic("sum", integer=True)


class UpdateState:
    """A lock, and whether a method of its owner is at work.

    A copy, also one that went through pickle, has a lock of its own and is at work on nothing.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.at_work = False

    def __reduce__(self) -> tuple[type[UpdateState], tuple[()]]:
        return UpdateState, ()


Owner = TypeVar("Owner", bound="HoldsStatistics")


def whole_update(
    method: Callable[Concatenate[Owner, Parameters], Result],
) -> Callable[Concatenate[Owner, Parameters], Result]:
    """Run a method under its owner's lock, undisturbed, all or nothing.

    What the owner holds is kept by reference and put back where the method raises: statistics
    are replaced by an update, never changed in place. Calls inside of such a method belong to it.
    """

    @functools.wraps(method)
    def wrapped(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        update = self._update
        with update.lock:
            if update.at_work:
                return method(self, *args, **kwargs)
            before = self.held()
            update.at_work = True
            try:
                with undisturbed():
                    result = method(self, *args, **kwargs)
            except BaseException:
                self.__dict__.update(before)
                raise
            finally:
                update.at_work = False
            self._after_update()
            return result

    return wrapped


def read_values(observed: Tensor, what: str) -> Tensor:
    """A plain floating tensor that shares memory with `observed` where it can.

    Raises:
        ValueError: `observed`, which is called `what`, is no tensor or cannot be read.
    """
    return named_tensor(observed, what, plain_values)


class HoldsStatistics:
    """Base of what holds statistics: observers, and what the inputs of a module teach.

    A subclass declares its `statistics`, sets its `name` and calls `_begin` and `reset` when it is
    built. Statistics are replaced, never changed in place. `_parts` names what else is held beside
    it: that is reset, saved, loaded, merged and taken back along with it.
    """

    #: What is remembered, by attribute name; a subclass names what it adds or changes.
    statistics: ClassVar[dict[str, Statistic]] = {"_num_nonfinite": COUNT}
    #: What else an update changes, by attribute name.
    _changing: ClassVar[tuple[str, ...]] = ("_warned", "_left_out", "_uncounted")

    #: What warnings and errors call the values.
    name: str
    _num_nonfinite: int

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Collect the declared statistics along the bases."""
        super().__init_subclass__(**kwargs)
        declared: dict[str, Statistic] = {}
        for base in reversed(cls.__mro__):
            declared.update(base.__dict__.get("statistics", {}))
        cls.statistics = declared

    def _begin(self) -> None:
        self._update = UpdateState()
        self._warned = False
        #: Values left out that no warning has told of yet: how many, of how many, and why.
        self._left_out: tuple[int, int, str] | None = None
        #: NaN and Inf that are a number on a device still, and among how many values.
        self._uncounted: tuple[Tensor, int] | None = None
        self._before_batch: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """State for pickle: all but what a batch that is under way may take back."""
        with self._update.lock:
            return {**self.__dict__, "_before_batch": None}

    def _parts(self) -> tuple[HoldsStatistics, ...]:
        """The object itself, and what is held beside it."""
        return (self,)

    def _changed(self) -> None:
        """Called after statistics were loaded or merged."""

    @property
    def num_nonfinite(self) -> int:
        """How many values were left out, being NaN or Inf, or freaks among inputs."""
        for part in self._parts():
            part._settle()
        return sum(part._num_nonfinite for part in self._parts())

    @whole_update
    def reset(self) -> None:
        """Forget every statistic."""
        self._uncounted = None
        for name, statistic in self.statistics.items():
            setattr(self, name, statistic.initial)
        self._changed()
        for part in self._parts()[1:]:
            part.reset()

    @whole_update
    def state(self) -> dict[str, Tensor]:
        """All statistics as a flat dict of tensors, ready for safetensors; none of the qparams."""
        state: dict[str, Tensor] = {}
        for part in self._parts():
            part._settle()
            for name, statistic in part.statistics.items():
                value, entry = getattr(part, name), name.lstrip("_")
                if statistic.integer and value is not None:
                    value = torch.tensor(value, dtype=torch.int64, device="cpu")
                    value += state.get(entry, 0)
                if value is not None:
                    state[entry] = value
        return state

    def entries(self) -> dict[str, tuple[HoldsStatistics, str]]:
        """Each entry of a state: what holds the statistic, and its attribute name there."""
        found: dict[str, tuple[HoldsStatistics, str]] = {}
        for part in self._parts():
            for name in part.statistics:
                found.setdefault(name.lstrip("_"), (part, name))  # the first takes a whole sum
        return found

    @whole_update
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over statistics that `state` returned, in place of those held.

        The whole state is checked first: where an entry is wrong, what was held is kept.

        Raises:
            ValueError: Lists the entries that are wrong: unknown or missing ones, another shape or
                dtype, NaN, a scale that is not positive, a negative count.
        """
        entries = self.entries()
        for key in state:
            if key not in entries:
                raise ValueError(
                    f"{self.name}: state has unknown entry {key!r}; "
                    f"{type(self).__name__} has {', '.join(entries)}"
                )
        problems = list(check_entries(self, state)) or list(self.check_state(state))
        if problems:
            told = "; ".join(f"{key} {what}" for key, what in problems)
            raise ValueError(f"{self.name}: state cannot be loaded: {told}")
        self.reset()
        for key, value in state.items():
            part, name = entries[key]
            integer = part.statistics[name].integer
            setattr(part, name, int(value) if integer else value.clone())
        self._changed()

    def check_state(self, state: Mapping[str, Tensor]) -> Iterable[Problem]:
        """What is wrong with a state, entry by entry: see `Observer.check_state`."""
        return ()

    @undisturbed()
    def merge_statistics(self, other: HoldsStatistics) -> None:
        """Take in what another object of the same class holds, wholly or not at all.

        Raises:
            ValueError: Statistics of another shape.
        """
        # One lock after the other: two may be merged into each other by two threads.
        found = []
        for part in other._parts():
            with part._update.lock:
                part._settle()
                found.append({name: getattr(part, name) for name in part.statistics})
        with ExitStack() as locks:
            for part in self._parts():
                locks.enter_context(part._update.lock)
            for part in self._parts():
                part._settle()
            merged = [
                dict(part._merged_with(theirs))
                for part, theirs in zip(self._parts(), found, strict=True)
            ]
            for part, values in zip(self._parts(), merged, strict=True):
                part.__dict__.update(values)
            self._changed()

    def _merged_with(self, others: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, statistic in self.statistics.items():
            mine, theirs = getattr(self, name), others[name]
            if mine is None or theirs is None:
                yield name, theirs if mine is None else mine
            elif self._is_replaced(name):
                yield name, theirs
            else:
                if not statistic.integer:
                    theirs = theirs.to(mine.device)
                    if theirs.shape != mine.shape:
                        raise ValueError(
                            f"{self.name}: cannot merge {name} of shape {tuple(theirs.shape)} into "
                            f"shape {tuple(mine.shape)}"
                        )
                counts = (getattr(self, statistic.count, 0), others.get(statistic.count, 0))
                yield name, statistic.merge(mine, theirs, *counts)

    def _is_replaced(self, name: str) -> bool:
        """Whether a new value takes the place of the old one, whatever its shape."""
        return self.statistics[name].reduce == "last"

    def _check_dtypes(self, name: str, dtypes: Sequence[torch.dtype]) -> None:
        """Refuse values of a statistic whose dtypes tell that they cannot be merged.

        Raises:
            ValueError: Names them.
        """

    def begin_batch(self) -> None:
        """Start a batch of a model: `undo_batch` brings back what is held now.

        Nothing is copied: statistics are replaced by updates, so it is enough to hold the old ones.
        """
        for part in self._parts():
            with part._update.lock:
                part._before_batch = part.held()

    def end_batch(self) -> None:
        """Keep what came since `begin_batch`."""
        for part in self._parts():
            with part._update.lock:
                part._before_batch = None
                part._batch_done()

    def undo_batch(self) -> None:
        """Forget what came since `begin_batch`."""
        for part in self._parts():
            with part._update.lock:
                part.__dict__.update(part._before_batch or {})
                part._before_batch = None

    def _batch_done(self) -> None:
        """Called at the end of a batch, under the lock."""

    def held(self) -> dict[str, Any]:
        """Statistics and what goes with them, by reference: all that an update changes."""
        own = self.__dict__
        return {name: own[name] for name in (*self.statistics, *self._changing) if name in own}

    def take_over(self, held: Mapping[str, Any]) -> None:
        """Hold what another object of the same class and options holds, by reference."""
        self.__dict__.update(held)

    def alone(self) -> AbstractContextManager[object]:
        """A block in which no other thread changes it."""
        return self._update.lock

    def _count_nonfinite(self, value: Tensor, *, later: bool = False) -> None:
        """Count NaN and Inf in a value.

        Args:
            value: The value.
            later: Leave the count on its device until `_settle` is called.

        Raises:
            ValueError: It holds nothing else, unless that shows later.
        """
        count, total = value.numel() - value.isfinite().sum(), value.numel()
        if later:
            past = self._uncounted
            if past is not None:
                count, total = count + past[0].to(count.device), total + past[1]
            self._uncounted = (count, total)
            return
        if int(count) == total and total:
            raise ValueError(f"{self.name}: all {total} observed values are NaN or Inf")
        self._leave_out(int(count), total, "NaN or Inf")

    @whole_update
    def _settle(self) -> None:
        """Read the counts that are on a device still."""
        if self._uncounted is not None:
            (count, total), self._uncounted = self._uncounted, None
            self._leave_out(int(count), total, "NaN or Inf")

    def _leave_out(self, count: int, total: int, why: str) -> None:
        if count:
            self._num_nonfinite += count
            self._left_out = (count, total, why)

    def _after_update(self) -> None:
        """Warn of values that an update left out: once, and not before it is done."""
        if self._left_out is not None:
            count, total, why = self._left_out
            self._left_out = None
            if not self._warned:
                self._warned = True
                logger.warning("{}: left out {} {} of {} values", self.name, count, why, total)
