"""The bad-input matrix: every observer, strategy and format on every row of `matrix_inputs`.

Each cell is run by both engines and held against the float64 recomputation of `matrix_reference`:

- minimum and maximum, also over batches: scale and zero point exactly those of the rule;
- searches: the error of the scale found, by float64 fake-quantization, is at most that of the best
  candidate of a plain float64 search (`TOLERANCE`);
- what must be refused: a ValueError that names the observed value and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from torch import Tensor, nn

from calipers.observers import Observer
from observers import matrix_inputs as inputs
from observers import matrix_reference as reference
from observers.matrix_inputs import Given, Layout

#: What the error of a scale found may exceed that of the reference by, relative.
TOLERANCE = {
    "grid": 1e-4,
    "histogram": 3e-3,
    "bins": 5e-2,
    "optimal": 1e-3,
    "codes": 1e-4,
    "hessian": 1e-4,
}
ENGINES = ("native", "eager")
NAME = "layer.0.proj.weight"


@dataclass(frozen=True)
class Kind:
    """An observer with its options, and the rule that it is held against."""

    observer: str
    rule: str
    options: dict[str, Any]
    needs_data: bool = False

    def __str__(self) -> str:
        objective = self.options.get("objective")
        return self.observer if objective is None else f"{self.observer}-{objective}"


#: The grids are coarse, and without patience, which couples groups: tests/ranges has the others.
GRID = {"maxshrink": 0.2, "grid": 60, "patience": 0, "norm": 2.4, "expand": 1.0}
EXPANDED = {"maxshrink": 1 - 0.8 / 1.8, "grid": 24, "patience": 0, "norm": 2.4, "expand": 1.8}
IMATRIX = {"maxshrink": 0.95, "grid": 12, "patience": 0, "norm": 3.0, "expand": 1.0}
KINDS = [
    Kind("memoryless_minmax", "last", {}),
    Kind("static_minmax", "all", {}),
    # Without headroom the global scale is that of the extremes.
    Kind("nvfp4_headroom", "all", {"low": 0.0, "high": 100.0, "headroom": 1.0}),
    Kind("minmax", "average", {"averaging_constant": 0.25}),
    Kind("memoryless_mse", "grid", GRID),
    Kind("mse", "grid", {**GRID, "averaging_constant": 1.0}),
    Kind("nvfp4_expanded_mse", "grid", EXPANDED),
    Kind("imatrix_mse", "grid", IMATRIX, needs_data=True),
    Kind("nvfp4_expanded_imatrix", "grid", EXPANDED, needs_data=True),
    Kind("histogram", "histogram", {}),
    Kind("optimal", "optimal", {"objective": "mse"}),
    Kind("optimal", "optimal", {"objective": "imatrix"}, needs_data=True),
    Kind("optimal", "hessian", {"objective": "hessian"}, needs_data=True),
]


@dataclass(frozen=True)
class Case:
    """Cells that differ in their input and engine alone."""

    kind: Kind
    layout: Layout
    format: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.layout.name}-{self.format}"

    @property
    def args(self) -> QuantizationArgs:
        return inputs.arguments(self.layout, self.format)

    def rows(self) -> list[tuple[str, Given]]:
        """The inputs that mean something here."""
        extremes = self.kind.rule in ("last", "all", "average")
        rows = inputs.rows_of(self.layout, large=extremes)
        # A moving average of ranges found is not searched: each range has a cell of its own.
        averages = self.kind.observer == "mse"
        return [
            (name, given) for name, given in rows if not (averages and given.before is not None)
        ]


CASES = [
    Case(kind, layout, name)
    for kind in KINDS
    for layout, name in inputs.combinations()
    if layout.is_weight or not (kind.observer == "optimal" and kind.needs_data)
]


def test_there_are_enough_cells() -> None:
    count = len(ENGINES) * sum(len(case.rows()) for case in CASES)
    assert count >= 5000
    assert {case.format for case in CASES} == set(inputs.FORMATS)
    strategies = {str(getattr(case.args.strategy, "value", case.args.strategy)) for case in CASES}
    assert strategies == {each.value for each in QuantizationStrategy}
    assert {name for case in CASES for name, _ in case.rows()} >= set(inputs.INPUTS)
    assert {case.kind.observer for case in CASES} >= {
        name.replace("-", "_")
        for name in Observer.registered_names()
        if Observer.get_value_from_registry(name).__module__.startswith("calipers.")
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run_cells(case, case.rows(), monkeypatch)


#: One combination for each kind, and every ninth input, chosen so that all of them come up.
FEW = [[c for c in CASES if c.kind is kind][i * 5 % 40] for i, kind in enumerate(KINDS)]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_some_of_the_matrix(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    first = FEW.index(case) % 9
    run_cells(case, case.rows()[first::9], monkeypatch)


def run_cells(case: Case, rows: list[tuple[str, Given]], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for engine in ENGINES:
        monkeypatch.setenv("CALIPERS_ENGINE", engine)
        for name, given in rows:
            try:
                problem = check(case, given)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                wrong.append(f"{name} ({engine}): {problem}")
    assert not wrong, "\n".join([f"{len(wrong)} cells of {case}:", *wrong])


# -- one cell -----------------------------------------------------------------------------------


def build(case: Case, given: Given) -> tuple[Observer, nn.Module, Tensor | None]:
    """An observer that has what it needs, its module, and the inputs that the module saw."""
    module = nn.Module()
    observer = Observer.load_from_registry(
        case.kind.observer, case.layout.base_name, case.args, module, **case.kind.options
    )
    observer.name = NAME
    value, seen = given.value if given.counted is None else given.counted, None
    if given.g_idx is not None and case.kind.needs_data:
        module.weight_g_idx = given.g_idx  # by which sums are grouped, too
    if not (case.kind.needs_data and case.layout.is_weight):
        return observer, module, None
    if isinstance(value, Tensor) and value.dim() and value.shape[-1]:
        cols = value.shape[-1]
        seen = torch.randn(40, cols, generator=torch.Generator().manual_seed(cols))
        seen = seen * torch.linspace(0.5, 2, cols) + seen.roll(1, -1)
    return observer, module, seen


def check(case: Case, given: Given) -> str | None:
    """What is wrong with a cell."""
    observer, module, seen = build(case, given)
    if seen is not None:
        try:
            observer.observe_input(seen)
        except ValueError as error:
            wanted = given.refused or ("got one of" if given.g_idx is not None else None)
            named = NAME.removesuffix(".weight") in str(error)
            fits = wanted is not None and re.search(wanted, str(error))
            return None if named and fits else f"inputs refused: {error}"
    held = observer.state()
    needs_global, global_name = case.format == "nvfp4", f"{case.layout.base_name}_global_scale"
    for value in (given.before, given.value):
        if value is None and value is not given.value:
            continue
        empty = isinstance(value, Tensor) and value.numel() == 0
        try:
            if needs_global and not hasattr(module, global_name):
                known = None if given.refused else observer.get_global_scale(value, given.mask)
                module.register_buffer(global_name, torch.ones(1) if known is None else known)
            if empty:
                same = observer(value) == (None, None) and held.keys() == observer.state().keys()
                return None if same else "an empty tensor changed something"
            scale, zero_point = observer(value, given.g_idx, given.mask)
        except ValueError as error:
            if given.refused is None and not may_refuse(case, given):
                return f"refused: {error}"
            named = NAME in str(error)
            if not named or not re.search(given.refused or "", str(error)):
                return f"says {error}"
            after = observer.state()
            kept = all(torch.equal(after[name], value) for name, value in held.items())
            return None if kept else "refused, and yet statistics changed"
    if given.refused is not None:
        return f"not refused: {scale}"
    return judge(case, given, module, seen, scale, zero_point)


def may_refuse(case: Case, given: Given) -> bool:
    """Whether the observer has a reason of its own to refuse."""
    scales = given.value.numel() if isinstance(given.value, Tensor) else 0
    few = case.kind.observer == "optimal" and case.kind.needs_data and given.value.dim() < 2
    return few or (case.kind.rule == "histogram" and scales > 512 * 16)


def judge(
    case: Case,
    given: Given,
    module: nn.Module,
    seen: Tensor | None,
    scale: Tensor,
    zero_point: Tensor,
) -> str | None:
    args = case.args
    counted = (given.value if given.counted is None else given.counted).detach()
    dtype = counted.dtype if counted.dtype in reference.FLOATS else torch.float32
    counted = counted.to(dtype)
    group, shape = reference.groups_of(
        tuple(counted.shape), case.layout.base_name, args, given.g_idx
    )
    if scale.shape != shape or zero_point.shape != shape:
        return f"shape {tuple(scale.shape)} and not {shape}"
    if zero_point.dtype != args.zp_dtype:
        return f"zero point of {zero_point.dtype}"
    if scale.dtype != dtype and case.format != "nvfp4":
        return f"scale of {scale.dtype}"
    scale, zero_point = scale.reshape(-1), zero_point.float().reshape(-1)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        return f"scales are not finite and positive: {scale.float().min()} to {scale.float().max()}"
    global_scale = getattr(module, f"{case.layout.base_name}_global_scale", None)
    if global_scale is not None and not bool((global_scale.isfinite() & (global_scale > 0)).all()):
        return f"global scale {global_scale}"
    weight = importance(seen, counted)

    def gathered(value: Tensor, fill: float) -> Tensor:
        return reference.gather(value, group, len(scale), fill)

    def problem_of(value: Tensor) -> reference.Problem:
        by_group = gathered(value, torch.nan), gathered(weight, 0.0)
        return reference.Problem(*by_group, args, dtype, global_scale)

    problem = problem_of(counted)
    before = None if given.before is None else problem_of(given.before)
    rule: list[Any] = [case, problem, before, scale, zero_point]
    if case.kind.rule == "hessian":
        row, col = (torch.arange(n) for n in (counted[..., 0].numel(), counted.shape[-1]))
        places = torch.meshgrid(row, col, indexing="ij")
        rule.append([*(gathered(each.reshape(counted.shape), torch.nan) for each in places), seen])
    return RULES[case.kind.rule](*rule)


def importance(seen: Tensor | None, value: Tensor) -> Tensor:
    """E[x^2] / mean(E[x^2]) of each column, ones without inputs."""
    if seen is None:
        return torch.ones(value.shape, dtype=torch.float64)
    square = seen.double().square().sum(0)
    return (square / square.mean()).expand(value.shape)


# -- rules --------------------------------------------------------------------------------------


def exactly(case: Case, problem: Any, before: Any, scale: Tensor, zero: Tensor) -> str | None:
    low, high = problem.low, problem.high
    if case.args.strategy == "token":
        before = None  # the range of a token is its own
    if before is not None and case.kind.rule == "all":
        low, high = torch.minimum(low, before.low), torch.maximum(high, before.high)
    if before is not None and case.kind.rule == "average":
        c = case.kind.options["averaging_constant"]
        low, high = (
            (past.float() * (1 - c) + now.float() * c).double()
            for past, now in ((before.low, low), (before.high, high))
        )
    nothing = low > high
    low, high = torch.where(nothing, 0, low), torch.where(nothing, 0, high)
    expected, its_zero = problem.stored(low, high)
    if not torch.equal(scale.double(), expected.double()):
        worst = int((scale.double() / expected.double()).log().abs().argmax())
        return f"scale {float(scale[worst])}, expected {float(expected[worst])}"
    if not torch.equal(zero, its_zero.float()):
        return f"zero point {zero.tolist()}, expected {its_zero.tolist()}"
    return None


def by_grid(case: Case, problem: Any, before: Any, scale: Tensor, zero: Tensor) -> str | None:
    options = case.kind.options
    factors = reference.shrink_factors(options, include_end="imatrix" in case.kind.observer)
    bound, noise = reference.grid_bound(problem, factors, options["norm"], options["expand"])
    return within(problem.error(scale, zero, options["norm"]), bound, noise, TOLERANCE["grid"])


def within(found: Tensor, bound: Tensor, noise: Tensor, tolerance: float | Tensor) -> str | None:
    if bool((found <= bound * (1 + tolerance) + noise).all()):
        return None
    worst = int((found / (bound + noise)).nan_to_num(torch.inf).argmax())
    return f"error {float(found[worst])} in group {worst}, the reference has {float(bound[worst])}"


def by_histogram(case: Case, problem: Any, before: Any, scale: Tensor, zero: Tensor) -> str | None:
    if before is not None and case.args.strategy != "token":
        together = torch.cat([problem.x, before.x], -1)
        problem = replace(problem, x=together, weight=torch.ones_like(together))
    found, noise = problem.error(scale, zero, 2), problem.noise(2)
    # Float32 values are counted in bins, which of 8 bits are wider than codes are apart.
    single = problem.dtype in (torch.float32, torch.float64)
    kind = "bins" if single and case.args.num_bits == 8 else "histogram"
    tolerance: float | Tensor = TOLERANCE[kind]
    if kind == "bins":
        # How values lie in their bins is not known: in a group of few that is a matter of luck.
        few = 1.2 / problem.x.isfinite().sum(-1).clamp(min=1).sqrt()
        tolerance = few.clamp(min=TOLERANCE[kind])
    bound = reference.histogram_bound(problem)
    # Sizes that float32 has no bins for get the extremes.
    largest = torch.maximum(-problem.range[0], problem.range[1])
    counted = (largest >= 2.0**-105) & (largest <= torch.finfo(torch.float32).max)
    plain = problem.error(*problem.stored(*problem.range), 2)
    return within(found, torch.where(counted, bound, plain) if single else bound, noise, tolerance)


def by_optimum(case: Case, problem: Any, before: Any, scale: Tensor, zero: Tensor) -> str | None:
    """The best of all scale codes; of free scales the best candidate, and min/max in any case."""
    found, noise = problem.error(scale, zero, 2), problem.noise(2)
    plain, its_zero = problem.stored(*problem.range)
    worse = within(found, problem.error(plain, its_zero, 2), noise, TOLERANCE["codes"])
    if worse:
        return f"worse than minimum and maximum: {worse}"
    if case.format in ("nvfp4", "mxfp4"):
        return within(found, reference.code_bound(problem, plain), noise, TOLERANCE["codes"])
    bound = reference.optimal_bound(problem)
    if case.args.num_bits <= 4:
        noise = noise + reference.energy(problem) * 2.0**-21  # the error is a difference of sums
    return within(found, bound, noise, TOLERANCE["optimal"])


def by_output(
    case: Case, problem: Any, before: Any, scale: Tensor, zero: Tensor, where: Any
) -> str | None:
    """In no group is the error of the layer's output greater than with minimum and maximum."""
    plain, its_zero = problem.stored(*problem.range)
    # A value halfway between two codes may be rounded either way, in both; of several that are
    # nearly so the quotients in float32 decide.
    ways = ((-(2.0**-21), False), (0, False), (0, True), (2.0**-21, False))
    found, bound = (
        torch.stack(
            [
                reference.output_error(
                    problem, each.double() * (1 + side), its, *where, single=single
                )
                for side, single in ways
            ]
        )
        for each, its in ((scale, zero), (plain, its_zero))
    )
    found, bound = found.amin(0), bound.amax(0)
    noise = reference.energy(problem) * 2.0**-40 * len(where[-1])
    return within(found, bound, noise, TOLERANCE["hessian"])


RULES: dict[str, Callable[..., str | None]] = {
    "last": exactly,
    "all": exactly,
    "average": exactly,
    "grid": by_grid,
    "histogram": by_histogram,
    "optimal": by_optimum,
    "hessian": by_output,
}
