"""`calipers demo`: the embedded model under three schemes, four observers each."""

from __future__ import annotations

import copy

from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.cli.compare import Comparison, comparison_json, print_comparison
from calipers.cli.console import plain_errors, print_json, show_progress
from calipers.cli.judging import measure, reference_for
from calipers.cli.options import Json
from calipers.cli.runs import execute, judge_schemes, plan_runs
from calipers.cli.texts import calibration_text, heldout_text
from calipers.demo import MODEL_PATH

__all__ = ["demo"]

_SCHEMES = ("W4A16", "NVFP4", "FP8")
_OBSERVERS = ("memoryless_minmax", "imatrix_mse", "optimal:objective=imatrix", "optimal")


def demo(json: Json = False) -> None:
    """Calibrate the embedded model under three schemes with four observers each, and compare.

    Examples:
      calipers demo

      calipers demo --json
    """
    with plain_errors(), show_progress() as progress:
        model = load_model(MODEL_PATH, device="cpu", dtype="auto")
        stored, size = model.dtype, model.get_memory_footprint()
        model = model.float()  # most CPUs are several times slower in bfloat16
        tokenizer = load_tokenizer(MODEL_PATH)
        data = calibration_text(None, demo=True).read(tokenizer, 256, 64)
        judged = heldout_text(None, demo=True).read(tokenizer, 256, None)
        reference = reference_for(judged.batches)
        before = measure(model, judged.batches, progress, reference.keep)
        results = execute(
            lambda: copy.deepcopy(model),
            plan_runs(_SCHEMES, _OBSERVERS, []),
            data.batches,
            judged.batches,
            before,
            reference,
            progress,
            stored=stored,
        )
    comparison = Comparison("demo", data, judged, before, size, results, judge_schemes(results))
    if json:
        print_json(comparison_json(comparison))
    else:
        print_comparison("The demo model on held-out text", comparison)
