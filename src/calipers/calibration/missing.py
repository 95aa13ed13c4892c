"""Modules whose observers lack data: finding them, and telling of them all at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from calipers.calibration.observed import ObservedModule, args_of
from calipers.errors import MissingDataError
from calipers.observers import Observer

__all__ = ["Missing", "find_missing", "missing_data_error"]


@dataclass(frozen=True)
class Missing:
    """One tensor of a module, "weight", "input" or "output", whose observer lacks data."""

    observed: ObservedModule
    base_name: str

    @property
    def name(self) -> str:
        """The tensor's name: module and base name."""
        return f"{self.observed.name}.{self.base_name}"

    @property
    def reason(self) -> str:
        """What its observer lacks."""
        if self.base_name == "weight":
            return "its observer weighs by the layer's inputs and saw no token"
        return "its observer saw no value"


def find_missing(observed: Iterable[ObservedModule]) -> list[Missing]:
    """Activations that were never observed, and weights whose observer wants data it never got."""
    return [
        Missing(each, base_name)
        for each in observed
        for base_name, observer in each.observers.items()
        if _lacks_data(each, base_name, observer)
    ]


def _lacks_data(observed: ObservedModule, base_name: str, observer: Observer) -> bool:
    if base_name == "weight":
        return observer.needs_data and not observer.has_data
    if args_of(observed.scheme, base_name).dynamic:  # "local": the global scale alone
        return not observer.has_global_statistics
    return not observer.has_statistics


def missing_data_error(
    missing: Sequence[Missing], batches: int, *, tried_fallback: bool
) -> Exception:
    """One error that lists all of them and what can be done."""
    lines = [f"no data reached these tensors in {batches} batches:"]
    lines += [f"  {each.name}: {each.reason}" for each in missing]
    if tried_fallback:
        lines.append("No neighbour (same name but for its numbers) has data either.")
    lines.append("Run batches that reach them, put the modules on the ignore list, or freeze with")
    lines.append(
        "  on_missing='skip': leaves these modules unquantized" + ("" if tried_fallback else ",")
    )
    if not tried_fallback:
        lines.append(
            "  on_missing='fallback': weights use their own range without importance, activations "
            "the merged range of their neighbours (other experts or layers)"
        )
    return MissingDataError("\n".join(lines))
