"""The recorded scales: the file, how it is written anew, and how results are compared with it.

Write it anew where scales are meant to change, and only then; what changed is printed:

    cd tests && PYTHONPATH=../src:. python -m golden.record

The file is a safetensors file with one tensor: the bytes of all results, each different one once.
Its metadata say what it was made with and where each result lies:

    made_with  {"torch": ..., "compressed_tensors": ..., "cpu": ...}
    kinds      [[[tensor, dtype, shape], ...], ...]: the forms of a result
    index      {case: [result by eager, by native]}, a single one where both are the same;
               a result is [place in kinds, first byte of each tensor], null where not run

Where all that `made_with` names is the same, results must be the same bit for bit. Elsewhere sums
round in another order. What docs/numerics.md allows then is written down in `difference`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from calipers.engines.dispatch import explain_engines
from golden.cases import CASES, ENGINES, Case, Results

__all__ = [
    "PATH",
    "Difference",
    "Record",
    "difference",
    "few_groups",
    "made_with",
    "native_problem",
    "searching",
]

PATH = Path(__file__).with_name("scales.safetensors")
#: Elsewhere: scales that count as the same, relatively. One step of a dtype coarser than that as
#: well, to either side.
CLOSE = 1e-5
#: Elsewhere: at most so many of the groups of a result, and one at least, may be on another step.
FEW_GROUPS = 0.02
#: The same for objective "hessian", where groups of a row are searched one after the other: one on
#: another step moves those after it.
FEW_OF_HESSIAN = 0.1
#: Elsewhere: no step is farther from another one than this factor.
STEP = 4.0


def made_with() -> dict[str, str]:
    """What the last bit of a scale may depend on."""
    return {
        "torch": torch.__version__,
        "compressed_tensors": version("compressed-tensors"),
        "cpu": f"{_cpu()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _cpu() -> str:
    """The model, where the system tells: matmuls of two models may sum in other orders."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    told = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(told, platform.machine())


def native_problem() -> str | None:
    """Why the native engine cannot be used, or has been given up; None where it can."""
    reasons = {name: None if usable else why for name, usable, why in explain_engines(trial=True)}
    return reasons["native"]


@contextlib.contextmanager
def searching(engine: str) -> Iterator[None]:
    """An engine for all searches, and one thread: sums are not cut into parts."""
    before, threads = os.environ.get("CALIPERS_ENGINE"), torch.get_num_threads()
    os.environ["CALIPERS_ENGINE"] = engine
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if before is None:
            del os.environ["CALIPERS_ENGINE"]
        else:
            os.environ["CALIPERS_ENGINE"] = before


# -- comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """What is wrong with a result; `off` groups are on another step."""

    problem: str | None
    off: int = 0


def difference(old: Results, new: Results, *, exact: bool, few: float = FEW_GROUPS) -> Difference:
    """How results differ from the recorded ones.

    Args:
        old: The recorded tensors by name.
        new: The tensors of this run.
        exact: Every bit must be the same. Otherwise floats may differ by a relative 1e-5 or by one
            step of their dtype, and zero points by one; besides, one group, or `few` of them, may
            have taken another candidate, whose scale is within a factor of four.
        few: A part of all groups.

    Returns:
        The first problem, with the old and the new value; None for the same.
    """
    if old.keys() != new.keys():
        return Difference(f"was {sorted(old)}, is {sorted(new)}")
    off = 0
    for name, was in old.items():
        value = new[name].detach().cpu().contiguous()
        if (was.dtype, was.shape) != (value.dtype, value.shape):
            return Difference(
                f"{name}: was {was.dtype} {tuple(was.shape)}, is {value.dtype} {tuple(value.shape)}"
            )
        differs = (_bytes(was) != _bytes(value)).any(-1)
        if exact:
            if bool(differs.any()):
                return Difference(_told(name, was, value, differs))
            continue
        far = differs & ~_close(was, value)
        wrong = far & ~_of_another_step(was, value)
        if bool(wrong.any()):
            return Difference(_told(name, was, value, wrong))
        allowed = max(1, int(few * was.numel()))
        if int(far.sum()) > allowed:
            return Difference(f"{_told(name, was, value, far)}; {allowed} may")
        off = max(off, int(far.sum()))
    return Difference(None, off)


def few_groups(case: Case) -> float:
    """The part of a result's groups that may be on another step elsewhere."""
    return FEW_OF_HESSIAN if "hessian" in case.name else FEW_GROUPS


def _bytes(value: Tensor) -> Tensor:
    """Shape (elements, bytes of one), uint8."""
    return value.reshape(-1, 1).view(torch.uint8)


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1).double()


def _close(was: Tensor, value: Tensor) -> Tensor:
    if not was.is_floating_point():
        return (_flat(was) - _flat(value)).abs() <= 1
    # Float8 codes of local scales are candidates: another code is another step.
    step = torch.finfo(was.dtype).eps if was.dtype in (torch.float16, torch.bfloat16) else 0.0
    return (_flat(was) - _flat(value)).abs() <= max(CLOSE, step) * _flat(was).abs()


