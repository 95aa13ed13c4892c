"""Contract: observing and deriving, reset, saving, merging, order."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from calipers.observers import Observer
from observers.rig import ObserverRig
from observers.samples import (
    BATCHED,
    BY_NAME,
    CASES,
    Case,
    assert_same,
    assert_same_state,
    differs,
)

GROUP = BY_NAME["group"]
INPUT = BY_NAME["tensor-input"]
ROWS = Case("rows", (8, 16), (1,), "input", {"strategy": "tensor"})


class StatisticsPart(ObserverRig):
    def observed(self, case: Case, batches: list[torch.Tensor]) -> Observer:
        observer = self.build(case)
        for batch in batches:
            observer.observe(batch)
        return observer

    # -- observing and deriving --------------------------------------------------------------

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward_is_observing_and_deriving(self, case: Case) -> None:
        batches = self.batches(case, 3)
        forward, apart = self.build(case), self.build(case)
        for batch in batches:
            result = forward(batch)
            apart.observe(batch)
            assert_same(apart.get_qparams(), result)
        assert_same(self.observed(case, batches).get_qparams(), result)

    @pytest.mark.parametrize("case", [GROUP, *BATCHED], ids=str)
    def test_asking_any_number_of_times_loses_nothing(self, case: Case) -> None:
        first, second, third = self.batches(case, 3)
        asked = self.build(case)
        assert asked.get_qparams() == (None, None)
        asked.observe(first)
        result = asked.get_qparams()
        state = asked.state()
        for _ in range(3):
            assert_same(asked.get_qparams(), result)
        assert_same_state(asked.state(), state)
        asked.observe(second)
        asked.get_qparams()
        asked.observe(third)
        expected = self.observed(case, [first, second, third])
        assert_same(asked.get_qparams(), expected.get_qparams())
        assert_same_state(asked.state(), expected.state())

    def test_results_carry_no_gradient(self) -> None:
        scale, zero_point = self.build(GROUP)(self.value(GROUP).requires_grad_())
        assert not scale.requires_grad
        assert not zero_point.requires_grad

    def test_results_of_the_past_do_not_change(self) -> None:
        first, second = self.batches(INPUT, 2)
        observer = self.build(INPUT)
        scale, zero_point = observer(first)
        kept = scale.clone(), zero_point.clone()
        observer(second)
        assert_same((scale, zero_point), kept)

    def test_statistics_do_not_share_memory_with_the_value(self) -> None:
        for case in (GROUP, INPUT, BY_NAME["tensor-0d"]):
            value = self.value(case)
            observer = self.build(case)
            observer.observe(value)
            value.fill_(100)
            assert_same(observer.get_qparams(), self.build(case)(self.value(case)))

    # -- reset -------------------------------------------------------------------------------

    @pytest.mark.parametrize("case", [GROUP, *BATCHED], ids=str)
    def test_reset_makes_it_new(self, case: Case) -> None:
        observer = self.build(case)
        fresh = observer.state()
        for batch in self.batches(case):
            observer(batch)
        observer.record_observed_tokens(torch.zeros(3, 2))
        observer.get_global_scale(self.value(case))
        assert observer._num_observed_tokens is not None
        observer.reset()
        assert observer.get_qparams() == (None, None)
        assert observer._num_observed_tokens is None
        assert observer.num_nonfinite == 0
        assert observer.get_global_scale() is None
        assert_same_state(observer.state(), fresh)
        value = self.value(case, 7)
        assert_same(observer(value), self.build(case)(value))

    # -- state -------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_state_goes_through_safetensors(self, case: Case, dtype: torch.dtype) -> None:
        *batches, last = self.batches(case, 3, dtype)
        observer = self.observed(case, batches)
        saved = safetensors.torch.save(observer.state())
        observer.observe(last)
        loaded = self.build(case)
        loaded.observe(last)  # forgotten by load_state
        loaded.load_state(safetensors.torch.load(saved))
        assert_same_state(loaded.state(), self.observed(case, batches).state())
        on_cpu = tuple(t.cpu() for t in self.observed(case, batches).get_qparams())
        if case.strategy != "tensor_group" or self.device.type == "cpu":
            assert_same(tuple(t.cpu() for t in loaded.get_qparams()), on_cpu)
        loaded.observe(last)
        assert_same(loaded.get_qparams(), observer.get_qparams())

    def test_state_holds_global_statistics_and_counts(self) -> None:
        case = BY_NAME["tensor_group"]
        observer = self.build(case)
        value = self.value(case)
        scale = observer.get_global_scale(value)
        value[0, 0] = torch.nan
        observer(value)
        loaded = self.build(case)
        loaded.load_state(safetensors.torch.load(safetensors.torch.save(observer.state())))
        assert torch.equal(loaded.get_global_scale().cpu(), scale.cpu())
        assert loaded.num_nonfinite == 1
        assert loaded._num_observed_tokens == observer._num_observed_tokens

    def test_state_of_a_new_observer_can_be_saved(self) -> None:
        observer = self.build(GROUP)
        loaded = self.observed(GROUP, [self.value(GROUP)])
        loaded.load_state(safetensors.torch.load(safetensors.torch.save(observer.state())))
        assert loaded.get_qparams() == (None, None)

    def test_state_of_something_else_is_refused(self) -> None:
        observer = self.observed(GROUP, [self.value(GROUP)])
        result = observer.get_qparams()
        with pytest.raises(ValueError, match="no_such_entry"):
            observer.load_state({"no_such_entry": torch.zeros(1)})
        assert_same(observer.get_qparams(), result)

    def test_state_is_kept_out_of_state_dict(self) -> None:
        observer = self.build(GROUP)
        observer(self.value(GROUP))
        assert observer.state()
        assert not observer.state_dict()
        assert not list(observer.buffers())

    # -- several batches ---------------------------------------------------------------------

    @pytest.mark.parametrize("case", BATCHED, ids=str)
    def test_split_batches_against_the_whole(self, case: Case) -> None:
        batches = self.batches(case)
        result = self.observed(case, batches).get_qparams()
        whole = self.build(case)(torch.cat(batches))
        alone = self.build(case)(batches[-1])
        if self.remembers == "all":
            assert_same(result, whole)
            assert differs(result, alone), "these batches cannot tell"
        elif self.remembers == "last":
            assert_same(result, alone)
            assert differs(result, whole), "these batches cannot tell"
        else:
            assert differs(result, alone)
            assert differs(result, whole)

    @pytest.mark.parametrize("case", BATCHED, ids=str)
    def test_order_of_batches(self, case: Case) -> None:
        batches = self.batches(case)
        forwards = self.observed(case, batches)
        backwards = self.observed(case, batches[::-1])
        if self.remembers == "all":
            assert_same(forwards.get_qparams(), backwards.get_qparams())
            assert_same_state(forwards.state(), backwards.state())
        else:
            assert differs(forwards.get_qparams(), backwards.get_qparams())

    # -- merging -----------------------------------------------------------------------------

    @pytest.mark.parametrize("case", [GROUP, BY_NAME["block-ragged"], *BATCHED], ids=str)
    def test_merge_against_one_observer_of_all(self, case: Case) -> None:
        batches = self.batches(case, 5)
        merged = self.observed(case, batches[:3])
        other = self.observed(case, batches[3:])
        for observer in (merged, other):
            observer.get_global_scale(self.value(case))
        mine, others = merged.state(), other.state()
        merged.merge(other)
        assert_same_state(other.state(), others)
        assert merged.num_batches == 5
        if self.remembers == "average":
            for name, value in merged.state().items():
                if name.startswith("past_") and "global" not in name:
                    # Both sides weighed by how many batches they saw.
                    expected = (mine[name] * 3 + others[name] * 2) / 5
                    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        else:
            one = self.observed(case, batches)
            for _ in range(2):
                one.get_global_scale(self.value(case))
            assert_same(merged.get_qparams(), one.get_qparams())
            assert_same_state(merged.state(), one.state())
            assert torch.equal(merged.get_global_scale(), one.get_global_scale())

    def test_merge_of_tokens_equals_one_observer_of_all(self) -> None:
        # A token's scale is its own: whatever an observer remembers, the last batch alone counts.
        case = BY_NAME["token"]
        batches = self.batches(case, 4)
        one = self.observed(case, batches)
        merged = self.observed(case, batches[:2])
        merged.merge(self.observed(case, batches[2:]))
        assert_same(merged.get_qparams(), one.get_qparams())
        longer = torch.cat([batches[0], batches[0]], dim=1)
        merged.merge(self.observed(case, [longer]))
        assert_same(merged.get_qparams(), self.observed(case, [longer]).get_qparams())

    def test_merge_with_one_that_saw_nothing(self) -> None:
        batches = self.batches(INPUT, 2)
        seen, new = self.observed(INPUT, batches), self.build(INPUT)
        state = seen.state()
        seen.merge(self.build(INPUT))
        assert_same_state(seen.state(), state)
        new.merge(seen)
        assert_same_state(new.state(), state)
        assert_same(new.get_qparams(), seen.get_qparams())
        both = self.build(INPUT)
        both.merge(self.build(INPUT))
        assert both.get_qparams() == (None, None)

    def test_merge_adds_counts(self) -> None:
        def half(rows: int) -> Observer:
            observer = self.build(ROWS)
            value = self.value(ROWS)[:rows].clone()
            value[0, :rows] = torch.inf
            observer(value)
            return observer

        merged, other = half(3), half(2)
        merged.merge(other)
        assert merged._num_observed_tokens == 5
        assert merged.num_nonfinite == 5

    def test_merge_of_different_kinds_is_refused(self) -> None:
        observer = self.observed(INPUT, [self.value(INPUT)])
        state = observer.state()
        args = INPUT.args(num_bits=8)
        with pytest.raises(ValueError, match="merge"):
            observer.merge(self.build(INPUT, args=args))

        class Another(Observer):
            pass

        with pytest.raises(ValueError, match="Another"):
            observer.merge(Another("input", INPUT.args()))
        assert_same_state(observer.state(), state)
