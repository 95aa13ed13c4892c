"""`read_scheme_file`: a QuantizationConfig or a QuantizationScheme from a YAML file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from pydantic import BaseModel, ValidationError

from calipers.errors import SchemeError

__all__ = ["read_scheme_file"]

_ARGS_FIELDS = ("weights", "input_activations", "output_activations")


def read_scheme_file(path: Path) -> QuantizationConfig | QuantizationScheme:
    """Read a scheme from a YAML (or JSON) file.

    Args:
        path: A file whose top level is a mapping: with `config_groups` it is read as a
            QuantizationConfig, without as a QuantizationScheme (`targets` may be left out and
            is then every Linear).

    Returns:
        The object that compressed-tensors builds from these fields.

    Raises:
        SchemeError: No such file, no YAML, no mapping, an unknown field (the message names it
            and lists the valid ones), or a value that compressed-tensors refuses.
    """
    if not path.is_file():
        raise SchemeError(f"no such scheme file: {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SchemeError(f"{path} is not valid YAML: {error}") from error
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
    for field in _ARGS_FIELDS:
        yield from _args_problems(data.get(field), f"{where}{field}.")


def _args_problems(data: object, where: str) -> Iterator[str]:
    if isinstance(data, Mapping):
        yield from _unknown_fields(data, QuantizationArgs, where)


def _unknown_fields(data: Mapping[str, Any], model: type[BaseModel], where: str) -> Iterator[str]:
    valid = list(model.model_fields)
    for field in data:
        if field not in valid:
            close = difflib.get_close_matches(str(field), valid, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            yield (
                f"{where}{field}: unknown field.{hint} "
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
        raise SchemeError(f"{path}: {error.args[0] if error.args else error}") from error
