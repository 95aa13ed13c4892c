"""`fitting_group_sizes`: the group sizes that divide the columns of all modules."""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

from calipers.calibration.targets import Target

__all__ = ["fitting_group_sizes", "has_free_group_size", "suggest_group_size"]

#: Below this the scales of a group take as much room as its codes, or nearly.
_SMALLEST = 8


def has_free_group_size(args: QuantizationArgs | None) -> bool:
    """Whether these weights have groups whose size is a choice.

    It is none in NVFP4 (tensor_group) and in MX formats, whose scales are powers of two: their
    group size is part of the format.
    """
    return (
        args is not None
        and args.strategy == QuantizationStrategy.GROUP
        and args.scale_dtype is not torch.uint8
    )


def fitting_group_sizes(targets: Iterable[Target]) -> list[int]:
    """Powers of two, from 8 up to the columns, that divide the columns of every weight.

    Args:
        targets: Modules; those whose weights have no groups of a size that could be another do not
            matter.

    Returns:
        The largest first; empty where there is none, or no weight that matters.
    """
    common = 0
    with disable_onloading():
        for target in targets:
            weight = getattr(target.module, "weight", None)
            if isinstance(weight, torch.Tensor) and has_free_group_size(target.scheme.weights):
                common = gcd(common, weight.shape[-1])
    largest = common & -common  # the largest power of two that divides it
    return [1 << power for power in range(largest.bit_length() - 1, _SMALLEST.bit_length() - 2, -1)]


def suggest_group_size(targets: Iterable[Target]) -> int | None:
    """The group size nearest to the usual 128, but not above, that fits all; None without any."""
    return next((size for size in fitting_group_sizes(targets) if size <= 128), None)
