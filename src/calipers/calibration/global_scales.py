"""`shared_global_scale`: the global scale that the members of a fused group share (NVFP4)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from calipers.calibration.observed import ObservedTensor
from calipers.errors import CalipersError
from calipers.observers import Observer

__all__ = ["borrowed_memory", "shared_global_scale", "weight_of"]

#: Global scales that are compared, over the smallest of a fused group: codes of local scales lie an
#: eighth of an octave apart at most, and these are the phases between. And by how many values.
_GLOBAL_FACTORS = tuple(2 ** (-step / 32) for step in range(4))
_SAMPLE = 2**18


def shared_global_scale(members: Sequence[ObservedTensor]) -> torch.Tensor:
    """One global scale for tensors of one base name, from the smallest of their own.

    A global scale is 448 * 6 / amax, so the smallest is that of the group's largest value. Members
    that are zero throughout have none of their own and are not asked. For weights, of which a
    sample each is kept meanwhile, a few below it are compared by the errors of all members.

    Args:
        members: Tensors of the strategy TENSOR_GROUP, at least one.

    Returns:
        Shape (1,), float32.
    """
    own: list[torch.Tensor] = []
    of_values: list[torch.Tensor] = []
    samples: dict[str, tuple[torch.Tensor, float]] = {}
    for each in members:
        observer = each.deciding
        weight = weight_of(each) if each.base_name == "weight" else None
        with borrowed_memory(observer, needed=weight is not None):
            scale = observer.get_global_scale(weight)
            if scale is None:
                raise CalipersError(f"{observer.name}: the observer gave no global scale")
            own.append(scale)
            if observer.has_global_values:
                of_values.append(scale)
        if weight is not None:
            rows = weight.flatten(0, -2)
            step = max(1, rows.numel() // _SAMPLE)
            samples[each.name] = rows[::step].clone(), len(rows) / len(rows[::step])
    asked = of_values or own
    shared = torch.stack([scale.to(asked[0].device) for scale in asked]).amin(dim=0)
    return _best_below(members, samples, shared) if samples else shared


def _best_below(
    members: Sequence[ObservedTensor],
    samples: Mapping[str, tuple[torch.Tensor, float]],
    shared: torch.Tensor,
) -> torch.Tensor:
    """The best of a few by the errors of all members; `shared` where they cannot tell.

    A sample is some rows of a weight, and how many each of them stands for.
    """
    scales = [shared * factor for factor in _GLOBAL_FACTORS]
    total = torch.zeros(len(scales), dtype=torch.float64, device="cpu")
    for each in members:
        rows, factor = samples[each.name]
        with borrowed_memory(each.deciding):
            errors = each.deciding.global_scale_errors(rows, [s.to(rows.device) for s in scales])
        if errors is None:
            return shared
        total += errors.cpu() * factor
    return scales[int(total.argmin())] if bool(total.isfinite().all()) else shared


def weight_of(tensor: ObservedTensor) -> torch.Tensor:
    """The module's weight, brought in where it is offloaded: ask once, keep it while needed."""
    assert tensor.module is not None
    weight: torch.Tensor = tensor.module.get_parameter("weight")
    return weight


@contextmanager
def borrowed_memory(observer: Observer, *, needed: bool = True) -> Iterator[None]:
    """Give a weight's observer memory for its work alone; what it had gathered before is kept."""
    gathered = {name: value.clone() for name, value in observer.state().items()} if needed else None
    try:
        yield
    finally:
        if gathered is not None:
            observer.load_state(gathered)
