"""GPTQ in int4, to the scales that an observer chooses: `python examples/gptq.py`."""

from llmcompressor.modifiers.gptq import GPTQModifier
from side_by_side import run


def recipe(observer: str = "memoryless_mse") -> GPTQModifier:
    """The modifier of GPTQ takes an observer like any other."""
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "observer": observer}
    group = {"targets": ["Linear"], "weights": weights}
    return GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"])


if __name__ == "__main__":
    run("GPTQ, int4, groups of 32", recipe, lambda: recipe("optimal"))
