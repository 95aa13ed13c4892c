"""The contract suite over every registered observer."""

from __future__ import annotations

from types import MappingProxyType as Options

import pytest
from compressed_tensors.registry import standardize_lookup_name

from calipers.observers import (
    IMatrixMSEObserver,
    MemorylessMinMaxObserver,
    MemorylessMSEObserver,
    MinMaxObserver,
    MovingAverageMSEObserver,
    MovingAverageObserverBase,
    NVFP4ExpandedMSEObserver,
    Observer,
    StaticMinMaxObserver,
)
from observers.contract_suite import ObserverContract

MSE = {"maxshrink": 0.20, "patience": 5, "grid": 100, "norm": 2.4, "expand": 1.0}
IMATRIX = {**MSE, "maxshrink": 0.95, "grid": 20, "norm": 3.0, "strict": False}
EXPANDED = {"expand": 1.8, "maxshrink": 1 - 0.8 / 1.8, "grid": 200, "patience": 1000}
#: Which step wins is tested in tests/ranges; a few are enough for all the rest.
FEW_STEPS = Options({"grid": 20})


class TestMemorylessMinMax(ObserverContract):
    name = "memoryless_minmax"
    remembers = "last"
    defaults = Options({})


class TestStaticMinMax(ObserverContract):
    name = "static_minmax"
    remembers = "all"
    defaults = Options({})


class TestMinMax(ObserverContract):
    name = "minmax"
    remembers = "average"
    defaults = Options({"averaging_constant": 0.01})


class TestMemorylessMSE(ObserverContract):
    name = "memoryless_mse"
    remembers = "last"
    defaults = Options(MSE)
    options = FEW_STEPS


class TestMSE(ObserverContract):
    name = "mse"
    remembers = "average"
    defaults = Options({**MSE, "averaging_constant": 0.01})
    options = FEW_STEPS


class TestNVFP4ExpandedMSE(ObserverContract):
    name = "nvfp4_expanded_mse"
    remembers = "last"
    defaults = Options({**MSE, **EXPANDED})
    options = Options({"grid": 12})


class TestIMatrixMSE(ObserverContract):
    name = "imatrix_mse"
    remembers = "last"
    defaults = Options(IMATRIX)
    options = Options({"grid": 6})
    needs_data = True


class TestNVFP4ExpandedIMatrix(ObserverContract):
    name = "nvfp4_expanded_imatrix"
    remembers = "last"
    defaults = Options({**IMATRIX, **EXPANDED, "norm": 2.4})
    options = Options({"grid": 12})
    needs_data = True


class TestHistogram(ObserverContract):
    name = "histogram"
    remembers = "all"
    defaults = Options({"method": "mse", "percentile": 99.99})


class TestOptimal(ObserverContract):
    name = "optimal"
    remembers = "last"
    defaults = Options({"objective": "imatrix", "signed": False})
    options = Options({"objective": "mse"})
    needs_data = True


def names_under_test() -> dict[str, type[ObserverContract]]:
    found = [c for c in globals().values() if isinstance(c, type)]
    return {c.name: c for c in found if issubclass(c, ObserverContract) and hasattr(c, "name")}


def test_every_registered_observer_is_tested() -> None:
    registered = {
        standardize_lookup_name(name)
        for name in Observer.registered_names()
        # Tests register observers of their own.
        if Observer.get_value_from_registry(name).__module__.startswith("calipers.")
    }
    assert registered == {standardize_lookup_name(name) for name in names_under_test()}


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("memoryless_minmax", MemorylessMinMaxObserver),
        ("static_minmax", StaticMinMaxObserver),
        ("minmax", MinMaxObserver),
        ("memoryless_mse", MemorylessMSEObserver),
        ("mse", MovingAverageMSEObserver),
        ("nvfp4_expanded_mse", NVFP4ExpandedMSEObserver),
        ("fouroversix", NVFP4ExpandedMSEObserver),
        ("imatrix_mse", IMatrixMSEObserver),
    ],
)
def test_names_of_the_field(name: str, cls: type[Observer]) -> None:
    assert Observer.get_value_from_registry(name) is cls


def test_moving_averages_share_their_base() -> None:
    for name, cls in names_under_test().items():
        observer = Observer.get_value_from_registry(name)
        assert issubclass(observer, MovingAverageObserverBase) is (cls.remembers == "average")
