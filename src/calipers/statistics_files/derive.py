"""`derive_state`: the state that an observer would have, from what was kept of its tensor.

It is what the observer would hold had it seen the same data itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor

from calipers.errors import StatisticsError
from calipers.grouping import ATTENTION_NAMES
from calipers.observers import Observer
from calipers.observers.histogram import HistogramObserver
from calipers.observers.input_moments import InputObserver
from calipers.observers.min_max import StaticMinMaxObserver
from calipers.ranges.input_gram import column_groups
from calipers.statistics_files.kinds import State, unpack

__all__ = ["derive_state", "finest_args", "lacks_products", "product_args"]

_GROUPS = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
_PRODUCTS = ("input_products", "input_sketch")


def product_args(products: int | None) -> QuantizationArgs:
    """Arguments of a weight whose observer sums products as `Options.products` has it."""
    if not products:
        return QuantizationArgs(num_bits=8, strategy="channel")
    return QuantizationArgs(num_bits=8, strategy="group", group_size=products)


def finest_args(base_name: str) -> QuantizationArgs:
    """Arguments by which extremes are kept: of activations by column, of states by head."""
    if base_name in ATTENTION_NAMES:
        return QuantizationArgs(num_bits=8, strategy="attn_head")
    return QuantizationArgs(num_bits=8, strategy="group", group_size=1)


def derive_state(
    observer: Observer, kinds: Mapping[str, State], products: int | None
) -> State | None:
    """The state of an observer that has seen what was gathered of its tensor.

    Args:
        observer: One that has seen nothing yet; it is not changed.
        kinds: Packed states of the tensor by kind.
        products: See `Options.products`.

    Returns:
        What `Observer.load_state` takes; None where the observer learns nothing from data, or where
        no value was seen. Without products of inputs where those of the file do not fit and the
        observer can do without.

    Raises:
        StatisticsError: What is kept does not tell the state; says why, after the observer.
    """
    if observer.base_name == "weight":
        return _of_weight(observer, kinds, products) if observer.needs_data else None
    if type(observer) not in (StaticMinMaxObserver, HistogramObserver):
        raise StatisticsError(
            "statistics files hold extremes and histograms of activations, for the observers "
            "static_minmax and histogram"
        )
    extremes = _need(kinds, "extremes")
    if not int(extremes["num_batches"]):
        return None
    state = observer.state()
    state["observed_dtype"] = extremes["observed_dtype"]
    state["num_nonfinite"] = extremes["num_nonfinite"]
    ends = ("min_vals", "max_vals")
    if observer.args.dynamic:  # "local": the global scale alone
        whole = observer.args.model_copy(update={"strategy": QuantizationStrategy.TENSOR})
        low, high = (_coarser(extremes[end], end, whole) for end in ends)
        count = extremes["num_batches"]
        state.update(global_min_vals=low, global_max_vals=high, num_global_batches=count)
        return state
    low, high = (_coarser(extremes[end], end, observer.args) for end in ends)
    state.update(min_vals=low, max_vals=high, num_batches=extremes["num_batches"])
    if type(observer) is HistogramObserver:
        state.update(_counts(kinds, observer.args))
    return state


def lacks_products(observer: Observer, state: State) -> bool:
    """Whether an observer gets by a state without the products of inputs that it would take."""
    wants = isinstance(observer, InputObserver) and observer.wanted_products is not None
    return wants and "input_products" not in state


def _of_weight(
    observer: Observer, kinds: Mapping[str, State], products: int | None
) -> State | None:
    standard = (
        isinstance(observer, InputObserver)
        and type(observer).observe_input is InputObserver.observe_input
        and type(observer).attach is Observer.attach
    )
    if not standard:
        raise StatisticsError("takes in inputs in a way of its own, which no file keeps")
    assert isinstance(observer, InputObserver)
    moments = _need(kinds, "moments")
    if not int(moments["num_input_tokens"]):
        return None
    wanted = observer.wanted_products
    if wanted is not None:
        cols = moments["input_square_sum"].numel()
        asked = wanted(cols)
        held = None if products is None else column_groups(product_args(products), cols, None)
        fits = held is not None and (
            (held.blocks, held.size) == (asked.blocks, asked.size)
            and torch.equal(held.index, asked.index)
        )
        if not fits and observer.can_lack_products:
            wanted = None
        elif not fits:
            kept = "none" if products is None else "those of whole rows"
            kept = f"those of {products} columns" if products else kept
            block = observer.args.block_structure
            width = observer.args.group_size or (block[1] if block else 0)
            raise StatisticsError(
                "needs products of inputs"
                + (f" of groups of {width} columns" if width else " of whole rows")
                + f", and the file holds {kept}: observe with products={width} "
                f"(--products {width})"
            )
    kept_entries = {k: v for k, v in moments.items() if wanted is not None or k not in _PRODUCTS}
    return {**observer.state(), **kept_entries}


def _need(kinds: Mapping[str, State], kind: str, way: str = "") -> State:
    if kind not in kinds:
        raise StatisticsError(
            f"the file holds no {kind} of it, only {', '.join(kinds) or 'nothing'}{way}"
        )
    return unpack(kinds[kind])


def _coarser(ends: Tensor, entry: str, args: QuantizationArgs) -> Tensor:
    """Extremes by the qparams of a strategy, from those by column or by head."""
    strategy = QuantizationStrategy(args.strategy)
    least = entry == "min_vals"
    if strategy == QuantizationStrategy.TENSOR:
        return (ends.amin() if least else ends.amax()).reshape(1)
    if strategy == QuantizationStrategy.ATTN_HEAD:
        return ends
    if strategy not in _GROUPS or not args.group_size:
        raise StatisticsError(f"a static scale by {strategy.value!r} cannot be derived from a file")
    short = -len(ends) % args.group_size
    padded = torch.nn.functional.pad(ends, (0, short), value=torch.inf if least else -torch.inf)
    groups = padded.view(-1, args.group_size)
    return groups.amin(1) if least else groups.amax(1)


def _counts(kinds: Mapping[str, State], args: QuantizationArgs) -> State:
    held = _need(kinds, "histogram", ": observe with histograms=True (--histograms)")
    found: State = {name: held[name] for name in ("counts", "offsets") if name in held}
    strategy = QuantizationStrategy(args.strategy)
    if strategy == QuantizationStrategy.TENSOR:
        return {name: each.flatten(0, -2).sum(0, keepdim=True) for name, each in found.items()}
    if strategy == QuantizationStrategy.ATTN_HEAD:
        return found
    raise StatisticsError(
        f"the file holds one histogram for a tensor, and strategy {strategy.value!r} needs more"
    )