def _of_another_step(was: Tensor, value: Tensor) -> Tensor:
    if not was.is_floating_point():
        # That of a range that starts at another step: a quarter of the codes of eight bits.
        return (_flat(was) - _flat(value)).abs() <= 64
    ratio = _flat(value) / _flat(was)
    return (ratio.abs() <= STEP) & (ratio.abs() >= 1 / STEP)


def _told(name: str, was: Tensor, value: Tensor, where: Tensor) -> str:
    first = int(where.nonzero()[0])
    place, rest = [], first
    for size in reversed(was.shape):
        rest, at = divmod(rest, size)
        place.insert(0, at)
    old, new = (_flat(each)[first].item() for each in (was, value))
    relative = f", factor {new / old:.9g}" if old else ""
    return (
        f"{name}{place}: was {old!r}, is {new!r}{relative} "
        f"({int(where.sum())} of {was.numel()} differ)"
    )


# -- the file ----------------------------------------------------------------------------------


class Record:
    """Results by engine and case, as read from the file."""

    def __init__(self, path: Path = PATH) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            self._values = file.get_tensor("values")
        self.made_with: dict[str, str] = json.loads(metadata["made_with"])
        self._kinds: list[list[list[Any]]] = json.loads(metadata["kinds"])
        self._index: dict[str, list[list[int] | None]] = json.loads(metadata["index"])

    def names(self, engine: str) -> set[str]:
        return {name for name in self._index if self._place(engine, name)}

    def results(self, engine: str, name: str) -> Results:
        place = self._place(engine, name)
        if place is None:
            return {}
        kind, *starts = place
        tensors = zip(self._kinds[kind], starts, strict=True)
        return {key: self._tensor(dtype, shape, start) for (key, dtype, shape), start in tensors}

    def _place(self, engine: str, name: str) -> list[int] | None:
        places = self._index.get(name, [None])
        return places[ENGINES.index(engine) if len(places) > 1 else 0]

    def _tensor(self, dtype_name: str, shape: list[int], start: int) -> Tensor:
        dtype: torch.dtype = getattr(torch, dtype_name)
        size = prod(shape) * dtype.itemsize
        return self._values[start : start + size].clone().view(dtype).reshape(shape)


def write(results: dict[str, dict[str, Results]], path: Path = PATH) -> None:
    """Write results by engine and case."""
    places: dict[bytes, int] = {}
    parts: list[Tensor] = []
    end = 0
    kinds: list[Any] = []
    index: dict[str, list[list[int] | None]] = {}
    names = dict.fromkeys(name for cases in results.values() for name in cases)
    for name in names:
        index[name] = []
        for engine in ENGINES:
            tensors = results[engine].get(name)
            if tensors is None:
                index[name].append(None)
                continue
            kind, starts = [], []
            for key, value in tensors.items():
                flat = _bytes(value.detach().cpu().contiguous()).reshape(-1)
                content = flat.numpy().tobytes()
                if content not in places:
                    places[content] = end
                    # A tensor starts at a multiple of the size of its elements.
                    parts.append(torch.nn.functional.pad(flat, (0, -len(content) % 8)))
                    end += parts[-1].numel()
                kind.append([key, str(value.dtype).removeprefix("torch."), list(value.shape)])
                starts.append(places[content])
            if kind not in kinds:
                kinds.append(kind)
            index[name].append([kinds.index(kind), *starts])
        if index[name][0] == index[name][1]:
            del index[name][1]
    metadata = {"made_with": json.dumps(made_with())}
    for key, table in (("kinds", kinds), ("index", index)):
        metadata[key] = json.dumps(table, separators=(",", ":"))
    save_file({"values": torch.cat(parts)}, path, metadata)
    path.chmod(0o644)


def compute(case: Case, engine: str) -> Results:
    """The results of a case, on the CPU."""
    with searching(engine):
        return {key: value.detach().cpu() for key, value in case.run().items()}


def main() -> None:
    """Compute all cases and write the file; print what is other than before."""
    problem = native_problem()
    if problem is not None:
        sys.exit(f"both engines are recorded, and {problem}")
    results = {
        engine: {case.name: compute(case, engine) for case in CASES if engine in case.engines}
        for engine in ENGINES
    }
    problem = native_problem()
    if problem is not None:
        sys.exit(problem)
    if PATH.exists():
        old = Record()
        for engine, cases in results.items():
            for name in sorted(old.names(engine) - cases.keys()):
                print(f"{engine}: {name}: gone")  # noqa: T201
            for name, new in cases.items():
                if name not in old.names(engine):
                    print(f"{engine}: {name}: new")  # noqa: T201
                    continue
                told = difference(old.results(engine, name), new, exact=True).problem
                if told is not None:
                    print(f"{engine}: {name}: {told}")  # noqa: T201
    write(results)
    total = sum(len(cases) for cases in results.values())
    print(f"{PATH.name}: {total} results, {PATH.stat().st_size} bytes")  # noqa: T201


if __name__ == "__main__":
    main()
