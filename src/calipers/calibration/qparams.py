"""`write_qparam`: a derived scale or zero point onto a module, offloaded or not."""

from __future__ import annotations

import torch
from compressed_tensors.offload import disable_onloading, update_offload_parameter
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy

from calipers.errors import CalipersError

__all__ = ["write_qparam"]

_GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)


@torch.no_grad()
def write_qparam(
    module: torch.nn.Module,
    parameter: str,
    value: torch.Tensor,
    args: QuantizationArgs,
    name: str,
) -> None:
    """Write a value into the parameter that compressed-tensors registered for it.

    compressed-tensors registers scales in the dtype of the weight. Where that would round a scale
    of grouped weights, the parameter is replaced by one of the scale's own dtype. Elsewhere
    fake-quantize returns its result in the scale's dtype, so a scale of another dtype than the
    weight could not run: there it is cast.

    Args:
        module: The module.
        parameter: "weight_scale", "input_zero_point", ...; one that compressed-tensors did not
            register is not needed and not written.
        value: The value, of the registered shape.
        args: Arguments of the quantized tensor.
        name: The module's name, for errors.

    Raises:
        CalipersError: The value has another shape than the registered parameter.
    """
    with disable_onloading():
        registered = getattr(module, parameter, None)
    if registered is None:
        return
    if registered.shape != value.shape:
        raise CalipersError(
            f"{name}.{parameter}: compressed-tensors expects shape {tuple(registered.shape)}, the "
            f"observer gave {tuple(value.shape)}"
        )
    if args.strategy in _GROUPED and not _fits(value, registered.dtype):
        delattr(module, parameter)
        device = registered.device if registered.device.type != "meta" else value.device
        new = torch.nn.Parameter(value.detach().clone().to(device), requires_grad=False)
        module.register_parameter(parameter, new)
    else:
        update_offload_parameter(module, parameter, value.to(registered.dtype))


def _fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    if value.dtype == dtype:
        return True
    return bool(torch.equal(value.to(dtype).to(value.dtype), value))
