"""Contract: construction in both forms, options, identity, copies."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from compressed_tensors import InternalModule
from torch import nn

from calipers.observers import Observer
from observers.rig import ObserverRig
from observers.samples import BY_NAME, CASES, Case, assert_same, differs, logged

GROUP = BY_NAME["group"]
INPUT = BY_NAME["tensor-input"]

#: For each option of the contract, values that must be refused.
BAD_VALUES: dict[str, list[Any]] = {
    "averaging_constant": [0, -0.5, 1.5, float("nan"), "much", None],
    "maxshrink": [-0.1, 1.5, float("nan"), "much", None],
    "patience": [-1, 2.5, "much", None],
    "grid": [0, -5, float("inf"), "fine", None],
    "norm": [0, -1, float("nan"), "l2", None],
    "expand": [0, -1, float("inf"), "much", None],
    "strict": [2, "perhaps", None],
    "method": ["l2", 3, None],
    "percentile": [0, -1, 100.5, float("nan"), "most", None],
}


class ConstructionPart(ObserverRig):
    def test_is_a_module_that_no_quantization_target_matches(self) -> None:
        assert isinstance(self.build(GROUP), InternalModule)

    def test_both_forms_build_the_same_observer(self) -> None:
        case = BY_NAME["group-ragged"]
        args = case.args(observer_kwargs=dict(self.options))
        built = [
            self.cls(args),
            self.cls(quantization_args=args),
            self.cls("weight", args),
            self.cls(base_name="weight", args=args, module=None),
            Observer.load_from_registry(self.name, args),
            Observer.load_from_registry(self.name, quantization_args=args),
            Observer.load_from_registry(self.name, "weight", args, self.module(case)),
        ]
        results = [observer(self.value(case)) for observer in built]
        for observer, result in zip(built, results, strict=True):
            assert type(observer) is self.cls
            assert observer.base_name == "weight"
            assert observer.args is observer.quantization_args
            assert_same(result, results[0])

    @pytest.mark.parametrize("base_name", ["weight", "input", "output", "q", "k", "v"])
    def test_second_form_keeps_the_base_name(self, base_name: str) -> None:
        case = Case("any", (4, 3, 8), (1,), base_name, {"strategy": "tensor"})
        observer = self.build(case)
        assert observer.base_name == base_name
        assert observer(self.value(case))[0].shape == (1,)

    @pytest.mark.parametrize("case", [BY_NAME["token"], BY_NAME["attn_head"]], ids=str)
    def test_first_form_takes_strategies_of_activations(self, case: Case) -> None:
        observer = self.cls(case.args(observer_kwargs=dict(self.options)))
        assert observer(self.value(case))[0].shape == case.qparams

    def test_construction_without_arguments_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="QuantizationArgs"):
            self.cls("weight")
        with pytest.raises(ValueError, match="QuantizationArgs"):
            self.cls("weight", {"num_bits": 4})

    # -- options -----------------------------------------------------------------------------

    def test_default_options(self) -> None:
        if self.defaults is None:
            pytest.skip("no defaults to check")
        options = self.cls("weight", GROUP.args()).options.model_dump()
        assert options == pytest.approx(dict(self.defaults))

    def test_options_come_from_args_and_keywords_and_args_stay_unchanged(self) -> None:
        given = dict(self.options)
        args = GROUP.args(observer_kwargs=given)
        before = args.model_copy(deep=True)
        fields = self.cls.Options.model_fields
        name, default = next(((n, f.default) for n, f in fields.items()), (None, None))
        if name is None:
            observer = self.cls("weight", args)
        else:
            changed = type(default)(1) if default != 1 else type(default)(0)
            observer = self.cls("weight", args, **{name: changed})
            assert getattr(observer.options, name) == changed
            assert observer.args.observer_kwargs[name] == changed
            other = self.cls("weight", args)
            assert getattr(other.options, name) == given.get(name, default), "an option leaked"
        observer(self.value(GROUP))
        assert args == before
        assert args.observer_kwargs == given
        assert observer.args is not args

    @pytest.mark.parametrize("where", ["args", "keywords"])
    def test_unknown_option_lists_the_valid_ones(self, where: str) -> None:
        typo = "averging_constant"
        options = {typo: 0.5}
        args, kwargs = ({"observer_kwargs": options}, {}) if where == "args" else ({}, options)
        with pytest.raises(ValueError, match=typo) as error:
            self.cls("weight", GROUP.args(**args), **kwargs)
        for valid in self.cls.Options.model_fields:
            assert valid in str(error.value)

    def test_options_out_of_range_or_of_a_wrong_type_are_refused(self) -> None:
        for name in self.cls.Options.model_fields:
            for value in BAD_VALUES.get(name, []):
                with pytest.raises(ValueError, match=name):
                    self.cls("weight", GROUP.args(), **{name: value})
                with pytest.raises(ValueError, match=name):
                    self.cls("weight", GROUP.args(observer_kwargs={name: value}))

    # -- module ------------------------------------------------------------------------------

    def test_module_is_held_weakly(self) -> None:
        module = nn.Linear(24, 6)
        observer = self.build(GROUP, module=module)
        assert observer.module is module
        alive = weakref.ref(module)
        del module
        assert alive() is None
        assert observer.module is None
        assert observer(self.value(GROUP))[0].shape == GROUP.qparams

    def test_module_is_no_submodule(self) -> None:
        observer = self.build(GROUP, module=nn.Linear(24, 6))
        assert not list(observer.children())
        assert not list(observer.parameters())

    def test_observer_fits_on_its_module(self) -> None:
        module = nn.Linear(24, 6)
        module.add_module("weight_observer", self.build(GROUP, module=module))
        names = set(module.state_dict())
        module.weight_observer(module.weight)
        assert set(module.state_dict()) == names == {"weight", "bias"}
        module.load_state_dict(module.state_dict())

    # -- copies ------------------------------------------------------------------------------

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_copies_and_pickles_answer_the_same_and_part_ways(self, case: Case) -> None:
        first, second = self.batches(case, 2)
        observer = self.build(case)
        result = observer(first)
        copied = copy.deepcopy(observer)
        assert copied.module is observer.module
        copies = [copied]
        if case.strategy != "tensor_group":
            copies.append(pickle.loads(pickle.dumps(observer)))
        for each in copies:
            assert_same(each.get_qparams(), result)
        expected = observer(second)
        assert_same(copied.get_qparams(), result)
        assert_same(copied(second), expected)
        for each in copies[1:]:
            assert_same(each(second), expected)

    def test_copies_of_a_model_observe_the_copied_module(self) -> None:
        for duplicate in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
            model = nn.Sequential(nn.Linear(24, 6, device=self.device))
            model[0].add_module("weight_observer", self.build(GROUP, module=model[0]))
            result = model[0].weight_observer(model[0].weight)
            copied = duplicate(model)
            assert copied[0].weight_observer is not model[0].weight_observer
            if duplicate is copy.deepcopy:
                assert copied[0].weight_observer.module is copied[0]
            assert_same(copied[0].weight_observer.get_qparams(), result)
            with torch.no_grad():
                copied[0].weight.mul_(2)
            doubled = copied[0].weight_observer(copied[0].weight)
            assert differs(doubled, result)
            assert_same(model[0].weight_observer.get_qparams(), result)

    def test_debug_lines_do_not_reach_a_user_who_asked_for_warnings(self) -> None:
        observer = self.build(INPUT)
        with logged("WARNING") as lines:
            observer(self.value(INPUT))
        assert not [line for line in lines if "token" in line]
