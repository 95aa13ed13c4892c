"""llmcompressor's `oneshot` from call to return, with its own observer and with ours in its place.

    python benchmarks/oneshot.py [--json FILE]

Weights only, int4 in groups, memoryless_mse, a random Llama, nothing saved. Two processes that
share a folder for the native library, empty at first: `cold` is the first run with calipers in the
first of them, which compiles the library; in the second, `warm start` is the first run and `warm`
the later ones. Within a process the two sides alternate.
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
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

__all__ = ["main"]

#: Own and ours in turn; the first process starts with ours, so that nothing is warm before it.
COLD = ("ours", "own")
AT_LEAST, AT_MOST_COLD = 6.0, 1.0


def main(arguments: list[str] | None = None) -> int:
    """Run both processes and print the comparison."""
    options = _parser().parse_args(arguments)
    if options.child:
        print("RUNS " + json.dumps(_run_sides(options, options.child.split(","))))
        return 0
    with tempfile.TemporaryDirectory() as cache:
        cold = _in_a_process(options, COLD, cache)
        warm = _in_a_process(options, ("own", "ours") * options.pairs, cache)
    report = _summarise(cold, warm)
    print(
        f"{report['parameters'] / 1e6:.0f} million parameters, {report['dtype']}, "
        f"{report['threads']} threads, torch {report['torch']}"
    )
    for name in ("cold", "warm start", "warm"):
        row = report[name]
        wanted = f"wanted {row['wanted']:g}" if row["wanted"] else ""
        print(
            f"{name:10}  own {row['own_s']:6.2f} s  calipers {row['ours_s']:6.2f} s  "
            f"ratio {row['ratio']:5.1f}  {wanted}"
        )
    print(f"groups with another scale: {report['differ']} of {report['groups']}")
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2, help="runs of each side, warm")
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--observer", default="memoryless_mse")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the report to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def _in_a_process(
    options: argparse.Namespace, sides: tuple[str, ...], cache: str
) -> dict[str, Any]:
    names = ("layers", "hidden", "group_size", "observer", "dtype", "threads")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    command = [sys.executable, __file__, *given, f"--child={','.join(sides)}"]
    environment = {**os.environ, "CALIPERS_CACHE": cache}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RUNS ")]
    found: dict[str, Any] = json.loads(line.removeprefix("RUNS "))
    return found


def _run_sides(options: argparse.Namespace, sides: list[str]) -> dict[str, Any]:
    """Seconds of each run, and how the scales of the two sides compare."""
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
        for side in sides:
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
            with install(replace=True) if side == "ours" else nullcontext():
                start = perf_counter()
                oneshot(model=model, processor=object(), recipe=recipe)
                runs.append((side, perf_counter() - start))
            scales[side] = [
                value.flatten()
                for name, value in model.named_parameters()
                if name.endswith("weight_scale")
            ]
    own, ours = (torch.cat(scales.get(side, scales["ours"])).float() for side in ("own", "ours"))
    return {
        "runs": runs,
        "groups": own.numel(),
        "differ": int((own != ours).sum()),
        "parameters": sum(p.numel() for p in original.parameters()),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _summarise(cold: dict[str, Any], warm: dict[str, Any]) -> dict[str, Any]:
    own = [seconds for side, seconds in warm["runs"] if side == "own"]
    ours = [seconds for side, seconds in warm["runs"] if side == "ours"]
    cold_ours, cold_own = (dict(cold["runs"])[side] for side in ("ours", "own"))
    report = {key: value for key, value in warm.items() if key != "runs"}
    report["cold"] = _row(cold_own, cold_ours, AT_MOST_COLD)
    report["warm start"] = _row(own[0], ours[0], AT_LEAST)
    report["warm"] = _row(statistics.median(own), statistics.median(ours[1:] or ours), AT_LEAST)
    return report


def _row(own: float, ours: float, wanted: float | None) -> dict[str, float | None]:
    return {"own_s": own, "ours_s": ours, "ratio": own / ours, "wanted": wanted}


if __name__ == "__main__":
    sys.exit(main())
