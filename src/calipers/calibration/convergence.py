"""`Watch`: ends the data once the scales of all modules have settled."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from compressed_tensors.quantization import QuantizationStrategy
from torch import Tensor

from calipers.calibration.global_scales import borrowed_memory, weight_of
from calipers.calibration.observed import ObservedModule, ObservedTensor, relative_change
from calipers.calibration.report import Stability
from calipers.calibration.targets import GROUPED, has_global_scale
from calipers.errors import CalipersError
from calipers.observers.input_moments import InputObserver
from calipers.observers.optimal import OptimalObserver

__all__ = ["Watch", "expect_limit", "refuse_until_stable"]

#: Rows of a weight whose scales are derived, and the strategies whose scales span no others.
_ROWS = 8
_BY_ROW = (*GROUPED, QuantizationStrategy.CHANNEL)


def expect_limit(until_stable: float | None) -> None:
    """Refuse what is no share to move by.

    Raises:
        CalipersError: Says what came.
    """
    if until_stable is None:
        return
    number = isinstance(until_stable, (int, float)) and not isinstance(until_stable, bool)
    if not number or not 0 < until_stable < 1:
        raise CalipersError(
            "until_stable: expected by what share scales may still move, above 0 and below 1 "
            f"(0.01 is 1%), got {until_stable!r}"
        )


def refuse_until_stable(*, blocks: bool, statistics: bool) -> None:
    """Refuse to end data early where it does not come batch by batch.

    Raises:
        CalipersError: Says why.
    """
    told = "until_stable (--until-stable) needs memory='whole' (--memory whole)"
    if blocks:
        raise CalipersError(
            f"{told}: in blocks all batches pass the first one before any comes to the second, so "
            "that they are not fewer once scales have settled"
        )
    if statistics:
        raise CalipersError(
            "until_stable (--until-stable): statistics stand in for data, of which none is run"
        )


class Watch:
    """Looks at scales each time that the tokens have doubled.

    Args:
        observed: The modules whose observers see the batches.
        limit: All of them are settled once none moves by this share or more.

    Attributes:
        stability: What was found so far.
    """

    def __init__(self, observed: Sequence[ObservedModule], limit: float) -> None:
        self.stability = Stability(limit)
        self._observed = [each for each in observed if each.wants_data]
        self._batches = self._tokens = 0
        self._before: dict[str, Tensor] = {}

    def batches(self, batches: Iterable[Any]) -> Iterable[Any]:
        """The batches, up to the one after which all scales are settled."""
        return _Watched(batches, self)

    def settled(self) -> bool:
        """Count one more batch, look where it is time, and tell whether nothing moves any more."""
        self._batches += 1
        tokens = max((each.tokens for each in self._observed), default=0)
        if not tokens or tokens < 2 * self._tokens:
            return False
        now = {
            tensor.full_name: value
            for each in self._observed
            for tensor in each.tensors.values()
            if (value := _so_far(tensor)) is not None
        }
        moves = {name: _movement(name, self._before[name], now[name]) for name in self._before}
        complete = bool(now) and moves.keys() == now.keys()
        self._before, self._tokens = now, tokens
        if not complete:
            return False
        slowest = max(moves, key=lambda name: moves[name])
        moved = moves[slowest] if math.isfinite(moves[slowest]) else None
        reached = moves[slowest] < self.stability.limit
        found = self.stability
        found.reached, found.batches, found.tokens = reached, self._batches, tokens
        found.moved, found.slowest = moved, slowest
        return reached


class _Watched:
    """As many batches as there are, as far as that is known, or fewer."""

    def __init__(self, batches: Iterable[Any], watch: Watch) -> None:
        self._batches, self._watch = batches, watch

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]  # a TypeError says that none is known

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield batch
            if self._watch.settled():
                return


def _so_far(tensor: ObservedTensor) -> Tensor | None:
    """What the scales of a tensor would be by now; None where they do not hang on data.

    Of a weight they are those of a few of its rows; where scales span rows, the importance of its
    columns stands for them. For the objective "hessian" that of "imatrix" stands: in which of many
    ways groups of a row make up for each other may be another with every batch, and as good.
    """
    observer = tensor.observer
    if tensor.base_name != "weight":
        return tensor.so_far()
    if not isinstance(observer, InputObserver) or not observer.needs_data or not observer.has_data:
        return None
    if tensor.args.strategy not in _BY_ROW:
        gram = observer.moments.gram(None)
        return None if gram is None else gram.diagonal
    if isinstance(observer, OptimalObserver) and observer.objective == "hessian":
        observer = observer.by_importance()
    weight = weight_of(tensor)
    rows = weight[:: max(1, len(weight) // _ROWS)][:_ROWS]
    with borrowed_memory(observer):
        shared = observer.get_global_scale(rows) if has_global_scale(tensor.args) else None
        scale, _ = observer.get_qparams(rows, global_scale=shared)
    return scale


def _movement(name: str, before: Tensor, now: Tensor) -> float:
    """The largest relative change of a scale; of a weight, which has many, the mean of it."""
    if before.shape != now.shape:
        return math.inf
    if not name.endswith(".weight"):
        return relative_change(before, now) or 0.0
    before, now = before.to(now.device).double(), now.double()
    changes = ((now - before).abs() / now.abs())[now != 0]
    return float(changes.mean()) if len(changes) else 0.0
