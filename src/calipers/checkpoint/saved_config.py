"""`saved_config`: the quantization config of a checkpoint, exact for every module of the model."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from compressed_tensors import InternalModule
from compressed_tensors.config import CompressionFormat
from compressed_tensors.modeling import IMPL_ATTR
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import is_match, match_targets
from torch import nn

from calipers._words import listing
from calipers.calibration.attention import is_attention, is_state_scheme, sees_cache
from calipers.calibration.experts import find_fused_experts
from calipers.calibration.targets import schemes_by_target
from calipers.checkpoint.names import checkpoint_names
from calipers.checkpoint.tensors import module_format
from calipers.errors import CheckpointError

__all__ = ["saved_config"]

_CLASSES = ("Linear", "Embedding")


def saved_config(model: nn.Module) -> QuantizationConfig | None:
    """A config that gives every module of the model the scheme that it carries, and no other one.

    The scheme of most modules of a class targets the class ("Linear"), less an ignore list of exact
    names; that of all attention modules of a class targets it too; any other scheme targets names,
    as a regex over the numbers in them where just its own modules match it. Where the model's names
    differ from its checkpoint's, both stand in the lists: transformers matches the one kind, vLLM
    the other.

    Returns:
        The config, with the format of each group; None where no module is quantized.

    Raises:
        CheckpointError: The config, resolved against the model, would give modules another scheme.
    """
    named = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, InternalModule)
    }
    schemes = {
        name: module.quantization_scheme
        for name, module in named.items()
        if is_module_quantized(module)
        and (isinstance(module, (nn.Linear, nn.Embedding)) or hasattr(module, IMPL_ATTR))
    }
    upstream = QuantizationConfig.from_pretrained(model)
    if upstream is None:
        return None
    if not any(map(is_module_quantized, named.values())):
        return upstream
    kinds = _group(named, schemes)
    of_class = {kind: _most_of(kind, named, kinds) for kind in _CLASSES}
    groups: dict[str, QuantizationScheme] = {}
    for key, members in kinds.items():
        targets = [kind for kind, owner in of_class.items() if owner == key]
        rest = [name for name in members if _class_of(named[name]) not in targets]
        targets += _attention_class(rest, named) or _patterns(model, rest, named)
        scheme = schemes[members[0]].model_copy(deep=True)
        scheme.targets = targets
        scheme.format = module_format(type(named[members[0]]), scheme)
        groups[f"group_{len(groups)}"] = scheme
    formats = {scheme.format for scheme in groups.values()} - {CompressionFormat.dense}
    config = QuantizationConfig(
        config_groups=groups,
        ignore=_ignored(model, named, schemes, of_class, upstream.ignore or []),
        kv_cache_scheme=_cache_args(named, schemes),
        format=(
            CompressionFormat.mixed_precision.value
            if len(formats) > 1
            else next(iter(formats), CompressionFormat.dense)
        ),
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    _check(model, named, schemes, config)
    return config


def _cache_args(
    named: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]
) -> QuantizationArgs | None:
    """What keys and values are quantized to, if the config is to say it of all attention.

    That is so where no group says it of a module, and where all attention has one scheme: vLLM
    reads the cache's scales where there is a kv_cache_scheme.

    Raises:
        CheckpointError: Two schemes, of which a config holds one; or attention that has none, which
            loaders would give it with scales that nobody measured.
    """
    attention = {
        name: getattr(module, "quantization_scheme", None)
        for name, module in named.items()
        if is_attention(module) and (is_module_quantized(module) or sees_cache(module))
    }
    alone = {name: each for name, each in attention.items() if each and name not in schemes}
    if not alone:
        kinds = {each and _scheme_key(each) for each in attention.values()}
        one = next(iter(attention.values()), None) if len(kinds) == 1 else None
        return None if one is None else one.input_activations
    args: QuantizationArgs = next(iter(alone.values())).input_activations
    wrong = [name for name, each in alone.items() if each.input_activations != args]
    wrong += [name for name, each in attention.items() if not each]
    if wrong:
        raise CheckpointError(
            f"the config of the checkpoint would give {len(wrong)} attention modules the cache's "
            f"scheme of {next(iter(alone))}, which they do not have: {listing(wrong, 10)}"
        )
    return args


def _scheme_key(scheme: QuantizationScheme) -> str:
    """What makes two schemes the same: all but the names that they were given by."""
    return str(scheme.model_dump_json(exclude={"targets", "format"}))


def _class_of(module: nn.Module) -> str | None:
    return next((kind for kind in _CLASSES if isinstance(module, getattr(nn, kind))), None)


def _group(
    named: Mapping[str, nn.Module], schemes: Mapping[str, QuantizationScheme]
) -> dict[tuple[str, str], list[str]]:
    """Quantized modules by scheme and format, in the model's order; attention also by its class."""
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, scheme in schemes.items():
        kind = type(named[name])
        key = _scheme_key(scheme), str(module_format(kind, scheme))
        if is_attention(named[name]):
            key = key[0], kind.__name__
        kinds[key].append(name)
    return kinds


