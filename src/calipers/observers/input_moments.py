"""What the inputs of a module teach about its weight, and the base of observers that ask for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import ClassVar, cast

import torch
from torch import Tensor

from calipers.observers.base import Observation, Observer
from calipers.observers.masks import select_tokens
from calipers.observers.state_checks import Problem, check_sum, count_in
from calipers.observers.statistics import (
    COUNT,
    SUM,
    HoldsStatistics,
    Statistic,
    UpdateState,
    read_values,
    whole_update,
)
from calipers.ranges.input_gram import ColumnGroups, factor_of_sketch, rank_for, sketch
from calipers.ranges.output_error import InputGram

__all__ = ["InputMoments", "InputObserver", "share_moments"]

#: Column sums of x^2 of a batch that float32 holds with room for products of other columns: beyond
#: them the batch is summed in float64.
_USUAL = (1e-30, 1e20)
#: An input of so many times the median size is left out: in float32 the sums of the other columns
#: would vanish beside it.
_FREAK = 2.0**40
#: Largest input whose products float64 can sum over any number of tokens and columns.
_LARGEST = 1e140


class _WaitingSums:
    """Sums over the tokens of a batch of the model that is not done, by name.

    They are in float32: the old sums, which would have to be kept otherwise, take twice as much
    memory. Moments that share them share their total as well.

    Args:
        past: The sums before the batch.
        sums: What the batch adds.
    """

    def __init__(self, past: Mapping[str, Tensor | None], sums: Mapping[str, Tensor]) -> None:
        self._past, self.sums = past, sums
        self._total: dict[str, Tensor] | None = None
        self._update = UpdateState()

    def with_more(self, sums: Mapping[str, Tensor]) -> _WaitingSums:
        """These and others."""
        added = {name: _sum(value, sums[name]) for name, value in self.sums.items()}
        return _WaitingSums(self._past, added)

    def total(self) -> dict[str, Tensor]:
        """All sums in float64, those before the batch included."""
        with self._update.lock:
            if self._total is None:
                self._total = {
                    name: _sum(self._past[name], value).double()
                    for name, value in self.sums.items()
                }
                self._past = self.sums = {}
            return self._total


class InputMoments(HoldsStatistics):
    """Sums over the tokens that a module sees: what its inputs teach about its weight.

    Held beside an observer, which reads them when it measures the weight; observers whose modules
    read the same inputs may hold the same moments, of which each input is then fed once. Each batch
    is summed in float32 and the sums are added in float64, so that the order of batches and merges
    does not show. A batch whose squares are too large or too small for float32 is summed in
    float64. A value of 2^40 times the median size of its batch is left out and counted, like NaN
    and Inf.

    Args:
        name: What warnings and errors call the inputs.
    """

    statistics: ClassVar[dict[str, Statistic]] = {
        "input_square_sum": SUM,
        "num_input_tokens": COUNT,
        "input_products": SUM,
        "input_sketch": SUM,
    }
    _changing = (*HoldsStatistics._changing, "_waiting")

    #: Sum of x^2 over tokens by input column, shape (cols,), float64.
    input_square_sum: Tensor | None
    #: Tokens behind the sums.
    num_input_tokens: int
    #: Sum of x x' in blocks, (column groups, blocks, size * (size + 1) / 2), float64; None where no
    #: products are asked for.
    input_products: Tensor | None
    #: The sketch of `calipers.ranges.input_gram`, (cols, rank + 1), float64; None as above.
    input_sketch: Tensor | None
    #: Products and sketch of a batch of the model that is not done; None where there are none.
    _waiting: _WaitingSums | None

    def __init__(self, name: str = "inputs") -> None:
        self.name = name
        self._waiting = None
        self._begin()
        self.reset()

    @whole_update
    def observe(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        products: Callable[[int], ColumnGroups] | None = None,
    ) -> None:
        """Add a batch of the module's inputs.

        Args:
            inputs: Shape (..., cols). Values that are NaN or Inf are left out and counted.
            mask: Which tokens count, shape (batch, tokens) or (tokens,), 1 where one counts; None
                counts all.
            products: Gives for a number of columns those whose products are summed too, always the
                same; None sums none.

        Raises:
            ValueError: Another number of columns than before, or a mask that does not fit. Nothing
                is changed then.
        """
        value = read_values(inputs, self.name)
        if mask is not None:
            try:
                value = select_tokens(value, mask)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
        if value.numel() == 0:
            return
        past = self.input_square_sum
        if past is not None and past.shape != value.shape[-1:]:
            raise ValueError(
                f"{self.name}: had {past.numel()} columns so far, got shape {tuple(inputs.shape)}"
            )
        tokens = value.reshape(-1, value.shape[-1])
        square_sum = tokens.float().square().sum(0)
        largest = square_sum.amax()
        if not bool((largest > _USUAL[0]) & (largest < _USUAL[1])):  # NaN is neither
            tokens = self._without_freaks(tokens)
            square_sum = tokens.square().sum(0)
        square_sum = square_sum.double()
        if past is not None:
            square_sum += past.to(square_sum.device)
        self._add_products(tokens, products)
        self.input_square_sum = square_sum
        self.num_input_tokens += tokens.shape[0]

    def _without_freaks(self, tokens: Tensor) -> Tensor:
        """Tokens in float64, with zeros in place of values that cannot be summed."""
        self._count_nonfinite(tokens)
        sizes = tokens.double().abs()
        finite = sizes.isfinite()
        filled = sizes[finite & (sizes > 0)]
        if filled.numel() == 0:
            return torch.where(finite, tokens.double(), 0)
        limit = (filled.median() * _FREAK).clamp(max=_LARGEST)
        freaks = int((finite & (sizes > limit)).sum())
        self._leave_out(freaks, sizes.numel(), "values of 2^40 times the median, or above 1e140,")
        return torch.where(sizes <= limit, tokens.double(), 0)

    def _add_products(self, tokens: Tensor, products: Callable[[int], ColumnGroups] | None) -> None:
        """Sum x x' of tokens, shape (tokens, cols), in float32 unless they are float64."""
        if products is None:
            return
        columns = products(tokens.shape[-1])
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        sums = {
            "input_products": columns.triangles(tokens),
            "input_sketch": sketch(tokens, rank_for(tokens.shape[-1])),
        }
        past = {name: getattr(self, name) for name in sums}
        waiting = self._waiting
        if self._before_batch is None:
            self.__dict__.update(_WaitingSums(past, sums).total())
        elif waiting is None:
            self._waiting = _WaitingSums(past, sums)
        else:
            self._waiting = waiting.with_more(sums)

    def _batch_done(self) -> None:
        if self._waiting is not None:
            self.__dict__.update(self._waiting.total())
            self._waiting = None

    def problem(self, shape: torch.Size) -> str | None:
        """Why they tell nothing about a weight of this shape, if so, after "it ..."."""
        if self.input_square_sum is None or not self.num_input_tokens:
            return "has seen no input: attach it to the module and run data first"
        if not bool(((self.input_square_sum >= 0) & self.input_square_sum.isfinite()).all()):
            return "holds input statistics that are negative or not finite"
        cols = self.input_square_sum.numel()
        # In the canonical layout of groups the columns are the last two dimensions.
        by_column = shape[-1:] == (cols,)
        by_group = len(shape) > 3 and shape[-2] * shape[-1] == cols
        if by_column or by_group:
            return None
        return f"has seen inputs of {cols} columns, which do not fit a shape of {tuple(shape)}"

    @property
    def lacks_products(self) -> bool:
        """Whether inputs were seen, and none of their products summed."""
        seen = self.input_square_sum is not None
        return seen and self.input_products is None and self._waiting is None

    def columns_behind(self, columns: slice) -> int:
        """Columns of the inputs, where these hold the ones named; else how many are named."""
        seen = 0 if self.input_square_sum is None else self.input_square_sum.numel()
        return seen if columns.stop <= seen else columns.stop - columns.start

    def mean_squares(self, value: Tensor, columns: slice | None = None) -> Tensor:
        """E[x^2] / mean(E[x^2]) of each value's column, float32, expanded to the value's shape.

        Args:
            value: Values of a weight, or of a shard of it.
            columns: Those of the weight that `value` has; None for all.
        """
        means = (cast(Tensor, self.input_square_sum) / self.size()).float().to(value.device)
        if columns is not None and value.shape[-1] != means.numel():
            means = means[columns]
        if value.shape[-1] != means.numel():
            means = means.view(value.shape[-2:])
        return means.expand(value.shape)

    def gram(self, columns: ColumnGroups | None) -> InputGram | None:
        """What is known of X'X, divided by its mean diagonal; None before any token.

        Args:
            columns: Those that products were summed by; None where none are.
        """
        if self.input_square_sum is None or self.problem(self.input_square_sum.shape) is not None:
            return None
        size = self.size()
        diagonal = (self.input_square_sum / size).float()
        if columns is None or self.input_products is None or self.input_sketch is None:
            return InputGram(diagonal)
        products = columns.products((self.input_products / size).float())
        if products.shape[:2] == (1, 1):
            return InputGram(diagonal, columns, products)
        factor = factor_of_sketch(self.input_sketch, self.num_input_tokens, self.input_square_sum)
        return InputGram(diagonal, columns, products, (factor / size.sqrt()).float())

    def size(self) -> Tensor:
        """Mean over columns of the sum of x^2, float64, greater than 0."""
        mean = cast(Tensor, self.input_square_sum).mean()
        return mean.clamp(min=torch.finfo(torch.float64).tiny)


