"""Scales of `optimal` in llmcompressor's GPTQ, chosen on weights as its feedback changes them."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from compressed_tensors.quantization import ActivationOrdering, QuantizationStrategy
from loguru import logger

from calipers.observers.optimal import OptimalObserver
from calipers.ranges.gptq import refine_for_gptq

__all__ = ["MODULE", "choose_scales_for_gptq"]

#: Where llmcompressor's modifier finds the function that rounds a batch of weights.
MODULE = "llmcompressor.modifiers.gptq.base"

#: Strategies whose groups lie within a row.
_REFINED = (
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.GROUP,
    QuantizationStrategy.TENSOR_GROUP,
)


def choose_scales_for_gptq() -> Callable[[], None]:
    """Have llmcompressor's GPTQ round to scales that are chosen for it.

    Those of observers other than `optimal`, and of other strategies, stay as they are.

    Returns:
        What undoes it.
    """
    module: Any = importlib.import_module(MODULE)
    original = module.quantize_weight
    signature = inspect.signature(original)

    @functools.wraps(original)
    def quantize_weight(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        _choose(given.arguments)
        return original(*args, **kwargs)

    module.quantize_weight = quantize_weight
    return lambda: setattr(module, "quantize_weight", original)


def _choose(given: dict[str, Any]) -> None:
    """Change the scales and zero points of a batch of weights, in place."""
    args = given["quant_args"]
    observer = _observer_of(args)
    if (
        observer is None
        or args.strategy not in _REFINED
        or args.actorder == ActivationOrdering.GROUP
    ):
        return
    for number, weight in enumerate(given["weights"]):
        scale, zero_point = given["scale"][number], given["zero_point"][number]
        shared = given["global_scale"]
        new, new_zero = refine_for_gptq(
            weight,
            given["hessians"][number],
            scale,
            zero_point,
            args,
            global_scale=None if shared is None else shared[number].reshape(1),
            by_importance=args.actorder in (ActivationOrdering.STATIC, ActivationOrdering.WEIGHT),
            damping=given["percdamp"],
            block=given["blocksize"],
            negative_scales=observer.negative_scales,
        )
        changed = (new != scale).float().mean()
        logger.debug("GPTQ: {:.0%} of the scales of a weight were chosen anew", float(changed))
        scale.copy_(new)
        zero_point.copy_(new_zero)


def _observer_of(args: Any) -> OptimalObserver | None:
    """The observer that the scales are of, where it is `optimal`."""
    from llmcompressor.observers import Observer as PeerObserver

    from calipers.integrations.llmcompressor.adapter import Adapter

    if args.observer is None:
        return None
    found = PeerObserver.get_value_from_registry(args.observer)
    if not isinstance(found, type) or not issubclass(found, Adapter):
        return None
    inner = found("weight", args).inner
    return inner if isinstance(inner, OptimalObserver) else None
