"""`calipers demo`: the embedded model under three schemes, four observers each."""

from __future__ import annotations

import copy
from typing import Annotated

import typer

from calipers.cli.compare import (
    comparison_json,
    execute,
    judge_schemes,
    plan_runs,
    print_comparison,
)
from calipers.cli.console import plain_errors, print_json, show_progress
from calipers.cli.judging import measure
from calipers.cli.models import load_model, load_tokenizer, model_bytes
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_PATH
from calipers.text import read_batches

__all__ = ["demo"]

_SCHEMES = ("W4A16", "NVFP4", "FP8")
_OBSERVERS = ("memoryless_minmax", "imatrix_mse", "optimal", "optimal:objective=hessian")


def demo(
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Calibrate the embedded model under three schemes with four observers each, and compare.

    Examples:
      calipers demo

      calipers demo --json
    """
    with plain_errors(), show_progress() as progress:
        model = load_model(MODEL_PATH, device="cpu", dtype="auto")
        stored, size = model.dtype, model_bytes(model)
        model = model.float()  # most CPUs are several times slower in bfloat16
        tokenizer = load_tokenizer(MODEL_PATH)
        data = read_batches(CALIBRATION_TEXT, tokenizer, sequence_length=256, samples=64)
        judged = read_batches(HELDOUT_TEXT, tokenizer, sequence_length=256, batch_size=16)
        before = measure(model, judged, progress)
        runs = plan_runs(_SCHEMES, _OBSERVERS, [])
        results = []
        for done, run in enumerate(runs):
            progress("runs", done, len(runs))
            quantized = copy.deepcopy(model)
            results.append(execute(quantized, run, data, judged, before, progress, stored=stored))
        verdicts = judge_schemes(results)
    if json:
        print_json(comparison_json("demo", judged, before, size, results, verdicts))
    else:
        print_comparison("The demo model on held-out text", before, size, results, verdicts)
