"""Output heads, routers and layers that are never called: modules no scheme for all layers means.

Each `find_*` takes any torch model and returns module names; nothing in the model is changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = [
    "find_bypassed",
    "find_output_heads",
    "find_routers",
    "has_fused_experts",
    "has_own_forward",
    "is_projection",
    "projection_weights",
]

#: Names under which output heads are known, wherever in a model they are.
_HEAD_NAMES = frozenset({"lm_head", "embed_out"})
#: The same outside of repeated blocks only: inside of one such a name means something else.
_TOP_HEAD_NAMES = frozenset({"score", "classifier", "proj_out", "qa_outputs"})
_ROUTER_NAMES = frozenset({"router", "shared_expert_gate"})
_ROUTER_CLASS = re.compile(r"Router|TopKGating")
#: Names that mean a router only beside experts.
_GATE_NAMES = frozenset({"gate", "wg", "gating"})
_MOE_CLASS = re.compile(r"Moe|MoE|MOE|Sparse")
_WEIGHT_NAME = re.compile(r"(^|_)(weight|proj)$")
_TABLE_CLASS = re.compile(r"Embedding|Norm")


def projection_weights(module: nn.Module) -> int:
    """Values of the matrices that the module itself multiplies activations by.

    Weights of Linear, Conv1D and convolutions, the in_proj_weight of nn.MultiheadAttention, and
    experts fused into one parameter. Embeddings, norms, position tables and children count 0.
    """
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return _numel(module._parameters.get("weight"))
    if isinstance(module, nn.Embedding) or _TABLE_CLASS.search(type(module).__name__):
        return 0
    return sum(
        _numel(value)
        for name, value in module._parameters.items()
        if value is not None
        and (
            (value.ndim == 2 and _WEIGHT_NAME.search(name))
            or (value.ndim == 3 and value.shape[0] > 1)
        )
    )


def has_fused_experts(module: nn.Module) -> bool:
    """Whether the module keeps the matrices of several experts in one parameter of its own."""
    return not isinstance(module, nn.modules.conv._ConvNd) and any(
        value is not None and value.ndim == 3 and value.shape[0] > 1
        for value in module._parameters.values()
    )


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward was replaced on the instance."""
    # An offloading by compressed-tensors puts its own there, around the one that it found.
    name = "_original_forward_func" if "_original_forward_func" in vars(module) else "forward"
    found = vars(module).get(name)
    return found is not None and getattr(found, "__func__", found) is not type(module).forward


def is_projection(module: nn.Module) -> bool:
    """Whether the module itself holds projection weights."""
    return projection_weights(module) > 0


def find_output_heads(model: nn.Module) -> set[str]:
    """Names of the layers that turn hidden states into the model's answer.

    What transformers' `get_output_embeddings` gives for the model and for models inside it, what
    lies outside of a transformers model's `base_model`, and layers of the usual names (lm_head,
    embed_out; score, classifier, proj_out, qa_outputs outside of repeated blocks).
    """
    names = {id(module): name for name, module in model.named_modules()}
    heads: set[str] = set()
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf in _HEAD_NAMES or (leaf in _TOP_HEAD_NAMES and not _is_repeated(name)):
            heads.add(name)
        head = _embeddings(module, "get_output_embeddings")
        if head is not None and id(head) in names:
            heads.add(names[id(head)])
        heads.update(_outside_of_base(name, module))
    return {
        inside
        for name in heads
        for inside, module in _inside(model, name)
        if isinstance(module, (nn.Linear, nn.Embedding)) or is_projection(module)
    } - _input_embeddings(model)


def find_routers(model: nn.Module) -> set[str]:
    """Names of the layers that choose the experts of a token, and that gate a shared expert.

    Known by their names (router, shared_expert_gate; gate beside experts) or the class of the
    module itself or of one around it (...Router, ...TopKGating).
    """
    modules = dict(model.named_modules())
    routers = set()
    for name, module in modules.items():
        if not is_projection(module):
            continue
        parts = name.split(".")
        around = [modules[".".join(parts[:end])] for end in range(1, len(parts) + 1)]
        if (
            _ROUTER_NAMES & set(parts)
            or any(_ROUTER_CLASS.search(type(each).__name__) for each in around)
            or (parts[-1] in _GATE_NAMES and _has_experts(modules[".".join(parts[:-1])]))
        ):
            routers.add(name)
    return routers


def find_bypassed(model: nn.Module) -> set[str]:
    """Names of layers whose weight the module around them reads, without calling them.

    nn.MultiheadAttention's out_proj, all that nn.TransformerEncoderLayer's fast path reads, and
    Mamba's dt_proj. A quantized forward of such a layer would never run.
    """
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            found |= {
                inside for inside, each in _inside(model, name) if isinstance(each, nn.Linear)
            }
        if "Mamba" in type(module).__name__:
            child = getattr(module, "dt_proj", None)
            if isinstance(child, nn.Module):
                found.add(f"{name}.dt_proj" if name else "dt_proj")
    return found


def _numel(value: torch.Tensor | None) -> int:
    return 0 if value is None else value.numel()


def _is_repeated(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def _inside(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The module of this name and all within it, by their names in the model."""
    for inner, module in model.get_submodule(name).named_modules():
        yield ".".join(part for part in (name, inner) if part), module


def _embeddings(module: Any, get: str) -> object:
    """What a method of transformers' models gives, None where there is none."""
    try:
        return getattr(module, get)() if callable(getattr(module, get, None)) else None
    except (NotImplementedError, AttributeError):
        return None


def _input_embeddings(model: nn.Module) -> set[str]:
    """Names of embeddings that models declare as their input: a head may be the same module."""
    found = {id(_embeddings(module, "get_input_embeddings")) for module in model.modules()}
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and id(module) in found
    }


def _outside_of_base(name: str, module: Any) -> Iterator[str]:
    """Linear layers of a transformers model that its headless model lacks."""
    if not hasattr(module, "base_model_prefix"):
        return
    base = getattr(module, module.base_model_prefix, None) if module.base_model_prefix else None
    if not isinstance(base, nn.Module) or base is module:
        return
    body = {id(each) for each in base.modules()}
    for child_name, child in module.named_children():
        # A model or repeated blocks beside the base are no head: a vision tower, a second stack.
        if id(child) in body or any(
            hasattr(each, "base_model_prefix") or isinstance(each, nn.ModuleList)
            for each in child.modules()
        ):
            continue
        for inner, each in child.named_modules():
            if isinstance(each, nn.Linear) and id(each) not in body:
                yield ".".join(part for part in (name, child_name, inner) if part)


def _has_experts(parent: nn.Module) -> bool:
    return bool(_MOE_CLASS.search(type(parent).__name__)) or any(
        "expert" in child for child, _ in parent.named_children()
    )
