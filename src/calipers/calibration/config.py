"""Every way of naming a scheme, turned into one QuantizationConfig: `resolve_config`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
import yaml
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    QuantizationStrategy,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from pydantic import BaseModel, ValidationError

from calipers._words import did_you_mean
from calipers.calibration.targets import TENSORS
from calipers.errors import SchemeError

__all__ = [
    "KV_CACHES",
    "KVCacheLike",
    "SchemeLike",
    "has_free_group_size",
    "resolve_config",
    "resolve_kv_cache",
]

SchemeLike: TypeAlias = QuantizationConfig | QuantizationScheme | str | PathLike[str]
KVCacheLike: TypeAlias = QuantizationArgs | str | None
#: Words for a key-value cache: the format, and the strategy where it is not one scale a layer.
KV_CACHES = {
    "FP8": {"type": "float", "strategy": "tensor"},
    "FP8_HEAD": {"type": "float", "strategy": "attn_head"},
    "INT8": {"type": "int", "strategy": "tensor"},
    "INT8_HEAD": {"type": "int", "strategy": "attn_head"},
}

_FILE_SUFFIXES = (".yaml", ".yml", ".json")


def resolve_config(
    scheme: SchemeLike | None,
    ignore: str | Iterable[str] = (),
    scheme_options: Mapping[str, Any] | None = None,
    kv_cache: KVCacheLike = None,
) -> QuantizationConfig:
    """Turn a scheme, however it was given, into a QuantizationConfig of its own.

    Args:
        scheme: A QuantizationConfig; a QuantizationScheme; the name of a preset of
            compressed-tensors, in any case ("W4A16", "nvfp4", ...; it targets every Linear);
            or the path of a YAML file with the fields of one of the two. None quantizes no layer,
            for a `kv_cache` alone.
        ignore: Modules left alone: exact names, class names, or "re:" patterns, of layers or of
            what contains them. They are added to what the config itself ignores.
        scheme_options: Arguments of the scheme's weights that are to be others, as
            `{"group_size": 64}`; fields of QuantizationArgs. A `group_size` alone changes only
            weights in groups, where the format does not fix their size (NVFP4, MXFP4).
        kv_cache: What keys and values are quantized to, in place of the config's kv_cache_scheme:
            "FP8" or "INT8" for one scale a layer, "FP8_HEAD" or "INT8_HEAD" for one a head, or
            QuantizationArgs. None leaves the config as it is.

    Returns:
        A deep copy: the caller's objects are never changed, neither now nor later. Its
        quantization_status is INITIALIZED whatever it was.

    Raises:
        SchemeError: A scheme of another type, an unknown preset, a missing or malformed file,
            neither a scheme nor a `kv_cache`, patterns that are no strings or no regex, or
            options that are unknown, invalid, or concern no weights of the scheme.
    """
    cache = resolve_kv_cache(kv_cache)
    if scheme is None and cache is not None:
        config = QuantizationConfig(config_groups={})
    else:
        config = _as_config(scheme)
    if cache is not None:
        config.kv_cache_scheme = cache
    if scheme_options is not None:
        apply_scheme_options(config, scheme_options)
    config.ignore = list(dict.fromkeys([*(config.ignore or []), *_as_patterns(ignore)]))
    config.quantization_status = QuantizationStatus.INITIALIZED
    _refuse_bad_patterns(config)
    return config


def resolve_kv_cache(kv_cache: object) -> QuantizationArgs | None:
    """Turn what is said of a key-value cache into arguments of its own.

    Args:
        kv_cache: A key of `KV_CACHES` in any case, with "-" or "_"; QuantizationArgs; or None.

    Raises:
        SchemeError: An unknown word, or something else.
    """
    if kv_cache is None:
        return None
    if isinstance(kv_cache, QuantizationArgs):
        return kv_cache.model_copy(deep=True)
    if not isinstance(kv_cache, str):
        raise SchemeError(
            "kv_cache must be QuantizationArgs or one of "
            f"{', '.join(KV_CACHES)}, got {type(kv_cache).__name__}"
        )
    word = kv_cache.upper().replace("-", "_")
    if word not in KV_CACHES:
        raise SchemeError(
            f"kv_cache (--kv-cache): unknown word {kv_cache!r}.{did_you_mean(word, KV_CACHES)} "
            f"Known: {', '.join(KV_CACHES)}."
        )
    return QuantizationArgs(num_bits=8, symmetric=True, dynamic=False, **KV_CACHES[word])


def _refuse_bad_patterns(config: QuantizationConfig) -> None:
    targets = [
        target
        for scheme in config.config_groups.values()
        if isinstance(scheme, QuantizationScheme)
        for target in scheme.targets
    ]
    for what, patterns in (("target", targets), ("ignore", config.ignore or [])):
        for pattern in patterns:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except re.error as error:
                raise SchemeError(
                    f"{what} pattern {pattern!r} is no regular expression: {error}"
                ) from None


def _as_config(scheme: object) -> QuantizationConfig:
    if isinstance(scheme, QuantizationConfig):
        return scheme.model_copy(deep=True)
    if isinstance(scheme, QuantizationScheme):
        return _single_group(scheme.model_copy(deep=True))
    if isinstance(scheme, str) and scheme.upper() in PRESET_SCHEMES:
        return _single_group(preset_name_to_scheme(scheme, ["Linear"]))
    if isinstance(scheme, PathLike) or (isinstance(scheme, str) and _names_a_file(scheme)):
        read = read_scheme_file(Path(scheme))
        return _single_group(read) if isinstance(read, QuantizationScheme) else read
    if isinstance(scheme, str):
        hint = did_you_mean(scheme.upper().replace("-", "_"), PRESET_SCHEMES)
        raise SchemeError(f"unknown scheme {scheme!r}.{hint} Presets: {', '.join(PRESET_SCHEMES)}.")
    raise SchemeError(
        "scheme must be a QuantizationConfig, a QuantizationScheme, a preset name or the path of "
        f"a YAML file (None only with a kv_cache), got {type(scheme).__name__}"
    )


def _single_group(scheme: QuantizationScheme) -> QuantizationConfig:
    return QuantizationConfig(config_groups={"group_0": scheme})


def _names_a_file(text: str) -> bool:
    path = Path(text)
    return path.suffix.lower() in _FILE_SUFFIXES or len(path.parts) > 1 or path.is_file()


def _as_patterns(ignore: str | Iterable[str]) -> list[str]:
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SchemeError(
                f"ignore must hold module names or patterns, got {type(pattern).__name__}"
            )
    return patterns


def has_free_group_size(args: QuantizationArgs | None) -> bool:
    """Whether these weights have groups whose size is a choice.

    It is none in NVFP4 (tensor_group) and in MX formats, whose scales are powers of two: their
    group size is part of the format.
    """
    return (
        args is not None
        and args.strategy == QuantizationStrategy.GROUP
        and args.scale_dtype is not torch.uint8
    )


def apply_scheme_options(config: QuantizationConfig, options: Mapping[str, Any]) -> None:
    """Change arguments of the weights in every group of a config, in place.

    Args:
        config: A resolved config, the caller's own copy.
        options: Fields of QuantizationArgs with their values. `group_size` alone changes only
            weights that have groups, where the format does not fix their size.

    Raises:
        SchemeError: `options` is no mapping; an unknown field; a value that compressed-tensors
            refuses; or a config without weights that could take them.
    """
    _check_names(options)
    if not options:
        return
    changed = 0
    for group in config.config_groups.values():
        if not isinstance(group, QuantizationScheme) or group.weights is None:
            continue
        if set(options) == {"group_size"} and not has_free_group_size(group.weights):
            continue
        group.weights = _changed(group.weights, options)
        changed += 1
    if not changed:
        if "group_size" in options:
            raise SchemeError(
                "group_size (--group-size): the scheme has no weights in groups whose size is a "
                f"choice; its weights: {_list_weights(config)}"
            )
        raise SchemeError("scheme_options: the scheme quantizes no weights")


def _check_names(options: object) -> None:
    if not isinstance(options, Mapping):
        raise SchemeError(
            "scheme_options must be a mapping of arguments of the weights, as "
            f'{{"group_size": 64}}, got {type(options).__name__}'
        )
    known = list(QuantizationArgs.model_fields)
    for name in options:
        if name not in known:
            raise SchemeError(
                f"scheme_options: unknown argument {name!r}.{did_you_mean(name, known)} "
                f"Arguments of weights: {', '.join(known)}."
            )


def _changed(args: QuantizationArgs, options: Mapping[str, Any]) -> QuantizationArgs:
    size = options.get("group_size")
    # QuantizationArgs takes True for 1, and compares other types with a number
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise SchemeError(
            f"group_size (--group-size): expected a whole number of columns from 1, got {size!r}"
        )
    try:
        changed: QuantizationArgs = QuantizationArgs.model_validate(
            {**args.model_dump(), **options}
        )
    except ValidationError as error:
        raise SchemeError(f"scheme_options: {'; '.join(_told(error))}") from None
    except (KeyError, NotImplementedError, TypeError) as error:
        # raised by compressed-tensors' validators, which pydantic does not wrap
        raise SchemeError(f"scheme_options: {error.args[0] if error.args else error}") from None
    return changed


def _list_weights(config: QuantizationConfig) -> str:
    kinds = {
        f"{group.weights.type}{group.weights.num_bits} {group.weights.strategy}"
        + (f" {group.weights.group_size}" if group.weights.group_size else "")
        for group in config.config_groups.values()
        if isinstance(group, QuantizationScheme) and group.weights is not None
    }
    return ", ".join(sorted(kinds)) or "none"


def read_scheme_file(path: Path) -> QuantizationConfig | QuantizationScheme:
    """Read a scheme from a YAML (or JSON) file.

    Args:
        path: A file whose top level is a mapping: with `config_groups` it is read as a
            QuantizationConfig, without as a QuantizationScheme (`targets` may be left out and
            is then every Linear).

    Returns:
        The object that compressed-tensors builds from these fields.

    Raises:
        SchemeError: No such file, no YAML, no mapping, a recipe of llmcompressor, an unknown field
            (the message names it and lists the valid ones), or a value that compressed-tensors
            refuses.
    """
    if not path.is_file():
        raise SchemeError(f"no such scheme file: {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SchemeError(f"{path} is not valid YAML: {error}") from error
    modifiers = sorted(set(_modifiers_of_recipe(data)))
    if modifiers:
        raise SchemeError(
            f"{path} is a recipe of llmcompressor ({', '.join(modifiers)}), not a scheme: run it "
            "with llmcompressor's oneshot, on the observers of calipers after "
            "calipers.integrations.llmcompressor.install(). A scheme has the fields of a "
            "QuantizationConfig or a QuantizationScheme."
        )
    if not isinstance(data, Mapping):
        raise SchemeError(
            f"{path} must hold a mapping with the fields of a QuantizationConfig or a "
            f"QuantizationScheme, got {type(data).__name__}"
        )
    problems = list(_file_problems(data))
    if problems:
        raise SchemeError("\n  ".join([f"{path}:", *problems]))
    if _is_config(data):
        return _build(QuantizationConfig, {"config_groups": {}, **data}, path)
    return _build(QuantizationScheme, {"targets": ["Linear"], **data}, path)


def _modifiers_of_recipe(data: object) -> Iterator[str]:
    """Names such as GPTQModifier, which stages of a recipe hold at any depth."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            if isinstance(key, str) and key.endswith("Modifier"):
                yield key
            yield from _modifiers_of_recipe(value)
    elif isinstance(data, list):
        for value in data:
            yield from _modifiers_of_recipe(value)


