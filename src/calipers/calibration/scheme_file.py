"""`read_scheme_file`: a QuantizationConfig or a QuantizationScheme from a YAML file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from pydantic import BaseModel, ValidationError

from calipers._words import did_you_mean
from calipers.calibration.targets import TENSORS
from calipers.errors import SchemeError

__all__ = ["read_scheme_file"]


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
    problems = list(_find_problems(data))
    if problems:
        raise SchemeError("\n  ".join([f"{path}:", *problems]))
    if "config_groups" in data:
        return _build(QuantizationConfig, data, path)
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


def _find_problems(data: Mapping[str, Any]) -> Iterator[str]:
    """Unknown fields, found by hand: QuantizationConfig takes any and drops them."""
    if "config_groups" not in data:
        yield from _scheme_problems(data, "")
        return
    yield from _unknown_fields(data, QuantizationConfig, "")
    groups = data["config_groups"]
    if not isinstance(groups, Mapping):
        yield f"config_groups must be a mapping, got {type(groups).__name__}"
        return
    for name, group in groups.items():
        if isinstance(group, Mapping):
            yield from _scheme_problems(group, f"config_groups.{name}.")
    yield from _args_problems(data.get("kv_cache_scheme"), "kv_cache_scheme.")


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
        lines = [
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}".lstrip(": ")
            for item in error.errors()
        ]
        raise SchemeError("\n  ".join([f"{path}:", *lines])) from error
    except (KeyError, NotImplementedError, TypeError) as error:
        # raised by compressed-tensors' validators, which pydantic does not wrap
        told = str(error.args[0] if error.args else error)
        raise SchemeError(f"{path}: {told}{_nearest_preset(data)}") from error


def _nearest_preset(data: Mapping[str, Any]) -> str:
    """For a preset in config_groups that there is not: the one that may be meant."""
    groups = data.get("config_groups")
    if isinstance(groups, Mapping):
        for name, group in groups.items():
            if isinstance(group, list) and str(name).upper() not in PRESET_SCHEMES:
                return did_you_mean(str(name).upper(), PRESET_SCHEMES)
    return ""
