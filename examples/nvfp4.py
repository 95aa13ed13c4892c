"""NVFP4: fp4 values in groups of 16 with float8 scales: `python examples/nvfp4.py`."""

from llmcompressor.modifiers.quantization import QuantizationModifier
from side_by_side import run

OBSERVER = "memoryless_mse"


def recipe() -> QuantizationModifier:
    """A preset, with another observer than it names for the weights."""
    return QuantizationModifier(
        targets="Linear", scheme="NVFP4", weight_observer=OBSERVER, ignore=["lm_head"]
    )


if __name__ == "__main__":
    run(f"NVFP4, {OBSERVER}", recipe)
