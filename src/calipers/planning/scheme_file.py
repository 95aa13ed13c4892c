"""A plan as a file that `calibrate` and `quantize` take with `--scheme`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

__all__ = ["build_config", "config_text"]

_LEFT_OUT = ("observer_kwargs", "dynamic", "actorder", "observer")


def build_config(
    chosen: Mapping[str, tuple[QuantizationScheme, list[str]]],
) -> QuantizationConfig:
    """The config of schemes with the modules that they are for.

    Args:
        chosen: By name of the scheme.
    """
    groups = {
        f"group_{number}": scheme.model_copy(update={"targets": targets}, deep=True)
        for number, (scheme, targets) in enumerate(chosen.values())
    }
    return QuantizationConfig(config_groups=groups)


def config_text(config: QuantizationConfig, names: Iterable[str], head: Iterable[str]) -> str:
    """A config in YAML, as `calibrate --scheme` reads it.

    Args:
        config: The config.
        names: What each of its groups is called, for comments.
        head: Lines of a comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in head]
    lines.append("config_groups:")
    for (group, scheme), name in zip(config.config_groups.items(), names, strict=True):
        assert isinstance(scheme, QuantizationScheme)
        assert scheme.weights is not None
        data: dict[str, Any] = {
            "weights": _said(scheme.weights.model_dump(mode="json")),
            "targets": list(scheme.targets),
        }
        text = yaml.safe_dump(data, sort_keys=False, default_flow_style=False, width=1000)
        lines.append(f"  {group}:  # {name}, {len(scheme.targets)} targets")
        lines += [f"    {line}" for line in text.splitlines()]
    return "\n".join(lines) + "\n"


def _said(args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that say nothing."""
    return {
        name: value
        for name, value in args.items()
        if value is not None and not (name in _LEFT_OUT and not value)
    }
