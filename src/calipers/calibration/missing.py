"""Tensors whose observers lack data: finding them, what stands in for them, telling of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from torch import nn

from calipers.calibration.attention import STATES
from calipers.calibration.observed import ObservedModule, ObservedTensor
from calipers.calibration.parts import beyond_language
from calipers.errors import MissingDataError
from calipers.observers import MemorylessMinMaxObserver, Observer, OptimalObserver

__all__ = ["OnMissing", "nearest_neighbours", "set_fallbacks", "settle_missing"]

OnMissing = Literal["error", "skip", "fallback"]


def settle_missing(
    observed: list[ObservedModule], on_missing: OnMissing, batches: int, model: nn.Module
) -> list[ObservedModule]:
    """Decide about tensors that lack data.

    Args:
        observed: The modules; a fallback is found among them.
        on_missing: See `Calibration.freeze`.
        batches: How many there were, for errors.
        model: The model.

    Returns:
        The modules that can be quantized, with fallbacks set where those are asked for.

    Raises:
        MissingDataError: Tensors lack data, as `Calibration.freeze` says.
    """
    missing = find_missing(observed)
    for tensor in missing:
        tensor.fallback = None
    if not missing:
        return observed
    if on_missing == "skip":
        refuse_to_skip_states(missing, batches)
        lacking = {tensor.name for tensor in missing}
        return [each for each in observed if each.name not in lacking]
    if on_missing == "error":
        raise missing_data_error(missing, batches, model, tried_fallback=False)
    left = set_fallbacks(observed, missing)
    if left:
        raise missing_data_error(left, batches, model, tried_fallback=True)
    return observed


def find_missing(observed: Iterable[ObservedModule]) -> list[ObservedTensor]:
    """Activations that were never observed, and weights whose observer wants data it never got."""
    return [
        tensor for each in observed for tensor in each.tensors.values() if tensor.lacks is not None
    ]


def refuse_to_skip_states(missing: Iterable[ObservedTensor], batches: int) -> None:
    """Refuse to leave attention modules without the scheme that others have.

    Raises:
        MissingDataError: Names them and says why.
    """
    lacking = [each for each in missing if each.base_name in STATES]
    if lacking:
        lines = [f"no data reached these states of attention in {batches} batches:"]
        lines += [f"  {each.full_name}: {each.lacks}" for each in lacking]
        lines.append(
            "on_missing='skip' cannot leave them unquantized: loaders give a kv_cache_scheme to "
            "all attention, which would then have scales that nobody measured, and attention "
            "without a scheme does not run beside attention whose queries are quantized. Run "
            "batches that reach them, or freeze with on_missing='fallback'."
        )
        raise MissingDataError("\n".join(lines))


def set_fallbacks(
    observed: Iterable[ObservedModule], missing: Iterable[ObservedTensor]
) -> list[ObservedTensor]:
    """Set the `fallback` of tensors without data; their own observers are not changed.

    A weight gets a copy of its observer that does without importance; an activation gets a fresh
    copy of its observer into which the statistics of its nearest neighbours are merged.

    Args:
        observed: All modules of the calibration.
        missing: The tensors that lack data.

    Returns:
        Those tensors for which there is none.
    """
    tensors = [tensor for each in observed for tensor in each.tensors.values()]
    for each in missing:
        if each.base_name == "weight":
            each.fallback = _without_importance(each.observer)
        else:
            each.fallback = _merged(each, _candidates(each, tensors))
    return [each for each in missing if each.fallback is None]


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


def _candidates(missing: ObservedTensor, tensors: Iterable[ObservedTensor]) -> dict[str, Observer]:
    """Observers of the same kind and arguments that have data, by module name."""
    return {
        each.name: each.observer
        for each in tensors
        if each.base_name == missing.base_name
        and type(each.observer) is type(missing.observer)
        and each.args == missing.args
        and each.lacks is None
    }


def _merged(missing: ObservedTensor, candidates: dict[str, Observer]) -> Observer | None:
    names = nearest_neighbours(missing.name, list(candidates))
    if not names:
        return None
    merged = copy.deepcopy(missing.observer)
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


def missing_data_error(
    missing: Sequence[ObservedTensor], batches: int, model: nn.Module, *, tried_fallback: bool
) -> Exception:
    """One error that lists all of them and what can be done."""
    lines = [f"no data reached these tensors in {batches} batches:"]
    lines += [f"  {each.full_name}: {each.lacks}" for each in missing]
    if tried_fallback:
        lines.append("No neighbour (same name but for its numbers) has data either.")
    if any(each.base_name in STATES for each in missing):
        told = "Run batches that reach them (a cache is quantized in all attention or in none)"
        lines.append(told + ("." if tried_fallback else ", or freeze with"))
    else:
        lines += [
            "Run batches that reach them, put the modules on the ignore list, or freeze with",
            "  on_missing='skip': leaves these modules unquantized" + "," * (not tried_fallback),
        ]
    if not tried_fallback:
        lines.append(
            "  on_missing='fallback': weights use their own range without importance, activations "
            "the merged range of their neighbours (other experts or layers)"
        )
    return MissingDataError("\n".join([*lines, *_way_of_parts(missing, model)]))


def _way_of_parts(missing: Iterable[ObservedTensor], model: nn.Module) -> Iterator[str]:
    """What to do about vision and audio towers that batches of text do not reach."""
    beyond = beyond_language(model, (each.name for each in missing))
    if beyond:
        yield (
            f"{len(beyond)} of these modules lie outside of the language part: give batches with "
            'images or sounds, or leave its towers alone with only="language" (--only language).'
        )
