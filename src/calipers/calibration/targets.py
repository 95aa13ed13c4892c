"""`match_targets_to_schemes`: which scheme compressed-tensors would give each module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_named_modules, match_targets

__all__ = ["Target", "is_quantizable", "match_targets_to_schemes", "schemes_by_target"]


@dataclass(frozen=True)
class Target:
    """A quantizable module, its name in the model, and the scheme that the config gives it."""

    name: str
    module: torch.nn.Module
    scheme: QuantizationScheme

    @property
    def args(self) -> dict[str, QuantizationArgs]:
        """What the scheme quantizes: "weight", "input" and "output" to their arguments."""
        found = {
            "weight": self.scheme.weights,
            "input": self.scheme.input_activations,
            "output": self.scheme.output_activations,
        }
        return {base_name: args for base_name, args in found.items() if args is not None}


def is_quantizable(module: torch.nn.Module) -> bool:
    """Whether compressed-tensors can quantize this type of module."""
    return isinstance(module, (torch.nn.Linear, torch.nn.Embedding))


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


def match_targets_to_schemes(model: torch.nn.Module, config: QuantizationConfig) -> list[Target]:
    """Quantizable modules that the config gives something to quantize, in the model's order.

    The scheme is chosen as `apply_quantization_config` chooses it: exact names before patterns
    before class names. Modules of other types and schemes that quantize nothing are left out.

    Args:
        model: Any model; nothing in it is changed.
        config: A resolved config.
    """
    schemes = schemes_by_target(config)
    found = []
    for name, module in match_named_modules(model, schemes, config.ignore):
        if not is_quantizable(module):
            continue
        target = Target(name, module, schemes[match_targets(name, module, schemes)[0]])
        if target.args:
            found.append(target)
    return found