def _attention_class(names: list[str], named: Mapping[str, nn.Module]) -> list[str]:
    """The class of attention modules, where it means just these; vLLM passes over such a group."""
    if not names or not is_attention(named[names[0]]):
        return []
    kind = type(named[names[0]]).__name__
    meant = [name for name, module in named.items() if is_match(name, module, kind)]
    return [kind] if meant == names else []


def _most_of(
    kind: str, named: Mapping[str, nn.Module], kinds: Mapping[tuple[str, str], list[str]]
) -> tuple[str, str] | None:
    """The scheme that most modules of a class have; None where none of them is quantized."""
    counts = Counter(
        key for key, names in kinds.items() for name in names if _class_of(named[name]) == kind
    )
    return next((key for key, _ in counts.most_common(1)), None)


def _patterns(model: nn.Module, names: list[str], named: Iterable[str]) -> list[str]:
    """Targets that match these modules and no others: regexes over numbers, else exact names."""
    shapes: dict[str, list[str]] = defaultdict(list)
    for name in names:
        shapes[_without_numbers(name)].append(name)
    alike = Counter(map(_without_numbers, named))
    found: list[str] = []
    for shape, members in shapes.items():
        if len(members) == 1 or alike[shape] != len(members):
            stored = checkpoint_names(model, members)
            found += [name for member in members for name in (member, stored[member])]
            continue
        stored = checkpoint_names(model, members[:1])
        for name in (members[0], stored[members[0]]):
            found.append(f"re:{_without_numbers(re.escape(name))}$")
    return list(dict.fromkeys(found))


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.\\])", lambda _: r"\d+", name)


def _ignored(
    model: nn.Module,
    named: Mapping[str, nn.Module],
    schemes: Mapping[str, QuantizationScheme],
    of_class: Mapping[str, tuple[str, str] | None],
    upstream: Iterable[str],
) -> list[str]:
    """Modules of a targeted class without a scheme, and what engines take for a Linear."""
    targets = [kind for kind, owner in of_class.items() if owner is not None]
    names = [
        name
        for name, module in named.items()
        if name not in schemes and is_match(name, module, targets)
    ]
    stored = checkpoint_names(model, names)
    both = [each for name in names for each in (name, stored[name])]
    # Loaders that know experts one by one know them as Linear layers.
    fused = list(find_fused_experts(model)) if "Linear" in targets else []
    for name, renamed in checkpoint_names(model, fused).items():
        both += [rf"re:{re.escape(each)}\.\d+\." for each in (name, renamed)]
    # Routers are no Linear here, but one in vLLM: compressed-tensors knows them by class names.
    return [name for name in dict.fromkeys([*both, *upstream]) if name not in schemes]


def _check(
    model: nn.Module,
    named: Mapping[str, nn.Module],
    schemes: Mapping[str, QuantizationScheme],
    config: QuantizationConfig,
) -> None:
    """Resolve the config as a loader does, and compare with what the modules carry."""
    by_target = schemes_by_target(config)
    # Long lists hold exact names: looked up, so that the others are few for each module.
    ignored = set(config.ignore or []).intersection(named)
    ignoring = [each for each in config.ignore or [] if each.startswith("re:") or "." not in each]
    patterns = [target for target in by_target if target not in named]
    wrong = []
    for name, module in named.items():
        attention = is_attention(module)
        if not attention and not isinstance(module, (nn.Linear, nn.Embedding)):
            continue
        matched = [name] if name in by_target else match_targets(name, module, patterns)
        if matched and (name in ignored or is_match(name, module, ignoring)):
            matched = []
        if attention and matched and not is_state_scheme(model, name, by_target[matched[0]]):
            matched = []
        read = _scheme_key(by_target[matched[0]]) if matched else None
        own = _scheme_key(schemes[name]) if name in schemes else None
        if read != own:
            wrong.append(name)
    if wrong:
        raise CheckpointError(
            f"the config of the checkpoint would give {len(wrong)} modules another scheme than "
            f"they have: {listing(wrong, 10)}"
        )
