"""Time the range search and the min/max of calipers against llmcompressor and one plain read.

`make bench` runs everything at full size; by hand, in an environment with the `bench` extra:

    python -m benchmarks.range_search --cases "int4 g128" --json out.json
    python -m benchmarks.range_search --cold
    python -m benchmarks.range_search --device cuda

What is timed: theirs `update_statistics_from_observed(flatten_for_calibration(weight))`, ours
`observer.observe(weight)`, or, for min/max, `torch.aminmax(weight)` against
`calipers.ranges.min_max`. Min/max at 64 x 64 derives the qparams as well: there the cost of a
whole call counts. Every answer is checked before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch import Tensor

from benchmarks.cases import Case, all_cases, gpu_cases
from benchmarks.memory import peak_allocated, peak_on_gpu, peak_resident
from benchmarks.peers import (
    Answer,
    canonical,
    canonical_importance,
    chosen_engine,
    error_of,
    our_min_max,
    our_observer,
    peer_observer,
    steps_of,
)
from benchmarks.results import ROOT, Table, add_json_option, measured, peer_is_here
from benchmarks.timing import Call, Timing, alternate

ENGINES = ("eager", "native", "triton")
#: MiB beyond input and qparams.
MEMORY_LIMIT = 64
#: Seconds of the first search of a process, by state of the compile cache.
COLD_LIMITS = {"empty": 20.0, "warm": 4.0}
#: Groups in which both must have chosen the same step, unless the others are ties.
SAME_STEP, TIE = 0.9999, 1e-6

Json = dict[str, Any]


# -- a case ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How an answer compares with another one."""

    against: str
    groups: int
    differ: int
    #: Where the answers differ: how far apart their errors are, as a part of theirs, at worst.
    worst_gap: float | None
    agreed: bool
    #: Whether the case counts as wrong where this does not agree.
    required: bool = True


@dataclass(frozen=True)
class Setting:
    """The input of a case."""

    case: Case
    args: QuantizationArgs
    weight: Tensor
    importance: Tensor | None

    @classmethod
    def of(cls, case: Case, size: int, device: str = "cpu") -> Setting:
        size = case.size or size
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(size, size, generator=generator).mul_(0.02).to(case.dtype)
        importance = None
        if case.observer == "imatrix_mse":
            # Inputs of a language model: a few columns carry most of the energy.
            importance = torch.randn(size, generator=generator).mul_(2).exp_()
        if importance is not None:
            importance = importance.to(device)
        return cls(case, case.quantization_args(size), weight.to(device), importance)

    def ours(self, weight: Tensor | None = None) -> Answer:
        weight = self.weight if weight is None else weight
        if self.case.pure:
            return our_min_max(self.args, weight)
        return our_observer(
            self.case.observer,
            self.args,
            self.case.options,
            weight,
            self.importance,
            whole_call=self.case.whole_call,
            global_scale=self.case.global_scale,
        )

    def peer(self) -> Answer:
        return peer_observer(
            self.case.observer,
            self.args,
            self.case.options,
            self.weight,
            self.importance,
            whole_call=self.case.whole_call,
        )

    def read(self) -> Answer:
        last: list[tuple[Tensor, Tensor]] = []

        def run() -> None:
            low, high = torch.aminmax(self.weight)
            last[:] = [(low, high)]

        return Answer(run, lambda: last[0], last.clear)


def run_case(
    case: Case,
    size: int,
    *,
    engine: str | None,
    pairs: int | None,
    with_peer: bool,
    device: str = "cpu",
) -> Json:
    """Check, time and measure the memory of a case; everything that the JSON says of it."""
    setting = Setting.of(case, size, device)
    on_gpu = device != "cpu"
    engine = case.engine or engine
    with chosen_engine(engine):
        ours = setting.ours()
        theirs = setting.read() if case.against_read else setting.peer() if with_peer else None
        checks = (
            check_search(setting, ours, theirs)
            if case.is_search
            else [check_extremes(setting, ours)]
        )
        call, other = ours.call, None if theirs is None else theirs.call
        read_ms = None
        if on_gpu:
            call, other = waited_for(call), None if other is None else waited_for(other)
            read_ms = alternate(waited_for(setting.read().call), None, pairs).ours_ms
        timing = alternate(call, other, pairs)
        ours.call.prepare()
        allocated = (peak_on_gpu if on_gpu else peak_allocated)(ours.call.run)
        ours.call.prepare()
        resident = None if on_gpu else peak_resident(ours.call.run)
    speedup = timing.speedup
    return {
        "case": case.name,
        "observer": case.observer,
        "options": case.options,
        "args": setting.args.model_dump(
            mode="json",
            include={"num_bits", "type", "strategy", "group_size", "block_structure"},
        ),
        "dtype": str(case.dtype).removeprefix("torch."),
        "shape": list(setting.weight.shape),
        "engine": engine or os.environ.get("CALIPERS_ENGINE") or "chosen by calipers",
        "theirs": None if theirs is None else "aminmax" if case.against_read else "llmcompressor",
        **asdict(timing),
        # Of one `torch.aminmax` of the tensor; on a GPU only.
        "read_ms": read_ms,
        "theirs_over_ours": speedup,
        "ours_over_theirs": None if speedup is None else 1 / speedup,
        "at_least": case.at_least,
        "at_most": case.at_most,
        "met": is_met(case, timing),
        "checks": [asdict(check) for check in checks],
        "correct": all(check.agreed for check in checks if check.required),
        "memory_allocated_mib": allocated,
        "memory_resident_mib": resident,
        "memory_met": max(allocated, resident or 0) <= MEMORY_LIMIT,
    }


