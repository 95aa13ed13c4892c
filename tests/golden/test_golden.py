"""No change of code changes a scale, a zero point or a global scale.

Every case of `golden.cases` is computed and compared with the file that `golden.record` wrote: bit
for bit where torch, compressed-tensors and the CPU's instructions are those it was made with, up to
the rounding of sums elsewhere. Where scales are meant to change, write the file anew as
`golden.record` says, and say in the commit which ones changed, and why.
"""

from __future__ import annotations

import functools

import pytest
import torch

from calipers.observers import Observer
from golden.cases import CASES, ENGINES, OBSERVERS, Case
from golden.record import PATH, Record, compute, difference, few_groups, made_with, native_problem

RUNS = [(engine, case) for case in CASES for engine in case.engines]
#: The native engine is what people run; tests of the engines compare it with the eager one.
MARKS = {"eager": [pytest.mark.slow], "native": []}
AGAIN = "write the file anew as tests/golden/record.py says, if that is meant"
#: Elsewhere: of the results of this process, so many may have a group on another step.
FEW_RESULTS = 0.05

record = functools.cache(Record)
#: Results compared so far, and those with groups on another step.
compared: list[str] = []
off: list[str] = []


@functools.cache
def no_native() -> str | None:
    return native_problem()


@pytest.mark.parametrize(
    ("engine", "case"),
    [pytest.param(e, c, id=f"{e}-{c}", marks=MARKS[e]) for e, c in RUNS],
)
def test_scales_are_as_recorded(engine: str, case: Case) -> None:
    if engine == "native" and no_native() is not None:
        pytest.skip(no_native())
    old = record().results(engine, case.name)
    assert old, f"{engine}: {case}: not in {PATH.name}; {AGAIN}"
    exact = record().made_with == made_with()
    found = difference(old, compute(case, engine), exact=exact, few=few_groups(case))
    compared.append(case.name)
    if found.off:
        off.append(f"{engine}-{case}")
        assert len(off) <= max(5, FEW_RESULTS * len(RUNS)), f"too many on another step: {off}"
    if found.problem is not None:
        pytest.fail(f"{engine}: {case}: {found.problem}", pytrace=False)


def test_the_native_engine_did_not_give_up() -> None:
    """The eager engine would have stood in for it unseen."""
    if no_native() is None:
        assert native_problem() is None


def test_cases_and_file_are_the_same() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for engine in ENGINES:
        here = {case.name for case in CASES if engine in case.engines}
        assert here == record().names(engine), AGAIN
    assert PATH.stat().st_size < 500_000


def test_every_registered_observer_has_cases() -> None:
    labelled = {Observer.get_value_from_registry(name) for name, _ in OBSERVERS.values()}
    for name in Observer.registered_names():
        cls = Observer.get_value_from_registry(name)
        # Tests register observers of their own.
        assert cls in labelled or not cls.__module__.startswith("calipers."), name


class TestDifference:
    """The comparison itself: what it lets pass, and what it tells."""

    OLD = torch.linspace(0.5, 2, 96).reshape(12, 8)

    def test_exact_tells_the_first_value(self) -> None:
        new = self.OLD.clone()
        new[3, 2] = torch.nextafter(new[3, 2], torch.tensor(9.0))
        new[5, 5] *= 2
        told = difference({"scale": self.OLD}, {"scale": new}, exact=True).problem
        assert told is not None
        assert told.startswith("scale[3, 2]: was 0.91")
        assert "(2 of 96 differ)" in told
        assert difference({"scale": new}, {"scale": new.clone()}, exact=True).problem is None

    def test_exact_tells_zeros_apart(self) -> None:
        zero = torch.zeros(1)
        assert difference({"zero": zero}, {"zero": -zero}, exact=True).problem is not None

    @pytest.mark.parametrize("exact", [True, False])
    def test_names_shapes_and_dtypes(self, exact: bool) -> None:
        for new in ({}, {"scale": self.OLD.half()}, {"scale": self.OLD[:3]}):
            assert difference({"scale": self.OLD}, new, exact=exact).problem is not None

    def test_elsewhere_rounding_and_a_few_groups(self) -> None:
        near, few, many = (self.OLD.clone() for _ in range(3))
        near *= 1 + 3e-6
        few[0, 0] *= 1.1
        many[:2] *= 1.01
        for new, passes, count in ((near, True, 0), (few, True, 1), (many, False, 0)):
            found = difference({"scale": self.OLD}, {"scale": new}, exact=False)
            assert (found.problem is None) is passes
            assert found.off == count
        few[0, 0] = 100
        assert difference({"scale": self.OLD}, {"scale": few}, exact=False).problem is not None
        few[0, 0] = torch.nan
        assert difference({"scale": self.OLD}, {"scale": few}, exact=False).problem is not None

    def test_elsewhere_one_step_of_a_coarse_dtype(self) -> None:
        old = self.OLD.bfloat16()
        new = (old.view(torch.int16) + 1).view(torch.bfloat16)
        assert difference({"scale": old}, {"scale": new}, exact=False).problem is None
        new = (old.view(torch.int16) + 3).view(torch.bfloat16)
        assert difference({"scale": old}, {"scale": new}, exact=False).problem is not None
