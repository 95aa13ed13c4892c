"""`resolve_modules`: which scheme each module gets, and which are left alone and why."""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from compressed_tensors import InternalModule
from compressed_tensors.offload import disable_onloading
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStrategy,
)
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import match_targets
from torch import nn

from calipers.calibration.architectures import (
    find_bypassed,
    find_output_heads,
    find_routers,
    has_fused_experts,
    is_projection,
    projection_weights,
)
from calipers.calibration.attention import (
    CACHE_STATES,
    STATES,
    cache_scheme,
    find_attention,
    find_scheme_problems,
    is_state_scheme,
    sees_cache,
)
from calipers.calibration.experts import LinearExperts
from calipers.calibration.parts import Only, find_outside
from calipers.observers.hooks import Side

__all__ = [
    "ACTIVATION_STRATEGIES",
    "GROUPED",
    "LAYER_TENSORS",
    "ONLY_LINEAR",
    "TENSORS",
    "WEIGHT_STRATEGIES",
    "LeftAlone",
    "Reason",
    "Resolution",
    "Target",
    "TensorKind",
    "find_ignored",
    "gather_experts",
    "has_global_scale",
    "is_quantizable",
    "kind_of",
    "leave_alone",
    "resolve_modules",
    "schemes_by_target",
]

#: Strategies whose scales belong to groups of columns. A new strategy is one more entry here and in
#: the next two.
GROUPED = (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP)
#: Those that mean something for a weight.
WEIGHT_STRATEGIES = (
    QuantizationStrategy.TENSOR,
    QuantizationStrategy.CHANNEL,
    QuantizationStrategy.BLOCK,
    *GROUPED,
)
#: Those that mean something for the activations of a layer.
ACTIVATION_STRATEGIES = (QuantizationStrategy.TENSOR, QuantizationStrategy.TOKEN, *GROUPED)

Reason = Literal[
    "ignored by you",
    "output head",
    "router",
    "not the language part",
    "never called",
    "not a Linear",
    "fused experts",
    "not targeted",
    "its scheme leaves weights alone",
    "no data",
    "no cache",
    "shape",
    "cannot be loaded back",
    "quantized before",
]


class TensorKind(NamedTuple):
    """One tensor of a module that a scheme may quantize.

    Args:
        field: Field of a QuantizationScheme with its arguments.
        side: Where the values are met from which its scale is learnt: the module's input or output,
            or one of the states of an attention module.
    """

    field: str
    side: Side


#: By base name. A new tensor is one more row.
TENSORS = {
    "weight": TensorKind("weights", "input"),
    "input": TensorKind("input_activations", "input"),
    "output": TensorKind("output_activations", "output"),
    "q": TensorKind("input_activations", "q"),
    "k": TensorKind("input_activations", "k"),
    "v": TensorKind("input_activations", "v"),
}
#: Those of a Linear or Embedding; attention has the others.
LAYER_TENSORS = ("weight", "input", "output")


@dataclass(frozen=True)
class Target:
    """A quantizable module, its name in the model, and the scheme that the config gives it.

    Attributes:
        base_names: The tensors of it that the scheme means: those of a layer, or states of
            attention.
    """

    name: str
    module: nn.Module
    scheme: QuantizationScheme
    base_names: tuple[str, ...] = LAYER_TENSORS

    @property
    def is_attention(self) -> bool:
        """Whether it is an attention module with its states."""
        return self.base_names != LAYER_TENSORS

    @property
    def args(self) -> dict[str, QuantizationArgs]:
        """What the scheme quantizes: base names to their arguments."""
        found = {name: getattr(self.scheme, TENSORS[name].field) for name in self.base_names}
        return {base_name: args for base_name, args in found.items() if args is not None}


#: What compressed-tensors and its loaders can quantize.
ONLY_LINEAR = "compressed-tensors quantizes Linear and Embedding only"


@dataclass(frozen=True)
class LeftAlone:
    """A module with projection weights that stays as it is.

    Attributes:
        name: The module's name in the model.
        kind: Name of its class.
        reason: Why.
        weights: Values of its projection weights.
        share: Their share of the model's projection weights, from 0 to 1, once a calibration is
            frozen; 0 of an output head, which does not count, and of what is quantized already.
    """

    name: str
    kind: str
    reason: Reason
    weights: int
    share: float = 0.0

    @property
    def why(self) -> str:
        """The reason, with what it means for a module of this class."""
        if self.reason == "not a Linear":
            return f"{self.kind}: only Linear and Embedding can be quantized"
        return self.reason