def waited_for(call: Call) -> Call:
    """The same call, at the end of which the GPU has done what it was told."""

    def run() -> None:
        call.run()
        torch.cuda.synchronize()

    return Call(run, call.prepare)


def is_met(case: Case, timing: Timing) -> bool | None:
    """Whether the required ratio is reached; None where there is nothing to compare with."""
    speedup = timing.speedup
    if speedup is None or (case.at_least is None and case.at_most is None):
        return None
    if case.at_least is not None:
        return speedup >= case.at_least
    return case.at_most is not None and 1 / speedup <= case.at_most


def check_search(setting: Setting, ours: Answer, theirs: Answer | None) -> list[Check]:
    """Ours against the peer, which counts for float32 values, and else against the eager engine.

    The peer sums errors in the dtype of the values, so that in bfloat16 its steps are not a
    measure; the eager engine on the same values in float32 is. So it is where ours rounds local
    scales, which the peer does not: in the dtype of the values, and so not in float32.
    """
    found = ours.range()
    comparable = setting.case.dtype == torch.float32 and not setting.case.global_scale
    checks = []
    if theirs is not None:
        checks.append(compare(setting, found, theirs.range(), "llmcompressor", comparable))
    if theirs is None or not comparable:
        dtype = setting.weight.dtype if setting.case.global_scale else torch.float32
        with chosen_engine("eager"):
            reference = setting.ours(setting.weight.to(dtype)).range()
        against = f"eager engine on {str(dtype).removeprefix('torch.')}"
        checks.append(compare(setting, found, reference, against, True))
    return checks


def compare(
    setting: Setting,
    found: tuple[Tensor, Tensor],
    other: tuple[Tensor, Tensor],
    against: str,
    required: bool,
) -> Check:
    """Steps of the grid by group; where they differ, the errors they lead to."""
    values = canonical(setting.weight, setting.args)
    whole = values.amin(-1), values.amax(-1)
    options = {"grid": 20.0, "norm": 3.0} if setting.importance is not None else {}
    options = {"grid": 100.0, "norm": 2.4, **options, **setting.case.options}
    grid, norm = options["grid"], options["norm"]
    where = (steps_of(found, whole, grid) != steps_of(other, whole, grid)).nonzero().flatten()
    gap = None
    if where.numel():
        weights = None
        if setting.importance is not None:
            weights = canonical_importance(setting.importance, setting.weight, setting.args)[where]
        mine, theirs = (
            error_of((low[where], high[where]), values[where], weights, setting.args, norm)
            for low, high in (found, other)
        )
        gap = float((mine / theirs - 1).abs().max())
    groups = values.shape[0]
    agreed = where.numel() <= (1 - SAME_STEP) * groups or (gap is not None and gap <= TIE)
    return Check(against, groups, where.numel(), gap, agreed, required)


def check_extremes(setting: Setting, ours: Answer) -> Check:
    """Min/max bit for bit."""
    values = canonical(setting.weight, setting.args)
    low, high = ours.range()
    wrong = (low != values.amin(-1)) | (high != values.amax(-1))
    differ = int(wrong.sum())
    return Check("torch.amin and amax", values.shape[0], differ, None, differ == 0)


# -- cold start -----------------------------------------------------------------------------------


