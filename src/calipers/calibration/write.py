"""Derived scales onto modules: written, taken back whole where something fails, and judged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from compressed_tensors.offload import (
    disable_offloading,
    disable_onloading,
    update_offload_parameter,
)
from compressed_tensors.offload.cache import OffloadCache
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationMetadata,
    QuantizationStatus,
    QuantizationStrategy,
)
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, forward_quantize

from calipers.calibration.attention import clear_states
from calipers.calibration.observed import ObservedTensor
from calipers.calibration.targets import GROUPED
from calipers.errors import CalipersError
from calipers.grouping import chunk_size
from calipers.ranges.output_error import InputGram

__all__ = [
    "forget_quantization",
    "keep_onloaded",
    "measure_output_error",
    "measure_weight_error",
    "rounded_once",
    "squared_errors",
    "undo_on_error",
    "write_qparam",
]

# compressed-tensors puts these on the instance: the quantized forward, and the one that an
# offloaded module calls
_FORWARDS = ("forward", "_original_forward_func")


@torch.no_grad()
def write_qparam(tensor: ObservedTensor, what: str, value: torch.Tensor) -> None:
    """Write a value into the parameter that compressed-tensors registered for it.

    compressed-tensors registers scales in the dtype of the weight. Where that would round a scale
    of grouped weights, the parameter is replaced by one of the scale's own dtype. Elsewhere
    fake-quantize returns its result in the scale's dtype, so a scale of another dtype than the
    weight could not run: there it is cast.

    Args:
        tensor: What the value quantizes; its module is written to, offloaded or not.
        what: "scale", "zero_point" or "global_scale"; one that compressed-tensors did not register
            is not needed and not written.
        value: The value, of the registered shape.

    Raises:
        CalipersError: The value has another shape than the registered parameter.
    """
    module, parameter = tensor.module, f"{tensor.base_name}_{what}"
    assert module is not None
    with disable_onloading():
        registered = getattr(module, parameter, None)
    if registered is None:
        return
    if registered.shape != value.shape:
        raise CalipersError(
            f"{tensor.name}.{parameter}: compressed-tensors expects shape "
            f"{tuple(registered.shape)}, the observer gave {tuple(value.shape)}"
        )
    rounded = tensor.args.strategy in GROUPED and not _fits(value, registered.dtype)
    # that of attention whose weights lie in a checkpoint; one that is offloaded is updated
    empty = registered.is_meta and not isinstance(module._parameters, OffloadCache)
    if rounded or empty:
        delattr(module, parameter)
        device = registered.device if registered.device.type != "meta" else value.device
        new = value.detach().clone() if rounded else value.detach().to(registered.dtype)
        new = torch.nn.Parameter(new.to(device), requires_grad=False)
        module.register_parameter(parameter, new)
    else:
        update_offload_parameter(module, parameter, value.to(registered.dtype))


def _fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    if value.dtype == dtype:
        return True
    return bool(torch.equal(value.to(dtype).to(value.dtype), value))


def keep_onloaded(module: Any) -> None:
    """Let tensors of an offloaded module stay once they are brought in, while its forward runs.

    compressed-tensors' quantized forward fake-quantizes the weight that it has got, and calls the
    forward of the class, which asks for the weight again. What a disk gives then is another tensor,
    which is not fake-quantized.

    Args:
        module: A module whose forward is quantized already; one that is not offloaded stays as it
            is.
    """
    if not isinstance(module._parameters, OffloadCache):
        return
    quantized = module._original_forward_func

    @wraps(quantized.__wrapped__)  # to which clear_quantization goes back
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with disable_offloading():
            return quantized(self, *args, **kwargs)

    module._original_forward_func = forward


@contextmanager
def rounded_once(modules: Iterable[Any]) -> Iterator[None]:
    """In the block, quantized forwards find their weights rounded, and need not do it themselves.

    compressed-tensors fake-quantizes a weight in every call of its layer. Inside of the block each
    weight is there once more, as it is. Those of offloaded modules, and those that several modules
    have, are left to the forwards.
    """
    modules = list(modules)
    uses = Counter(id(each._parameters.get("weight")) for each in modules)
    done: list[tuple[Any, torch.Tensor, Any]] = []
    try:
        for module in modules:
            scheme = getattr(module, "quantization_scheme", None)
            weight = module._parameters.get("weight")
            if scheme is None or scheme.weights is None or weight is None or weight.is_meta:
                continue
            if isinstance(module._parameters, OffloadCache) or "forward" not in vars(module):
                continue
            if uses[id(weight)] > 1:
                continue
            own = weight.data
            weight.data = forward_quantize(module, own, "weight", scheme.weights)
            done.append((module, own, module.quantization_status))
            module.quantization_status = QuantizationStatus.COMPRESSED
        yield
    finally:
        for module, own, status in reversed(done):
            module.weight.data = own
            module.quantization_status = status


@contextmanager
def undo_on_error(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Leave the modules as they were before the block where the block raises.

    Quantization parameters, schemes, status and the wrapped forward are removed; the exception
    goes on. Nothing happens where the block ends well.

    Args:
        modules: Modules that are not quantized yet.
    """
    before = [
        (module, {name: vars(module)[name] for name in _FORWARDS if name in vars(module)})
        for module in modules
    ]
    try:
        yield
    except BaseException:
        for module, forwards in before:
            forget_quantization(module)
            module.__dict__.update(forwards)
        raise