@dataclass(frozen=True)
class Resolution:
    """What a config means for a model.

    Attributes:
        targets: The modules to quantize with their schemes, in the model's order.
        left_alone: All others that hold projection weights.
        kept: Names of modules that no target reaches: ignored, heads, routers, never called.
        unused: Ignore patterns that match no module.
    """

    targets: list[Target]
    left_alone: list[LeftAlone]
    kept: dict[str, Reason] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)

    def without(self, reasons: Mapping[str, Reason]) -> Resolution:
        """The same, with these targets left alone, each for its reason."""
        moved = [
            leave_alone(each.name, each.module, reasons[each.name])
            for each in self.targets
            if each.name in reasons
        ]
        return replace(
            self,
            targets=[each for each in self.targets if each.name not in reasons],
            left_alone=[*self.left_alone, *moved],
        )


def kind_of(name: str) -> str:
    """The name with `*` for each number: `layers.3.mlp` is of the kind `layers.*.mlp`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def has_global_scale(args: QuantizationArgs) -> bool:
    """Whether a tensor has a global scale beside its local ones: NVFP4."""
    return bool(args.strategy == QuantizationStrategy.TENSOR_GROUP)


def is_quantizable(module: nn.Module) -> bool:
    """Whether compressed-tensors can quantize this module: a Linear or an Embedding.

    A subclass counts where its forward takes one argument, since the quantized forward passes one.
    """
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return False
    if type(module).forward in (nn.Linear.forward, nn.Embedding.forward):
        return True
    needed = [
        parameter
        for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    return len(needed) == 1


def schemes_by_target(config: QuantizationConfig) -> dict[str, QuantizationScheme]:
    """Target pattern to scheme, in the config's order; a pattern named twice means the later one.

    Args:
        config: Its groups must be schemes, which QuantizationConfig's constructor sees to.
    """
    return {
        target: scheme
        for scheme in config.config_groups.values()
        if isinstance(scheme, QuantizationScheme)
        for target in scheme.targets
    }


def resolve_modules(
    model: nn.Module, config: QuantizationConfig, only: Only | None = None
) -> Resolution:
    """Decide for every module of a model which scheme it gets, or why it gets none.

    The scheme is chosen as `apply_quantization_config` chooses it: exact names before patterns
    before class names. Left alone are modules that the config ignores, by themselves or by a
    container around them; output heads, routers and layers that are never called, unless a target
    is the exact name of one; and what is no Linear or Embedding. Attention modules that no group
    targets get the config's kv_cache_scheme, ignored or not, since loaders give it to all of them.

    Args:
        model: Any model, offloaded or not; nothing in it is changed.
        config: A resolved config.
        only: The part that is quantized, exact targets included; None for the whole model.

    Raises:
        CalipersError: The model has no such part.
    """
    schemes = schemes_by_target(config)
    targets, left_alone = [], []
    with disable_onloading():
        ignored, unused = find_ignored(model, config.ignore or [])
        outside = set() if only is None else find_outside(model)
        kept = _find_kept(model, ignored, outside, exact=set(schemes))
        attention = find_attention(model)
        cache = config.kv_cache_scheme and cache_scheme(config.kv_cache_scheme)
        for name, module in model.named_modules():
            if isinstance(module, InternalModule):
                continue
            matched = match_targets(name, module, schemes)
            scheme = schemes[matched[0]] if matched and name not in kept else None
            if name in attention and not is_quantizable(module):
                state = _attention_target(model, name, module, scheme, cache)
                if state is not None and sees_cache(module):
                    targets.append(state)
                elif state is not None:
                    left_alone.append(leave_alone(name, module, "no cache"))
            if scheme is not None and is_quantizable(module):
                target = Target(name, module, scheme)
                if target.args:
                    targets.append(target)
                if scheme.weights is not None:
                    continue
            if is_projection(module):
                reason = kept.get(name) or _reason(module, scheme)
                left_alone.append(leave_alone(name, module, reason))
    return Resolution(targets, left_alone, kept, unused)


def _attention_target(
    model: nn.Module,
    name: str,
    module: nn.Module,
    scheme: QuantizationScheme | None,
    cache: QuantizationScheme | None,
) -> Target | None:
    """An attention module with the scheme of a group, else with that of the cache, if any."""
    if (
        scheme is not None
        and is_state_scheme(model, name, scheme)
        and not any(find_scheme_problems(scheme))
    ):
        return Target(name, module, scheme, STATES)
    return None if cache is None else Target(name, module, cache, CACHE_STATES)


def leave_alone(name: str, module: nn.Module, reason: Reason) -> LeftAlone:
    """The record of a module that stays as it is."""
    if is_module_quantized(module):
        reason = "quantized before"
    return LeftAlone(name, type(module).__name__, reason, projection_weights(module))


def gather_experts(model: nn.Module, left_alone: Iterable[LeftAlone]) -> list[LeftAlone]:
    """One record for experts all of whose layers are left alone for one reason.

    They are one module again once the calibration is done.
    """
    records = {each.name: each for each in left_alone}
    wholes: dict[str, LeftAlone] = {}  # by the names of the layers
    for name, module in model.named_modules():
        if isinstance(module, LinearExperts):
            inside = [f"{name}.{inner}" for inner, m in module.named_modules() if is_projection(m)]
            own = [records[each] for each in inside if each in records]
            if len(own) == len(inside) and len({each.reason for each in own}) == 1:
                weights = sum(each.weights for each in own)
                whole = LeftAlone(name, module.replaced_class.__name__, own[0].reason, weights)
                wholes.update(dict.fromkeys(inside, whole))
    return list(dict.fromkeys(wholes.get(name, each) for name, each in records.items()))


def _reason(module: nn.Module, scheme: QuantizationScheme | None) -> Reason:
    if not is_quantizable(module):
        return "fused experts" if has_fused_experts(module) else "not a Linear"
    return "not targeted" if scheme is None else "its scheme leaves weights alone"


def _find_kept(
    model: nn.Module, ignored: Iterable[str], outside: Iterable[str], exact: set[str]
) -> dict[str, Reason]:
    """Modules that are left alone whatever matches them, but for exact targets among the first."""
    kept: dict[str, Reason] = dict.fromkeys(find_bypassed(model) - exact, "never called")
    kept.update(dict.fromkeys(find_routers(model) - exact, "router"))
    kept.update(dict.fromkeys(find_output_heads(model) - exact, "output head"))
    kept.update(dict.fromkeys(outside, "not the language part"))
    kept.update(dict.fromkeys(ignored, "ignored by you"))
    return kept


def find_ignored(model: nn.Module, patterns: Iterable[str]) -> tuple[set[str], list[str]]:
    """Names of the modules that ignore patterns mean, and the patterns that mean none.

    A pattern means the modules that compressed-tensors matches it to (exact name, class name of
    the module or of a base, "re:" regex from the start of the name), and where it matches a
    container but no Linear, Embedding or other matrix within, all that the container holds.
    """
    modules = [
        (name, module)
        for name, module in model.named_modules()
        if not isinstance(module, InternalModule)
    ]
    by_class: dict[str, list[str]] = defaultdict(list)
    for name, module in modules:
        kinds = type(module).__mro__
        if isinstance(module, LinearExperts):
            kinds = (*kinds, module.replaced_class)
        for kind in kinds:
            if issubclass(kind, nn.Module):
                by_class[kind.__name__].append(name)
    names = {name for name, _ in modules}
    inside: dict[str, list[str]] = defaultdict(list)
    for name, module in modules:
        if name and (isinstance(module, nn.Embedding) or is_projection(module)):
            for container in _containers(name):
                inside[container].append(name)
    ignored: set[str] = set()
    unused = []
    for pattern in patterns:
        hit = set(_match(pattern, names, by_class))
        for container in hit & inside.keys():
            if hit.isdisjoint(inside[container]):
                hit.update(inside[container])
        ignored |= hit
        if not hit:
            unused.append(pattern)
    return ignored, unused


def _containers(name: str) -> Iterator[str]:
    """Names of all modules around one, the model's own, "", included."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _match(pattern: str, names: set[str], by_class: dict[str, list[str]]) -> Iterator[str]:
    if pattern.startswith("re:"):
        regex = re.compile(pattern.removeprefix("re:"))
        yield from (name for name in names if regex.match(name))
        return
    if pattern in names:
        yield pattern
    yield from by_class.get(pattern, ())