class InputObserver(Observer):
    """Base of weight observers that look at the inputs of their module first."""

    needs_data = True
    #: What the inputs have taught; several observers may hold the same.
    moments: InputMoments

    # By the names that they have in a state.
    input_square_sum = property(attrgetter("moments.input_square_sum"))
    num_input_tokens = property(attrgetter("moments.num_input_tokens"))
    input_products = property(attrgetter("moments.input_products"))
    input_sketch = property(attrgetter("moments.input_sketch"))

    def _begin(self) -> None:
        super()._begin()
        self.moments = InputMoments()

    @property
    def name(self) -> str:
        """What warnings and errors call the observed value; its inputs are called after it."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        module = name.removesuffix(f".{self.base_name}")
        self.moments.name = "inputs" if module == name else f"inputs of {module}"

    @property
    def has_data(self) -> bool:
        """Whether any token has been seen."""
        return self.moments.num_input_tokens > 0

    def _parts(self) -> tuple[HoldsStatistics, ...]:
        return self, self.moments

    def __copy__(self) -> InputObserver:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__getstate__(), moments=copy.copy(self.moments))
        return copied

    @property
    def wanted_products(self) -> Callable[[int], ColumnGroups] | None:
        """The columns whose products are summed too, for a number of columns; None for none."""
        return None

    @property
    def can_lack_products(self) -> bool:
        """Whether sums without the products that are wanted will do."""
        return False

    def observe_input(self, inputs: Tensor, mask: Tensor | None = None) -> None:
        """Add what is wanted of a batch of the module's inputs to the moments."""
        self.moments.observe(inputs, mask, self.wanted_products)

    def input_gram(self, products: Callable[[int], ColumnGroups] | None = None) -> InputGram | None:
        """What is known of X'X of the inputs; None where no input was seen.

        Args:
            products: `wanted_products` of the observer that the moments are fed for, where that is
                another one; None takes its own.
        """
        found = self.moments.input_square_sum
        products = products or self.wanted_products
        if found is None or products is None:
            return self.moments.gram(None)
        return self.moments.gram(products(found.numel()))

    def check_state(self, state: Mapping[str, Tensor]) -> Iterator[Problem]:
        """As `Observer.check_state`; the sums must be of as many columns as the weight has."""
        yield from super().check_state(state)
        seen = count_in(state, "num_input_tokens") > 0
        found = state.get("input_square_sum")
        shape = None if found is None else (found.numel(),)
        cols = getattr(self.module, "in_features", None)
        if self.base_name == "weight" and isinstance(cols, int):
            shape = (cols,)
        yield from check_sum(state, "input_square_sum", shape, needed=seen)

    def _input_problem(self, observation: Observation) -> str | None:
        """Why what was seen gives no weights for a value, if so."""
        if self.base_name != "weight":
            return f"weighs errors of weights only, not of {self.base_name!r}"
        shape = observation.value.shape
        if observation.columns is not None:
            # a shard: its module may have seen the inputs of all columns, or of these
            shape = torch.Size((*shape[:-1], self.moments.columns_behind(observation.columns)))
        return self.moments.problem(shape)

    def mean_squares(self, observation: Observation) -> Tensor:
        """E[x^2] / mean(E[x^2]) of each value's column, float32, of the shape of the values."""
        return self.moments.mean_squares(observation.value, observation.columns)


def share_moments(observers: Sequence[Observer]) -> list[Observer]:
    """Let observers of one weight hold the same moments, of which each input is fed once.

    Args:
        observers: Any, with equal arguments. Those stand alone that take in inputs in a way of
            their own.

    Returns:
        Those to feed with inputs, of the observers that want any (`needs_data`).
    """
    sharing = [
        each
        for each in observers
        if isinstance(each, InputObserver)
        and each.needs_data
        and type(each).observe_input is InputObserver.observe_input
    ]
    # what is summed for one that wants products holds all that the others read
    feeder = next((each for each in sharing if each.wanted_products is not None), None)
    feeder = feeder or next(iter(sharing), None)
    for each in sharing:
        assert feeder is not None
        each.moments = feeder.moments
    return [
        each for each in observers if each.needs_data and (each is feeder or each not in sharing)
    ]


def _sum(past: Tensor | None, current: Tensor) -> Tensor:
    """The sum in float64; `current` itself where there is no other."""
    return current if past is None else past.to(current.device).double() + current
