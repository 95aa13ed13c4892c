"""What the ranks of a calibration observed, brought together before scales are derived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from compressed_tensors.offload import get_execution_device

from calipers.calibration.calls import CallCounter
from calipers.calibration.observed import ObservedModule
from calipers.distributed import Ranks
from calipers.distributed.collectives import gather_objects
from calipers.distributed.reduce import reduce_over
from calipers.observers import Observer

__all__ = ["forget_observed", "reduce_observed"]


def reduce_observed(
    ranks: Ranks,
    model: torch.nn.Module,
    observed: Sequence[ObservedModule],
    calls: CallCounter,
    counts: Mapping[str, int],
) -> dict[str, int]:
    """Let every rank hold what all ranks saw of the modules.

    Statistics of all observers, tokens, calls, and tokens that were held out to judge by.

    Args:
        ranks: The ranks, all of which make this call.
        model: The model; what a rank has nothing of goes to its device.
        observed: The modules: the same on all ranks, in the same order.
        calls: Which modules were called.
        counts: Numbers that add up, by any name.

    Returns:
        The sums of `counts`.

    Raises:
        RankError: See `calipers.distributed.reduce_statistics`.
    """
    if ranks.size == 1:
        return dict(counts)
    device = torch.device(get_execution_device(model, torch.device("cpu")))
    reduce_over(ranks, _observers(observed), "statistics of observers", device=device)
    seen = {each.name: (each.tokens, each.unmasked) for each in observed}
    found = gather_objects(ranks, (seen, calls.counts(), dict(counts)), "counts of tokens")
    for each in observed:
        own = [tokens[each.name] for tokens, _, _ in found]
        each.tokens = sum(tokens for tokens, _ in own)
        each.unmasked = any(unmasked for _, unmasked in own)
        if each.samples is not None:
            each.samples.set_kept(
                gather_objects(ranks, each.samples.kept(), f"tokens held out of {each.name}")
            )
    calls.set_counts(_sum([called for _, called, _ in found]))
    return _sum([own for _, _, own in found])


def forget_observed(observed: Sequence[ObservedModule], calls: CallCounter) -> None:
    """Hold nothing of what was seen, as before the first batch."""
    for observer in _observers(observed):
        observer.reset()
    for each in observed:
        each.tokens, each.unmasked = 0, False
        if each.samples is not None:
            each.samples.set_kept([])
    calls.set_counts({})


def _observers(observed: Sequence[ObservedModule]) -> list[Observer]:
    return [
        observer
        for each in observed
        for tensor in each.tensors.values()
        for observer in tensor.observers
    ]


def _sum(found: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    return {name: sum(each[name] for each in found) for name in found[0]}
