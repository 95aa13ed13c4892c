"""`find_forward_problems`: modules whose forward or weight a quantized forward would pass over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from torch import nn

from calipers.calibration.targets import Target

__all__ = ["find_forward_problems", "find_hook_problems"]

_NO_HOOKS = (
    "compressed_tensors.offload.from_accelerate(model) keeps them offloaded in a way that works, "
    "or, after accelerate.cpu_offload or disk_offload, "
    "accelerate.hooks.remove_hook_from_module(model, recurse=True) brings them into memory"
)
_LISTED = 5


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
    if _offloads(module) or hasattr(module, "quantization_status"):
        return  # told once for the model; told by find_module_problems
    if hasattr(module, "_hf_hook"):
        yield (
            "has a hook of accelerate around its forward: take it off with "
            "compressed_tensors.offload.from_accelerate(model)"
        )
    elif _has_own_forward(module):
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


def _has_own_forward(module: nn.Module) -> bool:
    # An offloading by compressed-tensors puts its own there, around the one that it found.
    name = "_original_forward_func" if "_original_forward_func" in vars(module) else "forward"
    found = vars(module).get(name)
    return found is not None and getattr(found, "__func__", found) is not type(module).forward


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
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more modules" if rest > 0 else "")
