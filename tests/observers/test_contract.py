"""The contract suite over every registered observer."""

from __future__ import annotations

from types import MappingProxyType as Options
from typing import Any

import pytest
import torch
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
from observers.samples import Case

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


class TestHeadroom(ObserverContract):
    name = "nvfp4_headroom"
    remembers = "all"
    defaults = Options({"low": 1.0, "high": 99.99, "headroom": 16384.0})


class TestOptimal(ObserverContract):
    name = "optimal"
    remembers = "last"
    defaults = Options({"objective": "auto", "negative_scales": False})
    options = Options({"objective": "mse"})
    needs_data = True


class OnSeenInputs(ObserverContract):
    """Objectives that weigh a weight's errors by inputs: every observer has seen some."""

    name = "optimal"
    remembers = "last"
    needs_data = True
    # Their values have other columns than the inputs: tests/observers/test_optimal.py has g_idx.
    test_nonfinite_values_are_left_out = None
    test_permuted_g_idx_brings_columns_together = None
    test_groups_of_unequal_sizes = None
    # Compare with observers that have seen no inputs, or others.
    test_merge_against_one_observer_of_all = None
    test_reset_makes_it_new = None
    # Build observers of their own.
    test_both_forms_build_the_same_observer = None
    test_first_form_takes_strategies_of_activations = None
    test_options_come_from_args_and_keywords_and_args_stay_unchanged = None

    def build(self, case: Case, **given: Any) -> Observer:
        if case.base_name != "weight" or case.value().dim() < 2:
            pytest.skip("weights with input columns only")
        observer = super().build(case, **given)
        cols = case.value().shape[-1]
        generator = torch.Generator().manual_seed(cols)
        inputs = torch.randn(50, cols, generator=generator) * torch.linspace(0.5, 2, cols)
        observer.observe_input((inputs + inputs.roll(1, -1)).to(self.device))
        return observer


class TestOptimalIMatrix(OnSeenInputs):
    options = Options({"objective": "imatrix"})


class TestOptimalIMatrixSigned(OnSeenInputs):
    options = Options({"objective": "imatrix", "negative_scales": True})

    def build(self, case: Case, **given: Any) -> Observer:
        args = given.get("args") or case.args()
        if not (args.symmetric and args.type == "int"):
            pytest.skip("symmetric integers only")
        return super().build(case, **given)


class TestOptimalHessian(OnSeenInputs):
    options = Options({"objective": "hessian"})
    # They are chosen one after the other.
    test_each_group_is_measured_by_itself = None


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