def run_cold(case: Case, size: int, engine: str | None, threads: int) -> Json:
    """First search of a fresh process with an empty compile cache, then with the cache it left."""
    result: Json = {"case": case.name, "engine": engine or "chosen by calipers"}
    with tempfile.TemporaryDirectory(prefix="calipers-cold-") as folder:
        environment = {
            **os.environ,
            "CALIPERS_CACHE": f"{folder}/native",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        script = [sys.executable, "-m", "benchmarks.range_search", "--first-search"]
        options = ["--cases", f"^{re.escape(case.name)}$", "--size", str(size)]
        options += ["--threads", str(threads)] + (["--engine", engine] if engine else [])
        for cache in COLD_LIMITS:
            start = perf_counter()
            child = subprocess.run(
                [*script, *options],
                cwd=ROOT,
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            first = json.loads(child.stdout.splitlines()[-1])
            result[cache] = {
                **first,
                "process_s": perf_counter() - start,
                "at_most_s": COLD_LIMITS[cache],
                "met": first["first_s"] <= COLD_LIMITS[cache],
            }
    return result


def first_search(case: Case, size: int, engine: str | None) -> Json:
    """In the child: seconds of the first and of the second search, imports not counted."""
    setting = Setting.of(case, size)
    with chosen_engine(case.engine or engine):
        ours = setting.ours()
        return {
            "first_s": ours.call.seconds(),
            "second_s": ours.call.seconds(),
        }


# -- output ---------------------------------------------------------------------------------------


HEADER = ("case", "theirs ms", "ours ms", "ratio", "required", "met", "differ", "memory MiB")
WIDTHS = (44, 10, 9, 8, 9, 5, 14, 11)


def table_line(cells: Sequence[str]) -> str:
    first, *rest = (cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return "  ".join([first.strip().ljust(WIDTHS[0]), *rest])


def as_cells(result: Json) -> tuple[str, ...]:
    """A line of the table; the ratio is theirs/ours where that must be large, else ours/theirs."""
    slower = result["theirs"] == "aminmax" or result["at_most"] is not None
    ratio = result["ours_over_theirs" if slower else "theirs_over_ours"]
    bound = result["at_most"] if slower else result["at_least"]
    check = next(check for check in result["checks"] if check["required"])
    resident = result["memory_resident_mib"]
    memory = f"{result['memory_allocated_mib']:.1f}"
    if resident is not None:
        memory += f"/{resident:.0f}"
    return (
        result["case"],
        "-" if result["theirs_ms"] is None else f"{result['theirs_ms']:.3f}",
        f"{result['ours_ms']:.3f}",
        "-" if ratio is None else f"{ratio:.2f}x",
        "-" if bound is None else f"{'<=' if slower else '>='} {bound:g}x",
        "WRONG" if not result["correct"] else {True: "yes", False: "no", None: "-"}[result["met"]],
        f"{check['differ']}/{check['groups']}",
        memory if result["memory_met"] else f"{memory} !",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", default="", metavar="PATTERN", help="regular expression")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--repeats", type=int, metavar="N", help="pairs of samples for each case")
    parser.add_argument("--engine", choices=ENGINES, help="as CALIPERS_ENGINE; default: its choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_json_option(parser)
    parser.add_argument("--no-peer", action="store_true", help="do not look for llmcompressor")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="time the first search of a process instead (the first case unless --cases is given)",
    )
    parser.add_argument("--first-search", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if on_gpu and options.cold:
        parser.error("--cold is measured on the CPU only")
    cases = gpu_cases() if on_gpu else all_cases()
    options.selected = [c for c in cases if re.search(options.cases, c.name)]
    if not options.selected:
        parser.error(f"no case matches {options.cases!r}; --list prints them")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chosen cases; 1 where an answer is wrong, whatever the times are."""
    options = parse(argv)
    if options.list:
        print("\n".join(case.name for case in options.selected))
        return 0
    torch.set_num_threads(options.threads)
    if options.first_search:
        print(json.dumps(first_search(options.selected[0], options.size, options.engine)))
        return 0
    on_gpu = options.device == "cuda"
    found = measure_cold(options) if options.cold else measure_warm(options)
    result = measured(
        "benchmarks.range_search",
        argv,
        cold_tables(found) if options.cold else warm_tables(found, on_gpu),
        timed=True,
        gpu=on_gpu,
    )
    print(f"\n{result.source()}")
    if options.json is not None:
        result.write(options.json)
    return 0 if options.cold or all(row["correct"] for row in found) else 1


def measure_warm(options: argparse.Namespace) -> list[Json]:
    """Of each case what `run_case` says."""
    with_peer = not options.no_peer and peer_is_here()
    if not with_peer:
        print("llmcompressor is left out or not installed: ours is timed alone\n")
    print(table_line(HEADER))
    found = []
    for case in options.selected:
        result = run_case(
            case,
            options.size,
            engine=options.engine,
            pairs=options.repeats,
            with_peer=with_peer,
            device=options.device,
        )
        found.append(result)
        print(table_line(as_cells(result)), flush=True)
        if result["read_ms"] is not None:
            reads = result["ours_ms"] / result["read_ms"]
            print(f"  one read: {result['read_ms']:.3f} ms; ours: {reads:.2f} times that")
    bounded = [result for result in found if result["met"] is not None]
    print(
        f"\n{sum(r['met'] for r in bounded)} of {len(bounded)} required ratios reached"
        "\nratio: theirs/ours where it must be at least (>=), ours/theirs where at most (<=);"
        " theirs for minmax: one torch.aminmax, but llmcompressor at 64x64"
        "\ndiffer: groups with another step than the peer's (bfloat16, a global scale, or no peer:"
        " than those of the eager engine); minmax: not equal bit for bit"
        f"\nmemory: peak beyond input and results, at most {MEMORY_LIMIT}:"
        " torch's allocator / resident memory of the process; ! where above"
    )
    return found


def warm_tables(found: list[Json], on_gpu: bool) -> dict[str, Table]:
    """Searches, min/max against one read, and calls on small values."""
    for row in found:
        check = next(check for check in row["checks"] if check["required"])
        row["other"] = [check["differ"], check["groups"]]
    minmax = [row for row in found if row["theirs"] == "aminmax"]
    rest = [row for row in found if row["theirs"] != "aminmax"]
    reads = [["one read, ms", "read_ms", "{:.3f}"]] if on_gpu else []
    both = [["calipers ms", "ours_ms", "{:.3g}"], *reads]
    memory = ["memory, MiB", "memory_allocated_mib", "{:.0f}"]
    return {
        "search": Table(
            [
                ["range search", "case", "{}"],
                ["llmcompressor ms", "theirs_ms", "{:,.0f}"],
                *both,
                ["ratio", "theirs_over_ours", "{:.1f}"],
                ["wanted", "at_least", "{:g}"],
                ["other step", "other", "{:,} of {:,}"],
                memory,
            ],
            [row for row in rest if row["at_most"] is None],
        ),
        "minmax": Table(
            [
                ["min/max", "case", "{}"],
                ["one read, ms", "theirs_ms", "{:.3g}"],
                ["calipers ms", "ours_ms", "{:.3g}"],
                ["ratio", "ours_over_theirs", "{:.2f}"],
                ["wanted", "at_most", "{:g}"],
            ],
            minmax,
        ),
        "small": Table(
            [
                ["whole call", "case", "{}"],
                ["llmcompressor ms", "theirs_ms", "{:.3f}"],
                ["calipers ms", "ours_ms", "{:.3f}"],
                ["ratio", "ours_over_theirs", "{:.2f}"],
                ["wanted", "at_most", "{:g}"],
            ],
            [row for row in rest if row["at_most"] is not None],
        ),
    }


def cold_tables(found: list[Json]) -> dict[str, Table]:
    """Seconds of the first searches of a process."""
    rows = [
        {"case": each["case"], "engine": each["engine"], "cache": cache, **each[cache]}
        for each in found
        for cache in COLD_LIMITS
    ]
    columns = [
        ["library", "cache", "{}"],
        ["case", "case", "{}"],
        ["first search, s", "first_s", "{:.2f}"],
        ["wanted", "at_most_s", "{:g}"],
        ["second, s", "second_s", "{:.2f}"],
        ["whole process, s", "process_s", "{:.1f}"],
    ]
    return {"cold": Table(columns, rows)}


def measure_cold(options: argparse.Namespace) -> list[Json]:
    """Of each case what `run_cold` says."""
    found = []
    selected = options.selected if options.cases else options.selected[:1]
    for case in selected:
        result = run_cold(case, options.size, options.engine, options.threads)
        found.append(result)
        for cache in COLD_LIMITS:
            run = result[cache]
            print(
                f"{case.name}, {cache} cache: first search {run['first_s']:.2f} s (at most "
                f"{run['at_most_s']:g}: {'yes' if run['met'] else 'no'}), second "
                f"{run['second_s']:.3f} s, whole process {run['process_s']:.1f} s",
                flush=True,
            )
    return found


if __name__ == "__main__":
    raise SystemExit(main())
