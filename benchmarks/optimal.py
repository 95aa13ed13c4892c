"""How long `optimal` takes beside what it is compared with, all in turn in one process.

    python -m benchmarks.optimal --json out.json

In an environment with the `bench` extra: llmcompressor's observers are timed where it is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from torch import Tensor

from benchmarks.peers import peer_observer
from benchmarks.results import Table, add_json_option, measured, peer_is_here
from benchmarks.timing import Call, alternate
from calipers.observers import Observer

Json = dict[str, Any]
TOKENS = 2048
COLUMNS = (
    ("format", "case", "{}"),
    ("ours", "ours", "{}"),
    ("compared with", "theirs", "{}"),
    ("ours, ms", "ours_ms", "{:.0f}"),
    ("theirs, ms", "theirs_ms", "{:.0f}"),
    ("theirs / ours", "ratio", "{:.3g}"),
    ("wanted", "wanted", "{:.3g}"),
)


@dataclass(frozen=True)
class Case:
    """Two observers on one weight; `theirs` is ours too unless `peer`."""

    name: str
    args: QuantizationArgs
    rows: int
    ours: str
    theirs: str
    #: Least ratio theirs / ours that is wanted, below 1 where ours may be slower; None for any.
    wanted: float | None
    our_options: Json = field(default_factory=dict)
    their_options: Json = field(default_factory=dict)
    peer: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def title(self) -> str:
        """As the table names it."""
        dtype = str(self.dtype).removeprefix("torch.")
        more = "" if dtype == "float32" else f", {dtype}"
        return f"{self.name}{more}, {self.rows} rows"


def cases(cols: int) -> list[Case]:
    """What is compared, and the ratios of times that are wanted."""
    int4 = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
    channel = QuantizationArgs(num_bits=4, strategy="channel")
    nvfp4 = preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
    hessian, imatrix = {"objective": "hessian"}, {"objective": "imatrix"}
    expanded = "nvfp4_expanded_imatrix"
    with_peers = [
        Case("int4 g128", int4, cols, "optimal", "imatrix_mse", 25, imatrix, peer=True),
        Case("NVFP4", nvfp4, cols // 8, "optimal", expanded, 100, imatrix, peer=True),
    ]
    return [
        *with_peers,
        *(replace(case, dtype=torch.bfloat16) for case in with_peers),
        Case("int4 g128", int4, cols, "optimal", "memoryless_mse", 1 / 3, imatrix, {"norm": 2.0}),
        Case("int4 g128", int4, cols, "optimal", "optimal", 1 / 4, hessian, imatrix),
        Case("int4 channel", channel, cols, "optimal", "optimal", None, hessian, imatrix),
    ]


def our_call(name: str, args: QuantizationArgs, options: Json, weight: Tensor, x: Tensor) -> Call:
    """Observing the weight, the inputs seen already."""
    observer = Observer.load_from_registry(name, "weight", args, **options)
    if observer.needs_data:
        observer.observe_input(x)
    return Call(lambda: observer.observe(weight))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_json_option(parser)
    parser.add_argument("--size", type=int, default=4096, help="columns, and rows of most cases")
    parser.add_argument("--pairs", type=int, help="pairs of samples; default: by time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, options.size, generator=generator)
    x = x * torch.randn(options.size, generator=generator).exp() + 0.3
    rows = []
    for case in cases(options.size):
        if case.peer and not peer_is_here():
            continue
        weight = torch.randn(case.rows, options.size, generator=generator) * 0.02
        weight = weight.to(case.dtype)
        ours = our_call(case.ours, case.args, case.our_options, weight, x)
        if case.peer:
            energy = x.square().mean(0)
            theirs = peer_observer(case.theirs, case.args, case.their_options, weight, energy).call
        else:
            theirs = our_call(case.theirs, case.args, case.their_options, weight, x)
        timing = alternate(ours, theirs, options.pairs)
        labels = [
            " ".join(["llmcompressor" * peer, name, *map(str, given.values())]).strip()
            for name, given, peer in (
                (case.ours, case.our_options, False),
                (case.theirs, case.their_options, case.peer),
            )
        ]
        rows.append(
            {
                "case": case.title,
                "ours": labels[0],
                "theirs": labels[1],
                **asdict(timing),
                "ratio": timing.speedup,
                "wanted": case.wanted,
            }
        )
        print(" | ".join(Table(COLUMNS, rows[-1:]).cells()[0]), flush=True)
    table = Table(COLUMNS, rows)
    result = measured("benchmarks.optimal", arguments, {"optimal": table}, timed=True)
    print(f"\n{table.markdown()}\n\n{result.source()}")
    if options.json:
        result.write(options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
