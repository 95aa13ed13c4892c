"""`find_substitutes`: observers that stand in for those that saw no data."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from calipers.calibration.missing import Missing, find_missing
from calipers.calibration.observed import ObservedModule, args_of
from calipers.observers import MemorylessMinMaxObserver, Observer, OptimalObserver

__all__ = ["Substitutes", "find_substitutes", "nearest_neighbours"]

# (module name, base name) to the observer that is asked in place of the module's own
Substitutes = dict[tuple[str, str], Observer]


def find_substitutes(
    observed: Sequence[ObservedModule], missing: Sequence[Missing]
) -> tuple[Substitutes, list[Missing]]:
    """Observers for tensors without data; those of the modules themselves are not changed.

    A weight gets a copy of its observer that does without importance; an activation gets a fresh
    copy of its observer into which the statistics of its nearest neighbours are merged.

    Args:
        observed: All modules of the calibration.
        missing: The tensors that lack data.

    Returns:
        The substitutes, and those tensors for which there is none.
    """
    lacking = {each.name for each in find_missing(observed)}
    substitutes: Substitutes = {}
    left = []
    for each in missing:
        own = each.observed.observers[each.base_name]
        if each.base_name == "weight":
            found: Observer | None = _without_importance(own)
        else:
            found = _merged(own, _candidates(each, observed, lacking), each)
        if found is None:
            left.append(each)
        else:
            substitutes[each.observed.name, each.base_name] = found
    return substitutes, left


def nearest_neighbours(name: str, others: Sequence[str]) -> list[str]:
    """Names equal to `name` but for their numbers, of the nearest kind there is.

    Members of the same list come first (other experts of the layer, all of them alike), then
    those of the nearest layers, on both sides where they are equally near.

    Args:
        name: A module's name, "model.layers.3.mlp.experts.7.up_proj".
        others: Names to choose from.

    Returns:
        The nearest, in the order of `others`; empty where none differs in numbers alone.
    """
    shape, numbers = _split_numbers(name)
    distances: dict[str, tuple[int, int]] = {}
    for other in others:
        other_shape, other_numbers = _split_numbers(other)
        if other != name and other_shape == shape:
            distances[other] = _distance(numbers, other_numbers)
    nearest = min(distances.values(), default=None)
    return [other for other, distance in distances.items() if distance == nearest]


def _split_numbers(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    parts = name.split(".")
    shape = tuple("#" if part.isdecimal() else part for part in parts)
    return shape, tuple(int(part) for part in parts if part.isdecimal())


def _distance(numbers: tuple[int, ...], others: tuple[int, ...]) -> tuple[int, int]:
    """Smaller is nearer: first by how late the numbers part, then by how far apart layers are."""
    pairs = list(zip(numbers, others, strict=True))
    parting = next(index for index, (mine, other) in enumerate(pairs) if mine != other)
    # layers follow each other, so nearer ones are more alike; experts are in no order
    apart = abs(numbers[0] - others[0]) if parting == 0 else 0
    return -parting, apart


def _candidates(
    missing: Missing, observed: Sequence[ObservedModule], lacking: set[str]
) -> dict[str, Observer]:
    """Observers of the same kind and arguments that have data, by module name."""
    base_name = missing.base_name
    args = args_of(missing.observed.scheme, base_name)
    own = missing.observed.observers[base_name]
    return {
        each.name: each.observers[base_name]
        for each in observed
        if type(each.observers.get(base_name)) is type(own)
        and f"{each.name}.{base_name}" not in lacking
        and args_of(each.scheme, base_name) == args
    }


def _merged(own: Observer, candidates: dict[str, Observer], missing: Missing) -> Observer | None:
    names = nearest_neighbours(missing.observed.name, list(candidates))
    if not names:
        return None
    merged = copy.deepcopy(own)
    for name in names:
        merged.merge(candidates[name])
    return merged


def _without_importance(own: Observer) -> Observer:
    if isinstance(own, OptimalObserver):
        # The plain squared error of a weight can be a worse guide than its range.
        args = own.args.model_copy(update={"observer_kwargs": {}})
        plain = MemorylessMinMaxObserver(own.base_name, args, own.module)
        plain.name = own.name
        return plain
    options = dict(own.args.observer_kwargs)
    if "strict" in own.Options.model_fields:
        options["strict"] = False  # strict refuses to go without importance
    args = own.args.model_copy(update={"observer_kwargs": options})
    substitute = type(own)(base_name=own.base_name, args=args, module=own.module)
    substitute.name = own.name
    return substitute
