"""How far the predicted output errors of a W4A16 model are from those of running its layers.

    python scripts/predicted_output_errors.py MODEL --objective hessian --group-size 64 --samples 4

MODEL is a local transformers folder; left out, the demo model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from calipers.calibration import calibrate
from calipers.demo import CALIBRATION_TEXT, MODEL_PATH
from calipers.text import read_batches


def run_layers(model: Any, names: Iterable[str], batches: Iterable[Any]) -> dict[str, float]:
    """||X (W - Q)'|| / ||X W'|| of quantized layers, for the inputs of the unquantized model."""
    sums: dict[str, torch.Tensor] = {}

    def watching(name: str, module: Any) -> Callable[[Any, Any], None]:
        sums[name] = torch.zeros(2, dtype=torch.float64, device=module.weight.device)

        def see(_: Any, inputs: Any) -> None:
            x, weight = inputs[0].detach().flatten(0, -2).float(), module.weight.detach()
            args = module.quantization_scheme.weights
            zero = module.weight_zero_point
            error = weight.float() - fake_quantize(weight, module.weight_scale, zero, args).float()
            for place, each in enumerate((error, weight.float())):
                sums[name][place] += (x @ each.T).square().sum(dtype=torch.float64)

        return see

    for name in names:
        module = model.get_submodule(name)
        module.quantization_enabled = False
        module.register_forward_pre_hook(watching(name, module))
    with torch.no_grad():
        for batch in batches:
            model(batch.to(model.device))
    return {name: float((error / total).sqrt()) for name, (error, total) in sums.items()}


def main() -> None:
    """Calibrate, run, and print how the two compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", default=str(MODEL_PATH))
    parser.add_argument("--objective", default="hessian", choices=["hessian", "imatrix"])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    given = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    text = read_batches(CALIBRATION_TEXT, tokenizer, samples=given.samples, sequence_length=512)
    batches = list(text)
    report = calibrate(
        model,
        "W4A16",
        "optimal",
        batches,
        observer_options={"objective": given.objective},
        scheme_options={"group_size": given.group_size},
    )
    predicted = {row.name: row.weight.output_error for row in report.modules if row.weight}
    measured = run_layers(model, predicted, batches)
    ratios = {name: (value or 0.0) / measured[name] for name, value in predicted.items()}
    off = sorted(abs(each - 1) for each in ratios.values())
    for name in (min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)):
        print(f"{name}: predicted {predicted[name]:.4f}, measured {measured[name]:.4f}")
    print(f"{len(off)} modules: half within {median(off):.1%}, nine in ten within ", end="")
    print(f"{off[int(0.9 * len(off))]:.1%}, all within {off[-1]:.1%}")
    ranks = [
        torch.tensor(list(each.values()), dtype=torch.float64, device="cpu").argsort().argsort()
        for each in (predicted, measured)
    ]
    print(f"Spearman {float(torch.corrcoef(torch.stack(ranks).double())[0, 1]):.3f}")


if __name__ == "__main__":
    main()
