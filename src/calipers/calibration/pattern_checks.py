"""`find_pattern_problems`: target and ignore patterns that do not do what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.initialize import is_cached_attention_module
from compressed_tensors.utils import is_match, is_narrow_match
from loguru import logger

from calipers._words import did_you_mean
from calipers.calibration.kinds import ModuleProblem
from calipers.calibration.targets import (
    Resolution,
    is_quantizable,
    schemes_by_target,
)

__all__ = ["find_pattern_problems"]

# In every recipe of the field; many models have no module of that name, which is told.
_MAY_MATCH_NOTHING = frozenset({"lm_head"})


def find_pattern_problems(
    model: torch.nn.Module, config: QuantizationConfig, resolution: Resolution
) -> Iterator[ModuleProblem | str]:
    """A problem for each pattern that matches nothing, or a module that cannot be quantized.

    A regex may match containers, norms and activations beside the layers it is meant for: only
    matched modules that hold matrices of their own, and nothing quantizable inside, are told.
    """
    modules = list(model.named_modules())
    for pattern in resolution.unused:
        if pattern in _MAY_MATCH_NOTHING:
            logger.warning("ignore pattern {!r} matches no module", pattern)
        else:
            yield f"ignore pattern {pattern!r} matches no module{_meant(pattern, modules)}"
    told: set[str] = set()
    for pattern in schemes_by_target(config):
        matched = [(name, module) for name, module in modules if is_match(name, module, pattern)]
        kept = [(name, module) for name, module in matched if name not in resolution.kept]
        if not matched:
            meant = _meant(pattern, modules)
            yield f"target {pattern!r} matches no module{meant}" + _others(resolution)
        elif not kept:
            yield _only_left_alone(pattern, [name for name, _ in matched], resolution)
        useful = any(is_quantizable(module) for _, module in kept)
        for name, module in kept:
            reason = _unfit_type(model, name, module, pattern, useful)
            if reason and name not in told:
                told.add(name)
                yield ModuleProblem(name or type(module).__name__, reason)


def _meant(pattern: str, modules: Iterable[tuple[str, torch.nn.Module]]) -> str:
    """The class or name that a pattern which matches nothing is nearest to."""
    if pattern.startswith("re:"):
        return ""
    known = {text for name, module in modules for text in (type(module).__name__, name) if text}
    near = did_you_mean(pattern, sorted(known))
    return f".{near}" if near else ""


def _only_left_alone(pattern: str, names: list[str], resolution: Resolution) -> str:
    listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    reasons = Counter(resolution.kept[name] for name in names)
    if set(reasons) == {"ignored by you"}:
        return f"target {pattern!r} matches only ignored modules: {listed}"
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return (
        f"target {pattern!r} matches only modules that are left alone ({counted}): {listed}; "
        "the exact name of a module as a target quantizes it all the same" + _others(resolution)
    )


def _others(resolution: Resolution) -> str:
    """What the model holds instead, where no Linear is what it is made of (GPT-2's Conv1D)."""
    kinds = Counter(each.kind for each in resolution.left_alone if each.reason == "not a Linear")
    if not kinds:
        return ""
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f" (other modules with weights, which cannot be quantized: {counted})"


def _unfit_type(
    model: torch.nn.Module, name: str, module: torch.nn.Module, pattern: str, useful: bool
) -> str | None:
    if is_quantizable(module):
        return None
    if name and is_cached_attention_module(module) and is_narrow_match(model, pattern, name):
        return (
            f"attention modules ({type(module).__name__}) are not supported yet: target their "
            "q_proj, k_proj and v_proj"
        )
    if useful and (not _holds_matrices_alone(module) or isinstance(module, torch.nn.Linear)):
        return None  # a Linear of another forward is left alone and listed
    return (
        f"{type(module).__name__} cannot be quantized, only Linear and Embedding can "
        f"(matched by {pattern!r}; ignore it to leave it as it is)"
    )


def _holds_matrices_alone(module: torch.nn.Module) -> bool:
    """Convolutions, fused experts: matrices of their own and nothing quantizable inside."""
    with disable_onloading():
        has_matrix = any(p is not None and p.ndim > 1 for p in module._parameters.values())
    return has_matrix and not any(is_quantizable(child) for child in module.modules())
