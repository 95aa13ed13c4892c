"""`calipers demo`: the embedded model under three schemes, two observers each."""

from __future__ import annotations

import copy
import time
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from calipers.calibration import calibrate
from calipers.checkpoint import compressed_size
from calipers.cli.console import plain_errors, print_json, print_table, show_progress
from calipers.cli.models import load_model, load_tokenizer, model_bytes
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_PATH
from calipers.evaluation import perplexity
from calipers.text import read_batches

__all__ = ["demo"]

_SCHEMES = {
    "W4A16": "int4 weights, groups of 128",
    "NVFP4": "fp4 weights and inputs, groups of 16",
    "FP8": "fp8 weights and static inputs",
}
_OBSERVERS = ("memoryless_minmax", "imatrix_mse")


def demo(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Calibrate the embedded model under three schemes with two observers each, and compare.

    Examples:
      calipers demo

      calipers demo --json
    """
    with plain_errors(), show_progress() as progress:
        model = load_model(MODEL_PATH, device="cpu", dtype="auto")
        tokenizer = load_tokenizer(MODEL_PATH)
        data = read_batches(CALIBRATION_TEXT, tokenizer, sequence_length=256, samples=64)
        judged = read_batches(HELDOUT_TEXT, tokenizer, sequence_length=256, batch_size=16)
        base = perplexity(model, judged, progress)
        rows: list[dict[str, Any]] = []
        for scheme in _SCHEMES:
            for observer in _OBSERVERS:
                started = time.perf_counter()
                quantized = copy.deepcopy(model)
                report = calibrate(
                    quantized, scheme, observer, [{"input_ids": ids} for ids in data]
                )
                errors = [m.weight_error for m in report.modules if m.weight_error is not None]
                rows.append(
                    {
                        "scheme": scheme,
                        "observer": observer,
                        "weight_error": sum(errors) / len(errors),
                        "perplexity": perplexity(quantized, judged, progress),
                        "bytes": compressed_size(quantized),
                        "seconds": time.perf_counter() - started,
                    }
                )
    if json:
        print_json({"perplexity": base, "bytes": model_bytes(model), "runs": rows})
        return
    float_row = ("unquantized", "", "-", f"{base:.3f}", "-", decimal(model_bytes(model)), "-")
    print_table(
        "The demo model on held-out text",
        ("scheme", "observer", "weight error", "perplexity", "change", "size", "seconds"),
        [
            float_row,
            *(
                (
                    f"{row['scheme']} ({_SCHEMES[row['scheme']]})",
                    row["observer"],
                    f"{row['weight_error']:.4f}",
                    f"{row['perplexity']:.3f}",
                    f"{row['perplexity'] / base - 1:+.2%}",
                    decimal(row["bytes"]),
                    f"{row['seconds']:.1f}",
                )
                for row in rows
            ),
        ],
        right=("weight error", "perplexity", "change", "size", "seconds"),
    )
