"""A model calibrated block by block: in little memory, beside the whole, and beside llmcompressor.

    python -m benchmarks.blocks [--gib 6] [--limit-gib 2.5] [--model DIR] [--json FILE]

The first table is of a random Llama in bfloat16 (hidden size 4096), W4A16 in groups of 128 by
`optimal`, with 8 sequences of 256 tokens: in blocks, in a process whose control group allows
`--limit-gib` (where such groups can be made; "limit" says so). "parts" is what reading the
checkpoint once, the forward passes of all layers and the derivation of all scales take, each
measured alone, the last two on a cut of four layers. The scales of those four layers are compared
with those of the cut, calibrated as a whole.

The second one is of `--model`, a transformers folder (else a random Llama of 300 million
parameters): from path to checkpoint, each run in a process of its own, alternating, the median.
llmcompressor's `oneshot` has its sequential pipeline, and calipers' observers installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.quantize import save_checkpoint
from benchmarks.results import Table, add_json_option, measured

__all__ = ["main"]

CUT = 4
SEQUENCES, TOKENS = 8, 256
LIMITED = (
    ("checkpoint", "checkpoint", "{}"),
    ("limit", "limit", "{}"),
    ("peak memory GiB", "peak_gib", "{:.2f}"),
    ("seconds", "seconds", "{:.1f}"),
    ("parts s", "parts_s", "{:.1f}"),
    ("ratio", "ratio", "{:.2f}"),
    ("scales differ", "differ", "{}"),
)
WAYS = (
    ("way", "way", "{}"),
    ("seconds", "seconds", "{:.1f}"),
    ("over the whole", "ratio", "{:.2f}"),
    ("peak memory GiB", "peak_gib", "{:.2f}"),
)
OURS = """
import json, resource, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
import calipers
data = [{"input_ids": ids} for ids in torch.load(sys.argv[3])]
options = json.loads(sys.argv[5])
start = time.perf_counter()
imatrix = {"objective": "imatrix"}
calipers.calibrate(
    sys.argv[1], "W4A16", "optimal", data, out=sys.argv[2], observer_options=imatrix, **options
)
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print("FOUND", json.dumps({"seconds": seconds, "peak_gib": peak}))
"""
THEIRS = """
import json, resource, sys, time
import torch
torch.set_num_threads(int(sys.argv[4]))
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from compressed_tensors.quantization import preset_name_to_scheme
from calipers.integrations.llmcompressor import install
data = torch.load(sys.argv[3])
rows = {"input_ids": [ids[0].tolist() for ids in data]}
rows["attention_mask"] = [[1] * len(each) for each in rows["input_ids"]]
options = json.loads(sys.argv[5])
start = time.perf_counter()
with install(replace=True):
    scheme = preset_name_to_scheme("W4A16", ["Linear"])
    scheme.weights.observer = "optimal"
    scheme.weights.observer_kwargs = {"objective": "imatrix"}
    scheme.weights.group_size = options["scheme_options"].get("group_size", 128)
    oneshot(
        model=sys.argv[1], dataset=Dataset.from_dict(rows), output_dir=sys.argv[2],
        recipe=QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=len(rows["input_ids"][0]), num_calibration_samples=len(data),
        pipeline="sequential", precision=options["dtype"], batch_size=1,
        shuffle_calibration_samples=False,
    )
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print("FOUND", json.dumps({"seconds": seconds, "peak_gib": peak}))
"""
GROUPS = Path("/sys/fs/cgroup/memory")


def main(arguments: list[str] | None = None) -> int:
    """Measure both and print the tables."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    tables = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        if options.gib:
            tables["limited"] = Table(LIMITED, [_limited(options, Path(folder))])
        if options.runs:
            tables["ways"] = Table(WAYS, list(_ways(options, Path(folder))))
    result = measured("benchmarks.blocks", arguments, tables, timed=True)
    print("\n\n".join([*(each.markdown() for each in tables.values()), result.source()]))
    if options.json:
        result.write(options.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=6.0, help="size of the checkpoint; 0: none")
    parser.add_argument("--limit-gib", type=float, default=2.5)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--model", type=Path, help="transformers folder of the second table")
    parser.add_argument("--group-size", type=int, default=128, help="of the second table")
    parser.add_argument("--sequences", type=int, default=32, help="of the second table")
    parser.add_argument("--runs", type=int, default=3, help="of the second table; 0: none")
    parser.add_argument("--dtype", default="auto", help="to calibrate in, of every run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", help="folder for checkpoints")
    add_json_option(parser)
    return parser


