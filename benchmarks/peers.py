"""Observers of calipers and, as its peer, of llmcompressor, ready to be called."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from benchmarks.timing import Call
from calipers.observers import Observer
from calipers.ranges import Grouping, min_max

__all__ = [
    "Answer",
    "canonical",
    "canonical_importance",
    "chosen_engine",
    "error_of",
    "give_importance",
    "our_min_max",
    "our_observer",
    "peer_observer",
    "steps_of",
]

Range = tuple[Tensor, Tensor]


class Answer:
    """A call to time and the range that it found last.

    `module` is kept for the observer, which holds it weakly.
    """

    def __init__(
        self,
        run: Callable[[], object],
        found: Callable[[], Range],
        prepare: Callable[[], object] | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        self.call = Call(run) if prepare is None else Call(run, prepare)
        self.module = module
        self._found = found

    def range(self) -> Range:
        """Call once and return minimum and maximum, flattened."""
        self.call.prepare()
        self.call.run()
        low, high = self._found()
        return low.flatten(), high.flatten()


@contextmanager
def chosen_engine(name: str | None) -> Iterator[None]:
    """CALIPERS_ENGINE for a while; None leaves the choice as it is."""
    before = os.environ.get("CALIPERS_ENGINE")
    if name is not None:
        os.environ["CALIPERS_ENGINE"] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("CALIPERS_ENGINE", None)
        else:
            os.environ["CALIPERS_ENGINE"] = before


def our_observer(
    name: str,
    args: QuantizationArgs,
    options: Mapping[str, Any],
    weight: Tensor,
    importance: Tensor | None,
    *,
    whole_call: bool = False,
    global_scale: bool = False,
) -> Answer:
    """`observer.observe(weight)`; before each call statistics are reset and E[x^2] is put back.

    With `whole_call` the qparams are derived as well; with `global_scale` the module has its own.
    """
    module = torch.nn.Module()
    observer = Observer.load_from_registry(name, "weight", args, module, **options)
    if global_scale:
        module.weight_global_scale = observer.get_global_scale(weight)

    def prepare() -> None:
        observer.reset()
        if importance is not None:
            give_importance(observer, importance)

    def found() -> Range:
        state = observer.state()
        return state["min_vals"], state["max_vals"]

    def run() -> None:
        observer.observe(weight)
        if whole_call:
            observer.get_qparams()

    return Answer(run, found, prepare, module)


def give_importance(observer: Observer, importance: Tensor) -> None:
    """Put E[x^2] of the columns into an observer that has seen nothing, as if of one token."""
    seen = {"input_square_sum": importance.double(), "num_input_tokens": torch.tensor(1)}
    observer.load_state({**observer.state(), **seen})


def our_min_max(args: QuantizationArgs, weight: Tensor) -> Answer:
    """`calipers.ranges.min_max` over the groups of a weight, without an observer."""
    last: list[Range] = []

    def run() -> None:
        grouping = Grouping.of(weight.shape, "weight", args)
        low, high = grouping.join([min_max(groups) for groups in grouping.split(weight)])
        last[:] = [(low, high)]

    return Answer(run, lambda: last[0], last.clear)


def peer_observer(
    name: str,
    args: QuantizationArgs,
    options: Mapping[str, Any],
    weight: Tensor,
    importance: Tensor | None,
    *,
    whole_call: bool = False,
) -> Answer:
    """`observer.update_statistics_from_observed(flatten_for_calibration(weight))` of the peer.

    With `whole_call` the qparams are derived as well.
    """
    from llmcompressor.observers import Observer as PeerObserver
    from llmcompressor.observers.helpers import flatten_for_calibration

    # Its observers write their options into the arguments they are given.
    own_args = args.model_copy(update={"observer_kwargs": {}})
    observer = PeerObserver.load_from_registry(name, base_name="weight", args=own_args, **options)
    if importance is not None:
        observer._imatrix_sum = importance.float()
        observer._imatrix_count = torch.tensor(1)

    @torch.no_grad()
    def run() -> None:
        observed = flatten_for_calibration(weight, "weight", own_args)
        observer.update_statistics_from_observed(observed)
        found[:] = [(observer.min_vals, observer.max_vals)]
        if whole_call:
            observer.get_qparams()  # which deletes the statistics

    found: list[Range] = []
    return Answer(run, lambda: found[0])


# -- what the answers are checked with: written apart from the code under test --------------------


def canonical(weight: Tensor, args: QuantizationArgs) -> Tensor:
    """Values of a weight as (groups, group size); only shapes without a ragged edge."""
    rows, cols = weight.shape
    if args.strategy == "tensor":
        return weight.reshape(1, -1)
    if args.strategy == "channel":
        return weight
    if args.strategy == "block":
        high, wide = args.block_structure or (1, 1)
        blocks = weight.reshape(rows // high, high, cols // wide, wide)
        return blocks.transpose(1, 2).reshape(-1, high * wide)
    return weight.reshape(-1, args.group_size or cols)


def canonical_importance(importance: Tensor, weight: Tensor, args: QuantizationArgs) -> Tensor:
    """E[x^2] of the columns for each value of `canonical(weight, args)`."""
    return canonical(importance.float().expand(weight.shape), args)


def steps_of(found: Range, whole: Range, grid: float) -> Tensor:
    """Step of the shrink grid at which a range lies, by its length; 0 for a range of nothing."""
    length = found[1].double() - found[0].double()
    full = whole[1].double() - whole[0].double()
    shrink = torch.where(full > 0, length / full, 1.0)
    return torch.round((1 - shrink) * grid).int()


def error_of(
    found: Range, values: Tensor, weights: Tensor | None, args: QuantizationArgs, norm: float
) -> Tensor:
    """Error of each group under a range, summed in float64; `values` are (groups, group size)."""
    # Local scales are searched unrounded by both, since there is no global scale here.
    free = args.model_copy(update={"scale_dtype": None})
    low, high = (t.float().unsqueeze(-1) for t in found)
    scale, zero_point = calculate_qparams(low, high, free, global_scale=None)
    token_args = free.model_copy(update={"strategy": "token"})
    rounded = fake_quantize(values.float(), scale, zero_point, token_args)
    loss: Tensor = (rounded.double() - values.double()).abs().pow(norm)
    if weights is not None:
        loss *= weights
    return loss.sum(-1)
