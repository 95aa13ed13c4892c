"""`check_scheme`: everything that would fail later, found before any work and told at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from compressed_tensors.quantization import QuantizationConfig

from calipers.calibration.forward_checks import find_forward_problems, find_hook_problems
from calipers.calibration.fused import find_fused_problems
from calipers.calibration.group_sizes import (
    fitting_group_sizes,
    has_free_group_size,
    suggest_group_size,
)
from calipers.calibration.kinds import ModuleProblem, group_problems
from calipers.calibration.module_checks import find_module_problems, find_shape_problems
from calipers.calibration.pattern_checks import find_pattern_problems
from calipers.calibration.targets import Resolution, Target, resolve_modules
from calipers.errors import CalipersError, SchemeError

__all__ = ["OnUnfit", "check_scheme", "resolve_and_check"]

#: What to do about modules of a shape that their scheme cannot take.
OnUnfit = Literal["error", "skip"]


def check_scheme(model: torch.nn.Module, config: QuantizationConfig) -> list[Target]:
    """Check that every module can take the scheme which the config gives it.

    Found here: target and ignore patterns that match nothing (an ignored "lm_head" is only warned
    of), modules of a type that compressed-tensors cannot quantize, modules already quantized,
    weights that accelerate offloads or that are no parameters, a forward replaced on an instance,
    group sizes that do not divide a module's columns, strategies and number formats that the layer
    or compressed-tensors cannot take, and NVFP4 for some members of a fused layer alone.

    Args:
        model: Any model, offloaded or not; nothing in it is changed.
        config: As `resolve_config` returns it.

    Returns:
        The modules to quantize with their schemes, in the model's order; empty where the
        config quantizes nothing ("UNQUANTIZED").

    Raises:
        SchemeError: One error that lists every offending pattern, and each reason with the
            modules that it concerns. Where a group size does not divide columns it also names the
            sizes that divide all of them.
    """
    return resolve_and_check(model, config).targets


def resolve_and_check(
    model: torch.nn.Module, config: QuantizationConfig, on_unfit: OnUnfit = "error"
) -> Resolution:
    """As `check_scheme`; the answer also says what is left alone and why.

    Args:
        model: Any model; nothing in it is changed.
        config: As `resolve_config` returns it.
        on_unfit: "skip" leaves modules alone whose columns a group size does not divide.

    Raises:
        SchemeError: As `check_scheme`.
        CalipersError: `on_unfit` is unknown.
    """
    if on_unfit not in get_args(OnUnfit):
        raise CalipersError(
            f"on_unfit must be one of {', '.join(get_args(OnUnfit))}, got {on_unfit!r}"
        )
    resolution = resolve_modules(model, config)
    if on_unfit == "skip":
        unfit = [each.name for each in resolution.targets if any(find_shape_problems(each))]
        resolution = resolution.without(dict.fromkeys(unfit, "shape"))
    problems = list(group_problems(_find_problems(model, config, resolution)))
    if problems:
        problems += _ways_out(resolution)
        raise SchemeError("\n  ".join(["the model cannot take this scheme:", *problems]))
    return resolution


def _find_problems(
    model: torch.nn.Module, config: QuantizationConfig, resolution: Resolution
) -> Iterator[ModuleProblem | str]:
    yield from find_pattern_problems(model, config, resolution)
    if resolution.targets:
        yield from find_hook_problems(model)
    for target in resolution.targets:
        for reason in (*find_module_problems(target), *find_forward_problems(target)):
            yield ModuleProblem(target.name or type(target.module).__name__, reason)
    yield from find_fused_problems(model, resolution)


def _ways_out(resolution: Resolution) -> Iterator[str]:
    """What to do about columns that a group size does not divide."""
    unfit = [each for each in resolution.targets if any(find_shape_problems(each))]
    if not unfit:
        return
    skip = 'on_unfit="skip" (--on-unfit skip) leaves those modules alone'
    # all columns must be divided, not only those of the modules that are in the way now
    sizes = fitting_group_sizes(resolution.targets)
    if sizes and any(has_free_group_size(each.scheme.weights) for each in unfit):
        best = suggest_group_size(resolution.targets)
        yield f"group sizes that divide all columns of weights: {', '.join(map(str, sizes))}"
        size = f'scheme_options={{"group_size": {best}}} (--group-size {best})'
        yield f"what to do: {size}; or {skip}"
    else:
        yield f"what to do: {skip}"
