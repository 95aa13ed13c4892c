"""Weights and activations in int8, with static scales: `python examples/w8a8_static.py`."""

from llmcompressor.modifiers.quantization import QuantizationModifier
from side_by_side import run

WEIGHT_OBSERVER = "mse"
INPUT_OBSERVER = "minmax"


def recipe() -> QuantizationModifier:
    """A scale for each row of a weight, and one for each layer's input."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "strategy": "channel", "observer": WEIGHT_OBSERVER},
        "input_activations": {"num_bits": 8, "strategy": "tensor", "observer": INPUT_OBSERVER},
    }
    return QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])


if __name__ == "__main__":
    run(f"W8A8 static, weights {WEIGHT_OBSERVER}, inputs {INPUT_OBSERVER}", recipe)
