"""`refuse_unequal`: layers that engines fuse have one global scale (NVFP4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from calipers._words import listing
from calipers.calibration.fused import find_fused_groups
from calipers.errors import CheckpointError

__all__ = ["refuse_unequal"]

_LISTED = 20
_GLOBAL_SCALES = ("weight_global_scale", "input_global_scale")


def refuse_unequal(modules: Mapping[str, nn.Module]) -> None:
    """Refuse fused layers whose global scales differ: vLLM runs all with the largest of them.

    Args:
        modules: The quantized modules of a model, by name.

    Raises:
        CheckpointError: Names the layers and the scale.
    """
    unequal = [
        f"{' + '.join(having)} ({key})"
        for names in find_fused_groups(modules)
        for key in _GLOBAL_SCALES
        if len(having := [name for name in names if key in modules[name]._parameters]) > 1
        and not _are_equal([getattr(modules[name], key) for name in having])
    ]
    if unequal:
        raise CheckpointError(
            f"groups of layers that engines fuse into one: {len(unequal)} have unequal global "
            "scales: vLLM would take the largest for all of them, and compute with wrong weights "
            f"or inputs. Calibrate the layers of each together: {listing(unequal, _LISTED)}"
        )


def _are_equal(scales: Sequence[torch.Tensor]) -> bool:
    known = [each.cpu() for each in scales if not each.is_meta]
    return all(torch.equal(each, known[0]) for each in known[1:])
