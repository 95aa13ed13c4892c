"""`resolve_config`: every way of naming a scheme, turned into one QuantizationConfig."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

from calipers._words import did_you_mean
from calipers.calibration.scheme_file import read_scheme_file
from calipers.calibration.scheme_options import apply_scheme_options
from calipers.errors import SchemeError

__all__ = ["SchemeLike", "resolve_config"]

SchemeLike: TypeAlias = QuantizationConfig | QuantizationScheme | str | PathLike[str]

_FILE_SUFFIXES = (".yaml", ".yml", ".json")


def resolve_config(
    scheme: SchemeLike,
    ignore: str | Iterable[str] = (),
    scheme_options: Mapping[str, Any] | None = None,
) -> QuantizationConfig:
    """Turn a scheme, however it was given, into a QuantizationConfig of its own.

    Args:
        scheme: A QuantizationConfig; a QuantizationScheme; the name of a preset of
            compressed-tensors, in any case ("W4A16", "nvfp4", ...; it targets every Linear);
            or the path of a YAML file with the fields of one of the two.
        ignore: Modules left alone: exact names, class names, or "re:" patterns, of layers or of
            what contains them. They are added to what the config itself ignores.
        scheme_options: Arguments of the scheme's weights that are to be others, as
            `{"group_size": 64}`; fields of QuantizationArgs. A `group_size` alone changes only
            weights in groups, where the format does not fix their size (NVFP4, MXFP4).

    Returns:
        A deep copy: the caller's objects are never changed, neither now nor later. Its
        quantization_status is INITIALIZED whatever it was.

    Raises:
        SchemeError: A scheme of another type, an unknown preset, a missing or malformed file, a
            kv_cache_scheme (not supported yet), patterns that are no strings or no regex, or
            options that are unknown, invalid, or concern no weights of the scheme.
    """
    config = _as_config(scheme)
    if config.kv_cache_scheme is not None:
        raise SchemeError("kv_cache_scheme is not supported yet: remove it from the config")
    if scheme_options is not None:
        apply_scheme_options(config, scheme_options)
    config.ignore = list(dict.fromkeys([*(config.ignore or []), *_as_patterns(ignore)]))
    config.quantization_status = QuantizationStatus.INITIALIZED
    _refuse_bad_patterns(config)
    return config


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
        raise SchemeError(_unknown_preset(scheme))
    raise SchemeError(
        "scheme must be a QuantizationConfig, a QuantizationScheme, a preset name or the path of "
        f"a YAML file, got {type(scheme).__name__}"
    )


def _single_group(scheme: QuantizationScheme) -> QuantizationConfig:
    return QuantizationConfig(config_groups={"group_0": scheme})


def _names_a_file(text: str) -> bool:
    path = Path(text)
    return path.suffix.lower() in _FILE_SUFFIXES or len(path.parts) > 1 or path.is_file()


def _unknown_preset(name: str) -> str:
    hint = did_you_mean(name.upper().replace("-", "_"), PRESET_SCHEMES)
    return f"unknown scheme {name!r}.{hint} Presets: {', '.join(PRESET_SCHEMES)}."


def _as_patterns(ignore: str | Iterable[str]) -> list[str]:
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise SchemeError(
                f"ignore must hold module names or patterns, got {type(pattern).__name__}"
            )
    return patterns