def forget_quantization(module: torch.nn.Module) -> None:
    """Take off a module all that quantizing it has put there, its own forward included."""
    QuantizationMetadata.clear_quantization(module)
    clear_states(module)
    for name in ("quantization_status", *_FORWARDS):
        module.__dict__.pop(name, None)


@torch.no_grad()
def squared_errors(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    args: QuantizationArgs,
    global_scale: torch.Tensor | None = None,
    gram: InputGram | None = None,
) -> tuple[float, float | None]:
    """Relative squared errors of a weight, and of what its layer computes, in one pass.

    Args:
        weight: As in `measure_weight_error`, and so are the next four.
        scale: As registered.
        zero_point: Or None.
        args: The weight's arguments.
        global_scale: Shape (1,), or None.
        gram: What is known of the inputs; None for nothing.

    Returns:
        ||W - Q||^2 / ||W||^2 and ||X (W - Q)'||^2 / ||X W'||^2, each as `measure_weight_error`
        where nothing can be divided by; the second one None without inputs, or where a sketch
        gives a sum that is not positive.
    """
    device = weight.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    gram = None if gram is None else gram.to(device)
    for original, error in _errors(weight, scale, zero_point, args, global_scale):
        for place, values in enumerate((error, original)):
            if gram is None:
                # by columns first, as `InputGram` does: equal to the last bit with and without one
                sums[place] += values.square().sum(0, dtype=torch.float64).sum()
            else:
                sums[place::2] += torch.stack(gram.squares(values))
    error, total, of_output, output = sums.tolist()
    if gram is None or of_output < 0 or (output <= 0 and gram.kind == "blocks"):
        return _ratio(error, total), None
    return _ratio(error, total), _ratio(of_output, output)


def _ratio(error: float, total: float) -> float:
    if total == 0.0:
        return math.inf if error else 0.0
    return error / total


def measure_weight_error(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    args: QuantizationArgs,
    global_scale: torch.Tensor | None = None,
) -> float:
    """Relative error ||W - fakequant(W)||_F / ||W||_F of a weight.

    The weight is fake-quantized in its own dtype, as the model's forward does; differences and
    squares are float32, a few rows at a time, so no copy of the whole weight is made.

    Args:
        weight: Shape (rows, columns).
        scale: As registered for the strategy, in units of the weight per code.
        zero_point: Same shape as the scale, in codes; None stands for zeros.
        args: The weight's arguments.
        global_scale: Shape (1,), for TENSOR_GROUP.

    Returns:
        The error, >= 0; 0.0 for an empty weight or one of zeros that stays zero; inf for zeros
        that do not.
    """
    return math.sqrt(squared_errors(weight, scale, zero_point, args, global_scale)[0])


@torch.no_grad()
def measure_output_error(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    args: QuantizationArgs,
    global_scale: torch.Tensor | None,
    inputs: torch.Tensor,
) -> float:
    """Relative squared error ||X (W - fakequant(W))'||^2 / ||X W'||^2 of what a layer computes.

    Products are float32, a few rows of the weight at a time, their squares float64.

    Args:
        weight: Shape (rows, columns).
        scale: As in `measure_weight_error`, and so are the next three.
        zero_point: Or None.
        args: The weight's arguments.
        global_scale: Shape (1,), or None.
        inputs: X, shape (tokens, columns).

    Returns:
        The error, >= 0; as in `measure_weight_error` for outputs that are all zero.
    """
    inputs = inputs.to(weight.device).float()
    error = total = 0.0
    for original, difference in _errors(weight, scale, zero_point, args, global_scale):
        error += _sum_of_squares(inputs @ difference.T)
        total += _sum_of_squares(inputs @ original.T)
    return _ratio(error, total)


def _errors(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    args: QuantizationArgs,
    global_scale: torch.Tensor | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A few rows of a weight after the other, and what quantization takes off them, in float32."""
    for rows, groups in _pieces(weight, args):
        piece = weight[rows]
        zero = None if zero_point is None else zero_point[groups]
        quantized = fake_quantize(piece, scale[groups], zero, args, global_scale)
        original = piece.float()
        yield original, original - quantized.float()


def _pieces(weight: torch.Tensor, args: QuantizationArgs) -> Iterator[tuple[slice, slice]]:
    """Slices of the weight's rows, and of the rows of scales that belong to them."""
    rows, columns = weight.shape
    height = 1
    if args.strategy == QuantizationStrategy.BLOCK and args.block_structure is not None:
        height = args.block_structure[0]
    step = max(1, chunk_size(weight) // (max(1, columns) * height))  # in units of scale rows
    for start in range(0, math.ceil(rows / height), step):
        groups = slice(start, start + step)
        if args.strategy == QuantizationStrategy.TENSOR:
            groups = slice(None)
        yield slice(start * height, (start + step) * height), groups


def _sum_of_squares(values: torch.Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))
