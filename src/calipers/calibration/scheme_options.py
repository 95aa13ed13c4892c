"""`apply_scheme_options`: a scheme with other arguments of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
)
from pydantic import ValidationError

from calipers._words import did_you_mean
from calipers.calibration.group_sizes import has_free_group_size
from calipers.errors import SchemeError

__all__ = ["apply_scheme_options"]


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
                f"choice; its weights: {_listed(config)}"
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
        told = "; ".join(
            f"{'.'.join(map(str, each['loc']))}: {each['msg']}".lstrip(": ")
            for each in error.errors()
        )
        raise SchemeError(f"scheme_options: {told}") from None
    except (KeyError, NotImplementedError, TypeError) as error:
        # raised by compressed-tensors' validators, which pydantic does not wrap
        raise SchemeError(f"scheme_options: {error.args[0] if error.args else error}") from None
    return changed


def _listed(config: QuantizationConfig) -> str:
    kinds = {
        f"{group.weights.type}{group.weights.num_bits} {group.weights.strategy}"
        + (f" {group.weights.group_size}" if group.weights.group_size else "")
        for group in config.config_groups.values()
        if isinstance(group, QuantizationScheme) and group.weights is not None
    }
    return ", ".join(sorted(kinds)) or "none"
