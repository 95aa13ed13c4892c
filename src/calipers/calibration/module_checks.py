"""Why one module cannot take its scheme, or a quantized forward, in compressed-tensors 0.19.

Each rule was found by trying: what `apply_quantization_config` or the fake-quantized forward
refuses, what it accepts but turns into something else, and what it would pass over.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationType,
)
from compressed_tensors.quantization.utils import is_module_quantized
from torch import nn

from calipers.calibration.architectures import has_own_forward
from calipers.calibration.attention import find_state_problems
from calipers.calibration.targets import (
    ACTIVATION_STRATEGIES,
    GROUPED,
    WEIGHT_STRATEGIES,
    Target,
)
from calipers.formats import FLOAT_FORMATS, is_known_to_library
from calipers.observers.sharded import is_spread
from calipers.ranges.qparams import scale_dtype_problem

__all__ = [
    "find_forward_problems",
    "find_hook_problems",
    "find_module_problems",
    "find_shape_problems",
]

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_module_problems(target: Target) -> Iterator[str]:
    """One reason for each thing that the module cannot take; none where all is well."""
    module = target.module
    if is_module_quantized(module) or hasattr(module, "quantization_status"):
        yield "is already quantized"
        return
    if target.is_attention:
        yield from _attention_problems(target)
        return
    with disable_onloading():
        weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in _WEIGHT_DTYPES:
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        yield f"its weight must be a float16, bfloat16, float32 or float64 tensor, got {kind}"
        return
    if is_spread(weight):
        yield (
            "its weight is a DTensor that is spread over ranks, which compressed-tensors can "
            "neither run nor save: calibrate a whole model on each rank, or derive scales by the "
            "observer itself (Observer.get_qparams)"
        )
        return
    for base_name, args in target.args.items():
        what = "weights" if base_name == "weight" else f"{base_name} activations"
        yield from (f"{what}: {reason}" for reason in _args_problems(target, base_name, args))
        yield from (f"{what}: {reason}" for reason in _scale_dtype_problems(args, weight.dtype))
        yield from _shape_problems(target, base_name, args, weight)


def _attention_problems(target: Target) -> Iterator[str]:
    args = target.scheme.input_activations
    if args is None:
        return
    yield from find_state_problems(target.module, args)
    yield from (f"states of attention: {reason}" for reason in _format_problems(args))
    with disable_onloading():
        dtype = next((each.dtype for each in target.module.parameters()), torch.float32)
    yield from (f"states of attention: {reason}" for reason in _scale_dtype_problems(args, dtype))


def find_shape_problems(target: Target) -> Iterator[str]:
    """Group sizes that do not divide the module's columns; a part of `find_module_problems`."""
    with disable_onloading():
        weight = getattr(target.module, "weight", None)
    if isinstance(weight, torch.Tensor):
        for base_name, args in target.args.items():
            yield from _shape_problems(target, base_name, args, weight)


def _args_problems(target: Target, base_name: str, args: QuantizationArgs) -> Iterator[str]:
    yield from _format_problems(args)
    if base_name == "weight":
        yield from _weight_problems(args)
    else:
        yield from _activation_problems(target, base_name, args)


def _shape_problems(
    target: Target, base_name: str, args: QuantizationArgs, weight: torch.Tensor
) -> Iterator[str]:
    if args.strategy in GROUPED:
        columns = _columns(target, base_name, weight)
        # a group wider than the row is refused too, not taken as one short group
        if args.group_size is None or columns % args.group_size:
            what = "weights" if base_name == "weight" else f"{base_name} activations"
            yield f"{what}: group_size {args.group_size} does not divide {columns} columns"


def _format_problems(args: QuantizationArgs) -> Iterator[str]:
    if args.type == QuantizationType.FLOAT:
        if args.num_bits not in FLOAT_FORMATS:
            known = ", ".join(map(str, FLOAT_FORMATS))
            yield f"float formats have {known} bits, got {args.num_bits}"
        elif not is_known_to_library(args):
            yield (
                f"compressed-tensors {version('compressed-tensors')} has no floats of "
                f"{args.num_bits} bits; 0.20 has"
            )
        elif args.num_bits == 4 and not args.symmetric:
            yield "fp4 is always symmetric, got symmetric=False"


