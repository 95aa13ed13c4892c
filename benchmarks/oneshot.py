"""llmcompressor's `oneshot` from call to return, with its own observer and with ours in its place.

    python -m benchmarks.oneshot [--json FILE]

Weights only, int4 in groups, memoryless_mse, a random Llama, nothing saved. Two processes that
share a folder for the native library, empty at first: "first on a machine" is the first run with
calipers in the first of them, which compiles the library; in the second, "first of a process" is
the first run and "later" the median of those after it. Within a process own and ours alternate.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import torch

from benchmarks.results import ROOT, Table, add_json_option, measured

__all__ = ["main"]

#: Own and ours in turn; the first process starts with ours, so that nothing is warm before it.
COLD = ("ours", "own")
AT_LEAST, AT_LEAST_COLD = 6.0, 1.0
COLUMNS = (
    ("run", "run", "{}"),
    ("llmcompressor s", "own_s", "{:.1f}"),
    ("calipers s", "ours_s", "{:.1f}"),
    ("ratio", "ratio", "{:.1f}"),
    ("wanted", "wanted", "{:g}"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run both processes and print the comparison."""
    options = _parser().parse_args(arguments)
    if options.child:
        print("RUNS " + json.dumps(_run_both(options, options.child.split(","))))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        cold = _in_a_process(options, COLD, cache)
        warm = _in_a_process(options, ("own", "ours") * options.pairs, cache)
    torch.set_num_threads(options.threads)
    table = Table(COLUMNS, _rows(cold, warm))
    result = measured("benchmarks.oneshot", arguments, {"oneshot": table}, timed=True)
    print(f"{warm['parameters'] / 1e6:.0f} million parameters, {options.dtype}\n")
    print(f"{table.markdown()}\n\n{result.source()}")
    print(f"groups with another scale: {warm['differ']} of {warm['groups']}")
    if options.json:
        result.write(options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2, help="runs of each, warm")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--observer", default="memoryless_mse")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    add_json_option(parser)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _in_a_process(
    options: argparse.Namespace, order: tuple[str, ...], cache: str
) -> dict[str, Any]:
    names = ("layers", "hidden", "group_size", "observer", "dtype", "threads")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, "-m", "benchmarks.oneshot", *given, f"--child={','.join(order)}"]
    environment = {**os.environ, "CALIPERS_CACHE": cache}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RUNS ")]
    found: dict[str, Any] = json.loads(line.removeprefix("RUNS "))
    return found


def _run_both(options: argparse.Namespace, order: list[str]) -> dict[str, Any]:
    """Seconds of each run, and how the scales of both compare."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import LlamaConfig, LlamaForCausalLM

    from calipers.integrations.llmcompressor import install

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=8 * options.hidden // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // 64,
        num_key_value_heads=options.hidden // 64,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    original = LlamaForCausalLM(config).to(getattr(torch, options.dtype))
    runs, scales = [], {}
    with tempfile.TemporaryDirectory() as folder:
        # Its check of the model asks the hub for the name, unless that is a folder with a config.
        config.save_pretrained(folder)
        for which in order:
            model = copy.deepcopy(original)
            model.config._name_or_path = folder
            weights = {
                "num_bits": 4,
                "strategy": "group",
                "group_size": options.group_size,
                "observer": options.observer,
            }
            group = {"targets": ["Linear"], "weights": weights}
            recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"])
            with install(replace=True) if which == "ours" else nullcontext():
                start = perf_counter()
                oneshot(model=model, processor=object(), recipe=recipe)
                runs.append((which, perf_counter() - start))
            scales[which] = [
                value.flatten()
                for name, value in model.named_parameters()
                if name.endswith("weight_scale")
            ]
    own, ours = (torch.cat(scales.get(which, scales["ours"])).float() for which in ("own", "ours"))
    return {
        "runs": runs,
        "groups": own.numel(),
        "differ": int((own != ours).sum()),
        "parameters": sum(p.numel() for p in original.parameters()),
    }


def _rows(cold: dict[str, Any], warm: dict[str, Any]) -> list[dict[str, Any]]:
    own = [seconds for which, seconds in warm["runs"] if which == "own"]
    ours = [seconds for which, seconds in warm["runs"] if which == "ours"]
    cold_ours, cold_own = (dict(cold["runs"])[which] for which in ("ours", "own"))
    return [
        _row("first on a machine", cold_own, cold_ours, AT_LEAST_COLD),
        _row("first of a process", own[0], ours[0], AT_LEAST),
        _row("later", statistics.median(own), statistics.median(ours[1:] or ours), AT_LEAST),
    ]


def _row(run: str, own: float, ours: float, wanted: float) -> dict[str, Any]:
    return {"run": run, "own_s": own, "ours_s": ours, "ratio": own / ours, "wanted": wanted}


if __name__ == "__main__":
    sys.exit(main())
