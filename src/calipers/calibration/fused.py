"""Sibling layers that inference engines fuse into one matrix.

vLLM gives a fused layer (qkv_proj, gate_up_proj, ...) one scheme, and under NVFP4 one global scale,
so the members must be quantized alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from compressed_tensors.quantization import QuantizationScheme
from loguru import logger
from torch import nn

from calipers.calibration.targets import Resolution, has_global_scale

__all__ = ["find_fused_groups", "find_fused_problems"]

_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def find_fused_groups(names: Iterable[str]) -> list[list[str]]:
    """Split module names into groups that share their global scales.

    Args:
        names: Full names of modules, "model.layers.0.self_attn.q_proj".

    Returns:
        Every name once, in groups in the order of their first members; members are siblings
        under one parent. A group may lack members; a module that is never fused stands alone.

    Example:
        >>> find_fused_groups(["a.q_proj", "a.v_proj", "a.o_proj", "b.q_proj"])
        [['a.q_proj', 'a.v_proj'], ['a.o_proj'], ['b.q_proj']]
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        family = next((family[0] for family in _FUSED if leaf in family), leaf)
        groups.setdefault((parent, family), []).append(name)
    return list(groups.values())


def find_fused_problems(model: nn.Module, resolution: Resolution) -> Iterator[str]:
    """Fused layers whose members would be quantized differently.

    Under NVFP4 each is a problem, since no engine can take it: the members share a global scale.
    Under other schemes it is a warning: transformers runs the model, engines that fuse refuse it.
    """
    given: dict[str, QuantizationScheme | None] = {
        each.name: each.scheme for each in resolution.targets
    }
    for each in resolution.left_alone:
        before = getattr(model.get_submodule(each.name), "quantization_scheme", None)
        given.setdefault(each.name, before)
    warnings = []
    order = [name for name, _ in model.named_modules() if name in given]
    for members in find_fused_groups(order):
        if len({_kind(given[name]) for name in members}) < 2:
            continue
        parent = members[0].rpartition(".")[0]
        said = ", ".join(f"{name.rpartition('.')[2]} {_said(given[name])}" for name in members)
        line = f"{parent}: engines fuse these layers and need one scheme for all: {said}"
        weights = [scheme.weights for name in members if (scheme := given[name]) is not None]
        if any(args is not None and has_global_scale(args) for args in weights):
            yield f"{line}. Under NVFP4 they share a global scale: quantize all of them or none"
        else:
            warnings.append(line)
    if warnings:
        more = f" (and {len(warnings) - 1} more like it)" if len(warnings) > 1 else ""
        logger.warning("{}{}; vLLM refuses such a checkpoint", warnings[0], more)


def _kind(scheme: QuantizationScheme | None) -> str:
    return "" if scheme is None else scheme.model_dump_json(exclude={"targets", "format"})


def _said(scheme: QuantizationScheme | None) -> str:
    if scheme is None:
        return "unquantized"
    parts = []
    for what, args in (("weights", scheme.weights), ("inputs", scheme.input_activations)):
        if args is not None:
            kind, strategy = (getattr(each, "value", each) for each in (args.type, args.strategy))
            parts.append(f"{what} {kind}{args.num_bits} {strategy}")
    return " and ".join(parts)