def _limited(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source, cut = folder / "source", folder / "cut"
    layers = save_checkpoint(source, options.gib, options.hidden)
    size = sum(each.stat().st_size for each in source.glob("*.safetensors"))
    data = _data(folder, SEQUENCES, TOKENS, 1024)
    reading = _reading(source)
    depth = min(CUT, layers)
    _cut(source, cut, depth)
    forward, search = _alone(cut, data, folder / "whole", options.dtype)
    parts = reading + (forward + search) * layers / depth
    with _group(options.limit_gib) as group:
        given = {"memory": "blocks", "dtype": options.dtype}
        found = _run(OURS, source, folder / "out", data, options.threads, given, group)
        peak = found["peak_gib"]
        if group is not None:
            peak = int((group / "memory.max_usage_in_bytes").read_text()) / 2**30
    return {
        "checkpoint": f"{size / 2**30:.2f} GiB, {layers} layers",
        "limit": f"{options.limit_gib:g} GiB" if group is not None else "none",
        "peak_gib": peak,
        "seconds": found["seconds"],
        "parts_s": parts,
        "ratio": found["seconds"] / parts,
        "differ": _differing(folder / "whole", folder / "out"),
    }


class _group:
    """A control group of little memory, as a block; None where none can be made."""

    def __init__(self, gib: float) -> None:
        self._folder: Path | None = GROUPS / f"calipers-{os.getpid()}"
        try:
            self._folder.mkdir()
            (self._folder / "memory.limit_in_bytes").write_text(str(int(gib * 2**30)))
        except OSError:
            self._folder = None

    def __enter__(self) -> Path | None:
        return self._folder

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.rmdir()


def _data(folder: Path, sequences: int, tokens: int, vocabulary: int) -> Path:
    generator = torch.Generator().manual_seed(1)
    data = [
        torch.randint(0, vocabulary, (1, tokens), generator=generator) for _ in range(sequences)
    ]
    torch.save(data, folder / "data.pt")
    return folder / "data.pt"


def _reading(source: Path) -> float:
    start = perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for key in opened.offset_keys():
                opened.get_tensor(key).clone()
    return perf_counter() - start


def _cut(source: Path, cut: Path, layers: int) -> None:
    """The first layers of a checkpoint as one of its own."""
    shutil.copytree(source, cut)
    config = json.loads((cut / "config.json").read_text())
    config["num_hidden_layers"] = layers
    for key in ("layer_types",):
        config.pop(key, None)
    (cut / "config.json").write_text(json.dumps(config))


def _alone(cut: Path, data: Path, out: Path, dtype: str) -> tuple[float, float]:
    """Seconds of bare forward passes through the cut's layers, and of deriving its scales."""
    import calipers
    from calipers.checkpoint.opening import load_model

    model = load_model(cut, device="cpu", dtype=dtype)
    batches = [{"input_ids": ids} for ids in torch.load(data)]
    with torch.no_grad():
        model.model(**batches[0])
        start = perf_counter()
        for batch in batches:
            model.model(**batch)
        forward = perf_counter() - start
    with calipers.attach(
        model, "W4A16", observer="optimal", observer_options={"objective": "imatrix"}
    ) as calibration:
        calibration.run(batches)
        start = perf_counter()
        calibration.freeze()
        search = perf_counter() - start
    calipers.save(model, out)
    return forward, search


def _differing(whole: Path, blocks: Path) -> str:
    """How many tensors of the layers of a whole calibration another one has otherwise."""
    found = [dict(_tensors(each)) for each in (whole, blocks)]
    names = [name for name in found[0] if ".layers." in name]
    differ = [name for name in names if not torch.equal(*(each[name]() for each in found))]
    return f"{len(differ)} of {len(names)} tensors"


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    for file in folder.glob("*.safetensors"):
        opened = safe_open(file, "pt")
        for key in opened.offset_keys():
            yield key, lambda key=key, opened=opened: opened.get_tensor(key)


def _ways(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    source = options.model or folder / "small"
    if options.model is None:
        save_checkpoint(source, 0.6, 1024)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    data = _data(folder, options.sequences, 512, vocabulary)
    scheme = {"scheme_options": {"group_size": options.group_size}, "dtype": options.dtype}
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "calipers, whole": (OURS, {"memory": "whole", **scheme}),
        "calipers, blocks": (OURS, {"memory": "blocks", **scheme}),
        "calipers, blocks, propagate": (OURS, {"memory": "blocks", "propagate": True, **scheme}),
        "llmcompressor, sequential, calipers' observers": (THEIRS, scheme),
    }
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.runs):
        for way, (script, given) in ways.items():
            out = folder / "way"
            shutil.rmtree(out, ignore_errors=True)
            run = _run(script, source, out, data, options.threads, given, None)
            found.setdefault(way, []).append(run)
    whole = statistics.median(run["seconds"] for run in found["calipers, whole"])
    for way, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        peak = max(run["peak_gib"] for run in runs)
        yield {"way": way, "seconds": seconds, "ratio": seconds / whole, "peak_gib": peak}


def _run(
    script: str,
    source: Path,
    out: Path,
    data: Path,
    threads: int,
    given: dict[str, Any],
    group: Path | None,
) -> dict[str, float]:
    """Seconds and peak memory of a way, in a process of its own."""
    command = [sys.executable, "-c", script, source, out, data, str(threads), json.dumps(given)]
    join = None
    if group is not None:
        procs = group / "cgroup.procs"
        join = lambda: procs.write_text(str(os.getpid()))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=join)
    if done.returncode:
        raise RuntimeError(f"a run failed with {done.returncode}:\n{done.stderr[-3000:]}")
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("FOUND ")]
    found: dict[str, float] = json.loads(line.removeprefix("FOUND "))
    return found


if __name__ == "__main__":
    sys.exit(main())
