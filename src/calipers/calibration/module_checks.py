"""`find_module_problems`: why one module cannot take its scheme in compressed-tensors 0.19.

Each rule was found by trying: what `apply_quantization_config` or the fake-quantized forward
refuses, and what it accepts but turns into something else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationType,
)
from compressed_tensors.quantization.utils import is_module_quantized

from calipers.calibration.targets import (
    ACTIVATION_STRATEGIES,
    GROUPED,
    WEIGHT_STRATEGIES,
    Target,
)
from calipers.ranges.qparams import scale_dtype_problem

__all__ = ["find_module_problems", "find_shape_problems"]

_FLOAT_BITS = (4, 8)
_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_module_problems(target: Target) -> Iterator[str]:
    """One reason for each thing that the module cannot take; none where all is well."""
    module = target.module
    if is_module_quantized(module) or hasattr(module, "quantization_status"):
        yield "is already quantized"
        return
    with disable_onloading():
        weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in _WEIGHT_DTYPES:
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        yield f"its weight must be a float16, bfloat16, float32 or float64 tensor, got {kind}"
        return
    for base_name, args in target.args.items():
        what = "weights" if base_name == "weight" else f"{base_name} activations"
        yield from (f"{what}: {reason}" for reason in _args_problems(target, base_name, args))
        yield from (f"{what}: {reason}" for reason in _scale_dtype_problems(args, weight.dtype))
        yield from _shape_problems(target, base_name, args, weight)


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
        if args.num_bits not in _FLOAT_BITS:
            yield f"float formats have 4 or 8 bits, got {args.num_bits}"
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
