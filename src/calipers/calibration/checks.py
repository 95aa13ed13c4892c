"""`check_scheme`: everything that would fail later, found before any work and told at once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from math import gcd
from typing import Literal, NamedTuple

import torch
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import is_match
from loguru import logger

from calipers._words import check_choice, did_you_mean
from calipers.calibration.attention import (
    find_attention,
    find_model_problems,
    find_scheme_problems,
    is_attention,
    is_state_scheme,
)
from calipers.calibration.config import has_free_group_size
from calipers.calibration.fused import find_fused_problems
from calipers.calibration.module_checks import (
    find_forward_problems,
    find_hook_problems,
    find_module_problems,
    find_shape_problems,
)
from calipers.calibration.parts import Only
from calipers.calibration.targets import (
    ONLY_LINEAR,
    Resolution,
    Target,
    is_quantizable,
    kind_of,
    resolve_modules,
    schemes_by_target,
)
from calipers.errors import SchemeError

__all__ = ["OnUnfit", "check_scheme", "resolve_and_check", "suggest_group_size"]

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
    model: torch.nn.Module,
    config: QuantizationConfig,
    on_unfit: OnUnfit = "error",
    only: Only | None = None,
) -> Resolution:
    """As `check_scheme`; the answer also says what is left alone and why.

    Args:
        model: Any model; nothing in it is changed.
        config: As `resolve_config` returns it.
        on_unfit: "skip" leaves modules alone whose columns a group size does not divide.
        only: "language" leaves towers and projectors of images and sounds alone; None none.

    Raises:
        SchemeError: As `check_scheme`.
        CalipersError: `on_unfit` or `only` is unknown, or the model has no such part.
    """
    check_choice("on_unfit", on_unfit, OnUnfit)
    if only is not None:
        check_choice("only", only, Only)
    resolution = resolve_modules(model, config, only)
    if on_unfit == "skip":
        unfit = [each.name for each in resolution.targets if any(find_shape_problems(each))]
        resolution = resolution.without(dict.fromkeys(unfit, "shape"))
    problems = list(_group_problems(_find_problems(model, config, resolution)))
    if problems:
        problems += _ways_out(resolution)
        raise SchemeError("\n  ".join(["the model cannot take this scheme:", *problems]))
    return resolution


def _find_problems(
    model: torch.nn.Module, config: QuantizationConfig, resolution: Resolution
) -> Iterator[_ModuleProblem | str]:
    yield from find_pattern_problems(model, config, resolution)
    if resolution.targets:
        yield from find_hook_problems(model)
    states = [each.name for each in resolution.targets if "q" in each.base_names]
    if config.kv_cache_scheme is not None or states:
        cache = config.kv_cache_scheme is not None
        yield from find_model_problems(model, find_attention(model), states, cache=cache)
    for target in resolution.targets:
        for reason in (*find_module_problems(target), *find_forward_problems(target)):
            yield _ModuleProblem(target.name or type(target.module).__name__, reason)
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


# In every recipe of the field; many models have no module of that name, which is told.
_MAY_MATCH_NOTHING = frozenset({"lm_head"})


def find_pattern_problems(
    model: torch.nn.Module, config: QuantizationConfig, resolution: Resolution
) -> Iterator[_ModuleProblem | str]:
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
    for pattern, scheme in schemes_by_target(config).items():
        matched = [(name, module) for name, module in modules if is_match(name, module, pattern)]
        kept = [(name, module) for name, module in matched if name not in resolution.kept]
        if not matched:
            meant = _meant(pattern, modules)
            yield f"target {pattern!r} matches no module{meant}" + _others(resolution)
        elif not kept:
            yield _only_left_alone(pattern, [name for name, _ in matched], resolution)
        useful = any(is_quantizable(module) for _, module in kept)
        for name, module in kept:
            reason = _unfit_type(model, name, module, pattern, scheme, useful)
            if reason and name not in told:
                told.add(name)
                yield _ModuleProblem(name or type(module).__name__, reason)


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
    others = [each for each in resolution.left_alone if each.reason == "not a Linear"]
    if not others:
        return ""
    kinds = Counter(each.kind for each in others)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    counting = [each for each in resolution.left_alone if each.reason != "output head"]
    whole = sum(each.weights for each in counting)
    share = sum(each.weights for each in others) / max(whole, 1)
    return f" ({share:.0%} of the weights that stay are in {counted}: {ONLY_LINEAR})"


def _unfit_type(
    model: torch.nn.Module,
    name: str,
    module: torch.nn.Module,
    pattern: str,
    scheme: QuantizationScheme,
    useful: bool,
) -> str | None:
    if is_quantizable(module):
        return None
    if is_attention(module) and is_state_scheme(model, name, scheme):
        return next(find_scheme_problems(scheme), None)
    if useful and (not _holds_matrices_alone(module) or isinstance(module, torch.nn.Linear)):
        return None  # a Linear of another forward is left alone and listed
    return (
        f"{type(module).__name__} cannot be quantized: {ONLY_LINEAR} "
        f"(matched by {pattern!r}; ignore it to leave it as it is)"
    )


def _holds_matrices_alone(module: torch.nn.Module) -> bool:
    """Convolutions, fused experts: matrices of their own and nothing quantizable inside."""
    with disable_onloading():
        has_matrix = any(p is not None and p.ndim > 1 for p in module._parameters.values())
    return has_matrix and not any(is_quantizable(child) for child in module.modules())


#: Below this the scales of a group take as much room as its codes, or nearly.
_SMALLEST = 8


def fitting_group_sizes(targets: Iterable[Target]) -> list[int]:
    """Powers of two, from 8 up to the columns, that divide the columns of every weight.

    Args:
        targets: Modules; those whose weights have no groups of a size that could be another do not
            matter.

    Returns:
        The largest first; empty where there is none, or no weight that matters.
    """
    common = 0
    with disable_onloading():
        for target in targets:
            weight = getattr(target.module, "weight", None)
            if isinstance(weight, torch.Tensor) and has_free_group_size(target.scheme.weights):
                common = gcd(common, weight.shape[-1])
    largest = common & -common  # the largest power of two that divides it
    return [1 << power for power in range(largest.bit_length() - 1, _SMALLEST.bit_length() - 2, -1)]


def suggest_group_size(targets: Iterable[Target]) -> int | None:
    """The group size nearest to the usual 128, but not above, that fits all; None without any."""
    return next((size for size in fitting_group_sizes(targets) if size <= 128), None)


#: Kinds named in one line of an error; a model of unnumbered names may have very many.
_KINDS = 12


class _ModuleProblem(NamedTuple):
    """One module and one reason why it cannot take its scheme."""

    name: str
    reason: str


def _list_kinds(names: Iterable[str]) -> str:
    """Kinds with their counts, `layers.*.mlp (30)`; a module alone in its kind by its own name."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[kind_of(name)].append(name)
    told = [
        members[0] if len(members) == 1 else f"{kind} ({len(members)})"
        for kind, members in kinds.items()
    ]
    if len(told) > _KINDS:
        told[_KINDS:] = [f"and {len(told) - _KINDS} other kinds"]
    return ", ".join(told)


def _group_problems(problems: Iterable[_ModuleProblem | str]) -> Iterator[str]:
    """One line for each reason, naming all modules that share it.

    Lines that are no problems of single modules stay as they are, in their place.
    """
    # A dict keeps the order in which reasons were first met.
    lines: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for each in problems:
        if isinstance(each, _ModuleProblem):
            lines[each.reason, True].append(each.name)
        else:
            lines[each, False].append("")
    for (text, of_modules), names in lines.items():
        yield f"{_list_kinds(names)}: {text}" if of_modules else text
