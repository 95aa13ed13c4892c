"""A checkpoint quantized shard by shard: what choosing scales costs, and llmcompressor's own way.

    python -m benchmarks.quantize [--gib 2] [--json FILE]

A random Llama checkpoint of the given size in bfloat16, int4 in groups of 128, weights alone. The
first table has the time of compressed-tensors' own quantize and pack of all weights, and beside it
that of choosing the scales. The second one has whole runs from folder to folder, each in a process
of its own, alternating; "seconds" is the median. Where `optimal` weighs by inputs (imatrix) these
are random in the first table, and in the second one a statistics file of 64 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from benchmarks.results import Table, add_json_option, measured
from calipers import observe
from calipers.checkpoint.opening import load_model
from calipers.observers import Observer

__all__ = ["main", "save_checkpoint"]

GROUP = 128
#: Name, observer and its options.
OBSERVERS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("min/max", "memoryless_minmax", {}),
    ("memoryless_mse", "memoryless_mse", {}),
    ("optimal, objective=mse", "optimal", {"objective": "mse"}),
    ("optimal, objective=imatrix", "optimal", {"objective": "imatrix"}),
)
CHOOSING = (
    ("observer", "observer", "{}"),
    ("choosing s", "choosing_s", "{:.2f}"),
    ("quantize and pack s", "packing_s", "{:.2f}"),
    ("ratio", "ratio", "{:.2f}"),
)
RUNS = (
    ("tool", "tool", "{}"),
    ("observer", "observer", "{}"),
    ("seconds", "seconds", "{:.1f}"),
)
OURS = """
import sys
from calipers.streaming import quantize_checkpoint
statistics = sys.argv[4] if sys.argv[3] == "optimal" else None
quantize_checkpoint(
    sys.argv[1], sys.argv[2], "W4A16", sys.argv[3], statistics=statistics, load_check=False
)
"""
THEIRS = """
import sys
from compressed_tensors.quantization import preset_name_to_scheme
from llmcompressor import model_free_ptq

if __name__ == "__main__":
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.observer = sys.argv[3]
    model_free_ptq(
        sys.argv[1], sys.argv[2], scheme, ignore=["lm_head", "re:.*embed_tokens.*", "re:.*norm.*"],
        max_workers=1, device="cpu",
    )
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure both and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=3, help="runs of each tool")
    parser.add_argument("--threads", type=int, default=2)
    add_json_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        file = Path(scratch) / "statistics.safetensors"
        layers = save_checkpoint(source, options.gib, options.hidden)
        tokens = torch.arange(64, dtype=torch.int64, device="cpu").view(1, 64)
        observe(load_model(source, device="cpu"), [{"input_ids": tokens}], file)
        choosing = Table(CHOOSING, list(_choosing(options.hidden, layers)))
        runs = Table(RUNS, list(_whole_runs(source, file, Path(scratch), options.runs)))
    tables = {"choosing": choosing, "runs": runs}
    result = measured("benchmarks.quantize", arguments, tables, timed=True)
    print(f"{layers} layers of hidden size {options.hidden}\n")
    print(f"{choosing.markdown()}\n\n{runs.markdown()}\n\n{result.source()}")
    if options.json:
        result.write(options.json)
    return 0


def save_checkpoint(folder: Path, gib: float, hidden: int) -> int:
    """Write a random Llama in bfloat16 of about so many GiB, in files of 500 MB.

    Returns:
        How many layers it has.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, round(gib * 2**30 / 2 / sum(rows * cols for rows, cols in _shapes(hidden))))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=_wide(hidden),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        vocab_size=1024,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1) if "norm" in name else parameter.normal_(std=0.02)
    model.save_pretrained(folder, max_shard_size="500MB")
    return layers


def _wide(hidden: int) -> int:
    return hidden * 7 // 2


def _shapes(hidden: int) -> list[tuple[int, int]]:
    """Rows and columns of the weights of a layer."""
    heads, wide = max(1, hidden // 512) * 128, _wide(hidden)
    return [
        *[(hidden, hidden), (heads, hidden), (heads, hidden), (hidden, hidden)],
        *[(wide, hidden), (wide, hidden), (hidden, wide)],
    ]


def _choosing(hidden: int, layers: int) -> Iterator[dict[str, Any]]:
    """Seconds of choosing scales and of quantizing and packing with them, over all layers."""
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    packer: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    weights = [
        torch.empty(shape, dtype=torch.bfloat16, device="cpu").normal_(std=0.02)
        for shape in _shapes(hidden)
    ]
    moments = {
        cols: {
            "input_square_sum": torch.rand(cols, dtype=torch.float64, device="cpu") + 0.1,
            "num_input_tokens": torch.tensor(64, dtype=torch.int64, device="cpu"),
        }
        for cols in {cols for _, cols in _shapes(hidden)}
    }
    for title, name, given in OBSERVERS:
        first = Observer.load_from_registry(name, "weight", args, **given)  # what is built once
        if first.needs_data:
            first.load_state({**first.state(), **moments[weights[0].shape[1]]})
        first(weights[0])
        choosing = packing = 0.0
        for _ in range(layers):
            for weight in weights:
                start = perf_counter()
                observer = Observer.load_from_registry(name, "weight", args, **given)
                if observer.needs_data:
                    observer.load_state({**observer.state(), **moments[weight.shape[1]]})
                scale, zero_point = observer(weight)
                chosen = perf_counter()
                state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
                packer.compress(state, scheme)
                choosing += chosen - start
                packing += perf_counter() - chosen
        yield {
            "observer": title,
            "choosing_s": choosing,
            "packing_s": packing,
            "ratio": choosing / packing,
        }


def _whole_runs(
    source: Path, statistics_file: Path, scratch: Path, runs: int
) -> Iterator[dict[str, Any]]:
    ways = [
        (tool, script, observer)
        for observer in ("memoryless_minmax", "memoryless_mse")
        for tool, script in (("calipers", OURS), ("llmcompressor", THEIRS))
    ]
    ways.append(("calipers", OURS, "optimal"))
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(runs):
        for tool, script, observer in ways:
            out = scratch / f"{tool}-{observer}-{number}"
            file = scratch / f"run_{tool}.py"
            file.write_text(script, encoding="utf-8")
            start = perf_counter()
            done = subprocess.run(
                [sys.executable, file, source, out, observer, statistics_file],
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{tool} with {observer} failed:\n{done.stderr[-3000:]}")
            seconds.setdefault((tool, observer), []).append(perf_counter() - start)
            for each in out.iterdir():
                each.unlink()
    for (tool, observer), own in seconds.items():
        yield {"tool": tool, "observer": observer, "seconds": statistics.median(own)}


if __name__ == "__main__":
    sys.exit(main())