def _scale_dtype_problems(args: QuantizationArgs, dtype: torch.dtype) -> Iterator[str]:
    problem = scale_dtype_problem(args, dtype)
    if problem is not None:
        yield f"{problem}: leave scale_dtype out, or load the model in {args.scale_dtype}"


def _weight_problems(args: QuantizationArgs) -> Iterator[str]:
    if args.strategy not in WEIGHT_STRATEGIES:
        yield f"strategy {_text(args.strategy)!r} means nothing for a weight"
    if args.dynamic:
        yield f"must be static, got dynamic={_text(args.dynamic)!r}"


def _activation_problems(target: Target, base_name: str, args: QuantizationArgs) -> Iterator[str]:
    if base_name == "input" and isinstance(target.module, torch.nn.Embedding):
        yield "an Embedding's input is token ids, which cannot be quantized"
    if args.strategy not in ACTIVATION_STRATEGIES:
        yield f"strategy {_text(args.strategy)!r} means nothing for the activations of a layer"
    elif args.strategy in GROUPED and not args.dynamic:
        yield (
            f"static strategy {_text(args.strategy)!r} cannot run: fake-quantize would take "
            "groups for tokens; use dynamic=True, or 'local' with tensor_group"
        )


def _columns(target: Target, base_name: str, weight: torch.Tensor) -> int:
    if base_name == "output" and isinstance(target.module, torch.nn.Linear):
        return weight.shape[0]
    return weight.shape[-1]


def _text(value: object) -> object:
    """Enum members as the plain values that users write."""
    return getattr(value, "value", value)


_NO_HOOKS = (
    "compressed_tensors.offload.from_accelerate(model) keeps them offloaded in a way that works, "
    "or, after accelerate.cpu_offload or disk_offload, "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings them into memory"
)
_NAMED = 5


def find_hook_problems(model: nn.Module) -> Iterator[str]:
    """One line where accelerate keeps weights of the model elsewhere (`cpu_offload`, a disk part).

    Its hooks bring a weight in for the module's own call alone; what reads the weight otherwise,
    as calibrating and saving do, finds a tensor without data.
    """
    names = [name for name, module in model.named_modules() if _offloads(module)]
    if names:
        yield (
            f"accelerate keeps the weights of {_listing(names)} elsewhere and brings them in for "
            f"their own calls alone: {_NO_HOOKS}"
        )


def find_forward_problems(target: Target) -> Iterator[str]:
    """What one module has that its quantized forward would drop, or could not read.

    compressed-tensors sets a forward on the module which calls that of the module's class, and
    quantizes the parameter `weight`.
    """
    module = target.module
    if target.is_attention or _offloads(module) or hasattr(module, "quantization_status"):
        return  # runs its own forward; told once for the model; told by find_module_problems
    if hasattr(module, "_hf_hook"):
        yield (
            "has a hook of accelerate around its forward: take it off with "
            "compressed_tensors.offload.from_accelerate(model)"
        )
    elif has_own_forward(module):
        yield (
            "its forward was replaced on the instance, and a quantized forward calls that of its "
            f"class: del the attribute, or give it a subclass of {type(module).__name__} with "
            "that forward"
        )
    with disable_onloading():
        weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return  # told by find_module_problems
    if "weight" not in module._parameters:
        yield f"its weight is not a parameter but made of others: {_way_to_a_parameter(module)}"


def _offloads(module: nn.Module) -> bool:
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # of a SequentialHook
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(getattr(each, "offload", False) for each in hooks) and any(
        tensor is not None for tensor in tensors
    )


def _way_to_a_parameter(module: nn.Module) -> str:
    if torch.nn.utils.parametrize.is_parametrized(module, "weight"):
        return "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') fixes it"
    kinds = {type(hook).__name__ for hook in module._forward_pre_hooks.values()}
    if "WeightNorm" in kinds:
        return "torch.nn.utils.remove_weight_norm(module) fixes it"
    if "SpectralNorm" in kinds:
        return "torch.nn.utils.remove_spectral_norm(module) fixes it"
    if "weight_orig" in module._parameters:
        return "torch.nn.utils.prune.remove(module, 'weight') fixes it"
    return "register it as torch.nn.Parameter first"


def _listing(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more modules" if rest > 0 else "")
