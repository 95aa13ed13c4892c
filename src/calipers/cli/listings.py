"""`calipers observers` and `calipers schemes`: what there is to choose from."""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from loguru import logger

from calipers.cli.console import plain_errors, print_json, print_table
from calipers.cli.options import Json, Plugins, load_plugins
from calipers.observers import Observer
from calipers.observers.plugins import load_entry_points

__all__ = ["observers", "schemes"]


def observers(plugin: Plugins = None, json: Json = False) -> None:
    """List the observers with their options, defaults and one line each.

    Examples:
      calipers observers

      calipers observers --json

      calipers observers --plugin my_observers.py
    """
    with plain_errors():
        load_plugins(plugin)
    for failure in load_entry_points():
        logger.warning("{}", failure)
    found = [_describe_observer(name) for name in Observer.registered_names()]
    found.sort(key=lambda each: (each["needs_data"], len(each["options"])))
    if json:
        print_json(found)
        return
    print_table(
        "Observers",
        ("observer", "needs data", "options and defaults", "what it does"),
        [
            (
                each["name"],
                "yes" if each["needs_data"] else "no",
                " ".join(
                    f"{o['name']}={o['default']:.4g}"
                    if isinstance(o["default"], float)
                    else f"{o['name']}={o['default']}"
                    for o in each["options"]
                )
                or "-",
                each["summary"] + "".join(f" Alias: {alias}." for alias in each["aliases"]),
            )
            for each in found
        ],
    )


def schemes(json: Json = False) -> None:
    """List the preset schemes of compressed-tensors.

    Examples:
      calipers schemes

      calipers schemes --json
    """
    presets = {name: preset_name_to_scheme(name, ["Linear"]) for name in PRESET_SCHEMES}
    if json:
        print_json({n: s.model_dump(mode="json", exclude_none=True) for n, s in presets.items()})
        return
    print_table(
        "Preset schemes",
        ("scheme", "weights", "input activations", "needs data"),
        [
            (name, _args(s.weights), _args(s.input_activations), _needs_data(s))
            for name, s in presets.items()
        ],
    )


def _describe_observer(registered: str) -> dict[str, Any]:
    kind = Observer.get_value_from_registry(registered)
    name = registered.replace("-", "_")
    return {
        "name": name,
        "aliases": [
            alias.replace("-", "_")
            for alias in Observer.registered_aliases()
            if Observer.get_value_from_registry(alias) is kind
        ],
        "needs_data": kind.needs_data,
        "summary": (kind.__doc__ or "").strip().partition("\n")[0],
        "options": [
            {"name": option, "default": field.default, "description": field.description}
            for option, field in kind.Options.model_fields.items()
        ],
    }


def _args(args: QuantizationArgs | None) -> str:
    if args is None:
        return "-"
    parts = [f"{args.type}{args.num_bits}", str(args.strategy)]
    if args.group_size:
        parts.append(str(args.group_size))
    if args.block_structure:
        parts.append("x".join(map(str, args.block_structure)))
    if not args.symmetric:
        parts.append("asymmetric")
    if args.dynamic:
        parts.append("dynamic" if args.dynamic is True else f"dynamic {args.dynamic}")
    return " ".join(parts)


def _needs_data(scheme: QuantizationScheme) -> str:
    inputs = scheme.input_activations
    return "yes" if inputs is not None and inputs.dynamic is not True else "no"
