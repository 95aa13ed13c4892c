"""Weights in int4, groups of 32, data-free: `python examples/w4a16.py`."""

from llmcompressor.modifiers.quantization import QuantizationModifier
from side_by_side import run

OBSERVER = "memoryless_mse"


def recipe() -> QuantizationModifier:
    """One group of weights; the observer is named as in any recipe."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "observer": OBSERVER}
    group = {"targets": ["Linear"], "weights": weights}
    return QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])


if __name__ == "__main__":
    run(f"W4A16, groups of 32, {OBSERVER}", recipe, data=False)
