"""Plans of a scheme for each module, beside uniform, hand-made and random ones of the same size.

    python -m benchmarks.planning --model DIR [--bits 4.5] [--random 20] [--json FILE]

Calibrated on the embedded calibration texts, judged on the embedded held-out texts. "singles" is
the divergence of the logits, on held-out text, where one unit alone (layers that engines fuse) is
quantized by W4A16, beside what each sensitivity predicts: Spearman's rank correlation. "plans" has
perplexities of whole models; gap is the change of the mean loss of a token over the unquantized
model, with its paired standard error, and share is the gap over that of uniform W4A16. By hand:
blocks from both ends in turn, as long as they fit, get W8A16. Random: units in random order get
W8A16 where they still fit.

Weights are quantized in the dtype of the checkpoint; with --float32 the model runs in float32,
which is faster on processors without bfloat16.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.results import Table, add_json_option, measured
from calipers.calibration.config import resolve_config
from calipers.calibration.targets import resolve_modules
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.evaluation import evaluate_losses, paired_difference
from calipers.planning.candidates import read_candidates
from calipers.planning.plan import solve
from calipers.planning.predict import gather, make_units, predict
from calipers.planning.sensitivity import (
    kl_sensitivities,
    mean_kl,
    reference_logits,
    residual_sensitivities,
    swapped,
)
from calipers.text import read_batches
from calipers.texts import calibration_texts, heldout_texts

__all__ = ["main"]

LOW, HIGH = "W4A16", "W8A16"
RANKS = (
    ("sensitivity", "sensitivity", "{}"),
    ("units", "units", "{}"),
    ("Spearman", "spearman", "{:.3f}"),
)
PLANS = (
    ("plan", "plan", "{}"),
    ("bits", "bits", "{:.3f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("gap nats", "gap", "{:.4f}"),
    ("± gap", "error", "{:.4f}"),
    ("share of uniform", "share", "{:.3f}"),
    ("± share", "share_error", "{:.3f}"),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print the tables."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = _Work(options)
    tables = {}
    if options.singles:
        tables["singles"] = Table(RANKS, work.singles(options.singles))
        _write(tables, arguments, options)
    rows: list[dict[str, Any]] = []
    tables["plans"] = Table(PLANS, rows)
    for row in work.plans(options.bits, options.random):
        rows.append(row)
        _say(" ".join(f"{k}={v}" for k, v in row.items()))
        _write(tables, arguments, options)
    print("\n\n".join(each.markdown() for each in tables.values()))
    return 0


def _write(tables: dict[str, Table], arguments: list[str] | None, options: Any) -> None:
    """What there is so far: a machine may be taken away."""
    if options.json:
        measured("benchmarks.planning", arguments, tables).write(options.json)


def _say(text: str) -> None:
    print(f"[{perf_counter():.0f}] {text}", file=sys.stderr, flush=True)


def _progress(stage: str, done: int, total: int | None) -> None:
    if done % 20 == 0:
        _say(f"{stage} {done} of {total}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--bits", type=float, default=4.5)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--random", type=int, default=20, help="how many random plans")
    parser.add_argument("--singles", type=int, default=40, help="units quantized alone; 0: none")
    parser.add_argument("--samples", type=int, default=8, help="sequences to calibrate with")
    parser.add_argument("--kl-samples", type=int, default=2, help="sequences of the divergence")
    parser.add_argument("--eval-samples", type=int, default=8, help="sequences to judge by")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--kl-length", type=int, default=256, help="tokens for the divergence")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    add_json_option(parser)
    return parser


class _Work:
    """A model with what is predicted of it, and another copy that is judged."""

    def __init__(self, options: Any) -> None:
        tokenizer = load_tokenizer(options.model)

        def read(texts: Iterable[str], length: int, samples: int) -> list[torch.Tensor]:
            found = read_batches(texts, tokenizer, sequence_length=length, samples=samples)
            return [row[None] for batch in found for row in batch]

        self.model = load_model(options.model, device="cpu", dtype="auto")
        self.judged = (
            load_model(options.model, device="cpu", dtype="float32")
            if options.float32
            else self.model
        )
        self.data = read(calibration_texts(), options.length, options.samples)
        self.kl_data = read(calibration_texts(), options.kl_length, options.kl_samples)
        self.kl_heldout = read(heldout_texts(), options.kl_length, options.kl_samples)
        self.heldout = read(heldout_texts(), options.length, options.eval_samples)
        self.candidates = read_candidates(f"{LOW},{HIGH}", options.group_size)
        config = resolve_config(
            self.candidates[0].scheme.model_copy(update={"targets": ["Linear"]})
        )
        self.units = make_units(resolve_modules(self.model, config).targets)
        watched = make_units(resolve_modules(self.judged, config).targets)
        _say(f"{len(self.units)} units; data")
        self.gathered = gather(self.judged, watched, self.data)
        _say("candidates")
        keep: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
        predict(self.units, self.candidates, self.gathered, _progress, keep)
        self.weights: dict[str, dict[str, torch.Tensor]] = {LOW: {}, HIGH: {}}
        for (scheme, _), own in keep.items():
            self.weights[scheme].update(own)
        _say("sensitivities")
        self.sensitivities = {
            "residual": residual_sensitivities(self.units, self.gathered),
            "kl": kl_sensitivities(
                self.judged,
                self.units,
                self.candidates,
                self.gathered,
                self.kl_data,
                _progress,
                keep,
            ),
        }

    def singles(self, count: int) -> list[dict[str, Any]]:
        """Rank correlations with the divergence of single units."""
        picked = random.Random(0).sample(self.units, min(count, len(self.units)))
        truth = []
        reference = reference_logits(self.judged, self.kl_heldout)
        for unit in picked:
            weights = {each.name: self.weights[LOW][each.name] for each in unit.targets}
            with swapped(self.judged, weights):
                truth.append(mean_kl(self.judged, self.kl_heldout, reference))
        predicted = {
            kind: [own[unit.name] * unit.predicted[LOW].error for unit in picked]
            for kind, own in self.sensitivities.items()
        }
        predicted["none: relative output error"] = [u.predicted[LOW].relative for u in picked]
        predicted["none: output error"] = [u.predicted[LOW].error for u in picked]
        rows = [
            {"sensitivity": kind, "units": len(picked), "spearman": _spearman(values, truth)}
            for kind, values in predicted.items()
        ]
        for row in rows:
            _say(str(row))
        return rows

    def plans(self, bits: float, count: int) -> Iterable[dict[str, Any]]:
        """Rows of whole models, one after the other."""
        weights = sum(unit.weights for unit in self.units)
        budget = math.floor(bits * weights)
        before = evaluate_losses(self.judged, self.heldout)
        yield {"plan": "unquantized", "bits": None, "perplexity": before.value}
        uniform = None
        for name, chosen in self._plans(budget, count):
            swap = {
                each.name: self.weights[chosen[unit.name]][each.name]
                for unit in self.units
                for each in unit.targets
            }
            with swapped(self.judged, swap):
                after = evaluate_losses(self.judged, self.heldout)
            change = paired_difference(before, after)
            uniform = uniform or change.mean_loss
            size = sum(unit.predicted[chosen[unit.name]].bits for unit in self.units)
            error = change.mean_loss_error
            yield {
                "plan": name,
                "bits": size / weights,
                "perplexity": after.value,
                "gap": change.mean_loss,
                "error": error,
                "share": change.mean_loss / uniform,
                "share_error": None if error is None else error / abs(uniform),
            }

    def _plans(self, budget: int, count: int) -> Iterable[tuple[str, dict[str, str]]]:
        yield f"uniform {LOW}", {unit.name: LOW for unit in self.units}
        for kind, own in self.sensitivities.items():
            plan = solve(self.units, self.candidates, own, budget, kind)
            yield f"plan by {kind}", {each.name: str(each.scheme) for each in plan.choices}
        blocks = list(dict.fromkeys(unit.block for unit in self.units))
        ends = [each for pair in zip(blocks, reversed(blocks), strict=True) for each in pair]
        order = [
            unit for block in dict.fromkeys(ends) for unit in self.units if unit.block == block
        ]
        yield "first and last blocks", self._filled(order, budget)
        for number in range(count):
            order = random.Random(number).sample(self.units, len(self.units))
            yield f"random {number}", self._filled(order, budget)

    def _filled(self, order: Sequence[Any], budget: int) -> dict[str, str]:
        """The better scheme for units in this order, where it still fits."""
        chosen = {unit.name: LOW for unit in self.units}
        left = budget - sum(unit.predicted[LOW].bits for unit in self.units)
        for unit in order:
            more = unit.predicted[HIGH].bits - unit.predicted[LOW].bits
            if more <= left:
                chosen[unit.name] = HIGH
                left -= more
        return chosen


def _spearman(first: Sequence[float], second: Sequence[float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


if __name__ == "__main__":
    raise SystemExit(main())