def _file_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Unknown fields, found by hand: QuantizationConfig takes any and drops them."""
    if not _is_config(data):
        yield from _scheme_problems(data, "")
        return
    yield from _unknown_fields(data, QuantizationConfig, "")
    groups = data.get("config_groups", {})
    if not isinstance(groups, Mapping):
        yield f"config_groups must be a mapping, got {type(groups).__name__}"
        return
    for name, group in groups.items():
        if isinstance(group, Mapping):
            yield from _scheme_problems(group, f"config_groups.{name}.")
    yield from _args_problems(data.get("kv_cache_scheme"), "kv_cache_scheme.")


def _is_config(data: Mapping[str, Any]) -> bool:
    """Whether a file holds the fields of a QuantizationConfig, and not those of a scheme."""
    return "config_groups" in data or "kv_cache_scheme" in data


def _scheme_problems(data: Mapping[str, Any], where: str) -> Iterator[str]:
    yield from _unknown_fields(data, QuantizationScheme, where)
    for field in dict.fromkeys(kind.field for kind in TENSORS.values()):
        yield from _args_problems(data.get(field), f"{where}{field}.")


def _args_problems(data: object, where: str) -> Iterator[str]:
    if isinstance(data, Mapping):
        yield from _unknown_fields(data, QuantizationArgs, where)


def _unknown_fields(data: Mapping[str, Any], model: type[BaseModel], where: str) -> Iterator[str]:
    valid = list(model.model_fields)
    for field in data:
        if field not in valid:
            yield (
                f"{where}{field}: unknown field.{did_you_mean(field, valid)} "
                f"Fields of a {model.__name__}: {', '.join(valid)}."
            )


def _build(model: type[Any], data: Mapping[str, Any], path: Path) -> Any:
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise SchemeError("\n  ".join([f"{path}:", *_told(error)])) from error
    except (KeyError, NotImplementedError, TypeError) as error:
        # raised by compressed-tensors' validators, which pydantic does not wrap
        told = str(error.args[0] if error.args else error)
        raise SchemeError(f"{path}: {told}{_nearest_preset(data)}") from error


def _told(error: ValidationError) -> list[str]:
    """One line for each problem: the field, and what is wrong with it."""
    return [
        f"{'.'.join(map(str, each['loc']))}: {each['msg']}".lstrip(": ") for each in error.errors()
    ]


def _nearest_preset(data: Mapping[str, Any]) -> str:
    """For a preset in config_groups that there is not: the one that may be meant."""
    groups = data.get("config_groups")
    if isinstance(groups, Mapping):
        for name, group in groups.items():
            if isinstance(group, list) and str(name).upper() not in PRESET_SCHEMES:
                return did_you_mean(str(name).upper(), PRESET_SCHEMES)
    return ""
