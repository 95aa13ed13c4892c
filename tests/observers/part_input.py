"""Contract: shapes and dtypes of results, g_idx, and every row of "Bad input"."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import Tensor, nn

from calipers.observers import Observer
from observers.rig import ObserverRig
from observers.samples import (
    BATCHED,
    BY_NAME,
    CASES,
    WEIGHTS,
    Case,
    assert_same,
    assert_same_state,
    differs,
    logged,
    wide,
)

GROUP = BY_NAME["group"]
RAGGED = BY_NAME["group-ragged"]
INPUT = BY_NAME["tensor-input"]
TENSOR = BY_NAME["tensor-2d"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]
BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}


class Marked(Tensor):
    """A tensor subclass."""


class InputPart(ObserverRig):
    def assert_usable(self, result: tuple[Tensor, Tensor], case: Case) -> None:
        scale, zero_point = result
        assert scale.shape == case.qparams
        assert zero_point.shape == case.qparams
        assert scale.isfinite().all()
        # The one exception to positive scales has to be asked for.
        sizes = scale.abs() if self.options.get("negative_scales") else scale
        assert (sizes > 0).all()
        assert wide(zero_point).isfinite().all()

    # -- results -----------------------------------------------------------------------------

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_shape_dtype_and_device_of_results(self, case: Case) -> None:
        for dtype in FLOATS[:3]:
            scale, zero_point = result = self.build(case)(self.value(case, dtype=dtype))
            self.assert_usable(result, case)
            if case.strategy != "tensor_group":  # a float32 global scale is multiplied into it
                assert scale.dtype == dtype
            assert zero_point.dtype == case.args().zp_dtype
            assert scale.device.type == zero_point.device.type == self.device.type

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_float64(self, case: Case) -> None:
        value = self.value(case, dtype=torch.float64)
        scale, zero_point = result = self.build(case)(value)
        self.assert_usable(result, case)
        single = self.build(case)(value.float())
        if case.strategy != "tensor_group":
            assert scale.dtype == torch.float64
            # The same range up to rounding to float32.
            torch.testing.assert_close(scale.float(), single[0], rtol=1e-6, atol=0)
        assert torch.equal(wide(zero_point), wide(single[1]))

    @pytest.mark.parametrize("zp_dtype", [torch.int8, torch.int32, torch.float32], ids=str)
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_zero_point_has_zp_dtype(self, symmetric: bool, zp_dtype: torch.dtype) -> None:
        args = GROUP.args(symmetric=symmetric, zp_dtype=zp_dtype)
        scale, zero_point = self.build(GROUP, args=args)(self.value(GROUP) + 1)
        assert zero_point.dtype == zp_dtype
        assert bool((zero_point == 0).all()) is symmetric
        assert scale.dtype == torch.float32

    @pytest.mark.parametrize("case", WEIGHTS, ids=str)
    def test_each_group_is_measured_by_itself(self, case: Case) -> None:
        """A larger value in one corner changes the scale of that corner alone.

        The grid search stops when no group gains, which couples groups: patience 0 parts them.
        """
        options = {"patience": 0} if "patience" in self.cls.Options.model_fields else {}
        value = self.value(case)
        before = self.build(case, **options)(value)[0]
        value[(0,) * value.dim()] = 5
        after = self.build(case, **options)(value)[0]
        changed = (before != after).reshape(-1)
        assert bool(changed[0])
        if changed.numel() > 1:
            assert not changed[1:].any()

    @pytest.mark.parametrize("experts", [c for c in WEIGHTS if "experts" in c.name], ids=str)
    def test_experts_are_as_one_by_one(self, experts: Case) -> None:
        options = {"patience": 0} if "patience" in self.cls.Options.model_fields else {}
        value = self.value(experts)
        scale, zero_point = self.build(experts, **options)(value)
        for i, expert in enumerate(value):
            assert_same(
                (scale[i], zero_point[i]),
                self.build(experts, **options)(expert),
            )

    def test_leading_dimensions_of_activations_do_not_matter(self) -> None:
        for case, flat in ((INPUT, (24, 12)), (BY_NAME["group-input"], (30, 24))):
            value = self.value(case)
            assert_same(self.build(case)(value), self.build(case)(value.reshape(flat)))
            assert_same(self.build(case)(value), self.build(case)(value.reshape(1, 1, *flat)))

    # -- columns in groups -------------------------------------------------------------------

    @pytest.mark.parametrize("case", [GROUP, RAGGED, BY_NAME["group-experts"]], ids=str)
    def test_g_idx_that_says_nothing_new(self, case: Case) -> None:
        value, cols = self.value(case), case.shape[-1]
        plain = self.build(case)(value)
        in_order = torch.arange(cols, device=self.device) // 8
        partly = in_order.clone()
        partly[3] = -1
        for g_idx in (None, in_order, in_order.int(), torch.full_like(in_order, -1), partly):
            assert_same(self.build(case)(value, g_idx), plain)
            assert_same(self.build(case)(value, g_idx=g_idx), plain)

    @pytest.mark.parametrize(
        "case", [GROUP, RAGGED, BY_NAME["tensor_group"], BY_NAME["group-experts"]], ids=str
    )
    def test_permuted_g_idx_brings_columns_together(self, case: Case) -> None:
        value, cols = self.value(case), case.shape[-1]
        size = case.options["group_size"]
        order = torch.randperm(cols, generator=torch.Generator().manual_seed(3)).to(self.device)
        g_idx = torch.empty(cols, dtype=torch.int32, device=self.device)
        g_idx[order] = torch.arange(cols, device=self.device, dtype=torch.int32) // size
        expected = self.build(case)(value[..., torch.argsort(g_idx, stable=True)])
        assert_same(self.build(case)(value, g_idx), expected)
        assert differs(expected, self.build(case)(value))
        module = self.module(case)
        module.register_buffer("weight_g_idx", g_idx)
        observer = self.build(case, module=module)
        assert_same(observer(value), expected)
        observer.reset()
        observer.observe(value)
        assert_same(observer.get_qparams(), expected)

    @pytest.mark.parametrize("case", [GROUP, RAGGED], ids=str)
    def test_groups_of_unequal_sizes(self, case: Case) -> None:
        options = {"patience": 0} if "patience" in self.cls.Options.model_fields else {}
        sizes = [11, 8, 5] if case is GROUP else [4, 13, 4]
        groups = [g for g, size in enumerate(sizes) for _ in range(size)]
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(5))
        for permutation in (torch.arange(len(groups)), order):
            g_idx = torch.tensor(groups)[permutation].to(self.device)
            value = self.value(case)
            scale, zero_point = self.build(case, **options)(value, g_idx)
            assert scale.shape == case.qparams
            channel = BY_NAME["channel-2d"]
            for g in range(3):
                alone = self.build(channel, **options)(value[:, g_idx == g])
                assert_same((scale[:, g : g + 1], zero_point[:, g : g + 1]), alone)

    def test_g_idx_of_another_number_of_groups_is_an_error(self) -> None:
        value = self.value(GROUP)
        for groups in (2, 4):
            g_idx = torch.arange(24, device=self.device) % groups
            with pytest.raises(ValueError, match=rf"g_idx.*\b3\b.*\b{groups}\b"):
                self.build(GROUP)(value, g_idx)
        with pytest.raises(ValueError, match=r"g_idx.*24.*23"):
            self.build(GROUP)(value, torch.zeros(23, dtype=torch.int64, device=self.device))

    # -- every kind of tensor ----------------------------------------------------------------

    @pytest.mark.parametrize("case", [GROUP, RAGGED, *BATCHED], ids=str)
    def test_integers_are_computed_in_float32(self, case: Case) -> None:
        for dtype in INTEGERS:
            value = (self.value(case) * 20).abs().to(dtype)
            scale, zero_point = self.build(case)(value)
            assert scale.dtype == torch.float32
            assert_same((scale, zero_point), self.build(case)(value.float()))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_memory_layout_does_not_matter_and_inputs_stay_unchanged(self, case: Case) -> None:
        value = self.value(case)
        expected = self.build(case)(value.contiguous())
        layouts = [value]
        if value.dim():
            layouts.append(torch.stack([value, value * 5], -1)[..., 0])
            layouts.append(torch.cat([value, value * 5])[: len(value)])
        if value.dim() > 1:
            layouts.append(value.transpose(0, -1).contiguous().transpose(0, -1))
        layouts.append(value[:1].expand(value.shape) if value.dim() else value)
        for layout in layouts:
            before, version = layout.clone(), layout._version
            result = self.build(case)(layout)
            assert torch.equal(layout, before)
            assert layout._version == version
            if torch.equal(before, value):
                assert_same(result, expected)
        repeated = layouts[-1]
        assert_same(self.build(case)(repeated), self.build(case)(repeated.contiguous()))

    @pytest.mark.parametrize("case", [TENSOR, GROUP, BY_NAME["block-ragged"]], ids=str)
    def test_parameters_and_subclasses(self, case: Case) -> None:
        value = self.value(case)
        expected = self.build(case)(value)
        parameter = nn.Parameter(value.clone())
        needs_grad = value.clone().requires_grad_() * 1
        for each in (parameter, needs_grad, value.as_subclass(Marked), nn.Buffer(value)):
            scale, zero_point = result = self.build(case)(each)
            assert_same(result, expected)
            assert type(scale) is Tensor
            assert type(zero_point) is Tensor
            assert not scale.requires_grad
        assert parameter.grad is None
        assert parameter.requires_grad

    def test_inference_mode(self) -> None:
        batches = self.batches(INPUT)
        observer, plain = self.build(INPUT), self.build(INPUT)
        with torch.inference_mode():
            for batch in batches[:2]:
                observer(batch.clone())
        for batch in batches[2:]:
            observer(batch)
        for batch in batches:
            plain(batch)
        assert_same(observer.get_qparams(), plain.get_qparams())

    def test_meta_tensor_is_a_clear_error(self) -> None:
        observer = self.build(GROUP)
        with pytest.raises(ValueError, match=r"meta.*\(6, 24\)"):
            observer(torch.empty(6, 24, device="meta"))
        with pytest.raises(ValueError, match="meta"):
            observer.get_global_scale(torch.empty(6, 24, device="meta"))
        assert observer.get_qparams() == (None, None)

    @pytest.mark.parametrize("wrong", [None, [1.0, 2.0], 3.0, "weight"])
    def test_what_is_no_tensor_is_a_clear_error(self, wrong: object) -> None:
        with pytest.raises(ValueError, match=type(wrong).__name__):
            self.build(GROUP)(wrong)

    # -- empty, zero, constant ---------------------------------------------------------------

    @pytest.mark.parametrize("case", [GROUP, BY_NAME["block"], *BATCHED], ids=str)
    def test_empty_tensor_changes_nothing(self, case: Case) -> None:
        empty = torch.empty(0, *case.shape[1:], device=self.device)
        observer = self.build(case)
        fresh = observer.state()
        assert observer.get_qparams(empty) == (None, None)
        assert_same_state(observer.state(), fresh)
        result = observer(self.value(case))
        state = observer.state()
        for _ in range(2):
            assert_same(observer.get_qparams(empty), result)
            observer.observe(empty)
        assert_same_state(observer.state(), state)
        assert_same(observer(empty), result)
        assert_same(observer.get_qparams(torch.empty(0, device=self.device)), result)

    def test_empty_tensor_leaves_the_global_scale(self) -> None:
        case = BY_NAME["tensor_group"]
        observer = self.build(case)
        scale = observer.get_global_scale(self.value(case))
        empty = torch.empty(0, 48, device=self.device)
        assert torch.equal(observer.get_global_scale(empty), scale)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_zeros(self, case: Case) -> None:
        kinds = [{}] if case.strategy == "tensor_group" else [{"symmetric": s} for s in (0, 1)]
        for kind, dtype in itertools.product(kinds, FLOATS):
            zeros = torch.zeros(case.shape, dtype=dtype, device=self.device)
            self.assert_usable(self.build(case, args=case.args(**kind))(zeros), case)

    def test_zeros_have_a_finite_global_scale(self) -> None:
        case = BY_NAME["tensor_group"]
        scale = self.build(case).get_global_scale(torch.zeros(case.shape, device=self.device))
        assert scale.isfinite().all()
        assert (scale > 0).all()

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("case", [TENSOR, GROUP, BY_NAME["tensor_group"]], ids=str)
    def test_extreme_magnitudes(self, case: Case, dtype: torch.dtype) -> None:
        limits = torch.finfo(dtype)
        # Half of the largest: the width of the range must not overflow either.
        for size in (limits.tiny, limits.smallest_normal * 4, limits.max / 4):
            if dtype == torch.float64 and size > 1e30:
                size = 1e30  # the search works in float32
            value = self.value(case).sign().to(dtype) * size
            self.assert_usable(self.build(case)(value), case)

    # -- NaN and Inf -------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_nonfinite_values_are_left_out(self, dtype: torch.dtype) -> None:
        for bad in BAD.values():
            spoilt = self.value(TENSOR, dtype=dtype)
            spoilt[1, 3:9] = bad
            observer = self.build(TENSOR)
            result = observer(spoilt)
            assert_same(result, self.build(TENSOR)(spoilt[spoilt.isfinite()]))
            assert observer.num_nonfinite == 6

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_nonfinite_values_are_left_out_of_each_group(self, case: Case) -> None:
        # A zero is within every range and is quantized without error: it stands for "left out".
        value = self.value(case).reshape(-1)
        if value.numel() == 1:
            pytest.skip("one value")
        places = torch.arange(0, value.numel(), 7, device=self.device)
        kinds = torch.tensor(list(BAD.values()), device=self.device)
        spoilt, blanked = value.clone(), value.clone()
        spoilt[places] = kinds[places % 3]
        blanked[places] = 0
        observer = self.build(case)
        result = observer(spoilt.reshape(case.shape))
        self.assert_usable(result, case)
        assert_same(result, self.build(case)(blanked.reshape(case.shape)))
        assert observer.num_nonfinite == len(places)

    @pytest.mark.parametrize("case", [GROUP, BY_NAME["attn_head"], BY_NAME["block"]], ids=str)
    def test_group_of_nothing_but_nan_gets_a_usable_scale(self, case: Case) -> None:
        value = self.value(case)
        if case.base_name == "k":
            value[:, 0] = torch.nan
        else:
            value[:4, :8] = torch.nan
        self.assert_usable(self.build(case)(value), case)

    def test_group_of_nothing_but_nan_keeps_its_statistics(self) -> None:
        case = BY_NAME["attn_head"]
        if self.remembers == "last":
            pytest.skip("nothing is kept")
        first, second = self.batches(case, 2)
        spoilt = second.clone()
        spoilt[:, 0] = torch.nan
        observer = self.build(case)
        scale, zero_point = observer(first)
        after = observer(spoilt)
        assert_same((after[0][:1], after[1][:1]), (scale[:1], zero_point[:1]))
        other = self.build(case)
        other.observe(first)
        expected = other(second)
        assert_same((after[0][1:], after[1][1:]), (expected[0][1:], expected[1][1:]))

    def test_group_of_nothing_but_nan_at_first_starts_later(self) -> None:
        case = BY_NAME["attn_head"]
        first, second = self.batches(case, 2)
        first[:, 0] = torch.nan
        observer = self.build(case)
        observer.observe(first)
        scale, zero_point = observer(second)
        alone = self.build(case)(second)
        assert_same((scale[:1], zero_point[:1]), (alone[0][:1], alone[1][:1]))

    def test_one_warning_names_the_module_and_all_are_counted(self) -> None:
        class SelfAttention(nn.Module):
            pass

        module = SelfAttention()
        observer = self.build(INPUT, module=module)
        with logged("WARNING") as lines:
            for i in range(3):
                value = self.value(INPUT, i)
                value[0, 0, 0, : i + 1] = torch.nan
                observer(value)
        warnings = [line for line in lines if "NaN" in line]
        assert len(warnings) == 1
        assert "SelfAttention" in warnings[0]
        assert "input" in warnings[0]
        assert observer.num_nonfinite == 1 + 2 + 3

    def test_finite_values_are_not_warned_about(self) -> None:
        observer = self.build(INPUT)
        with logged("WARNING") as lines:
            observer(self.value(INPUT))
        assert not [line for line in lines if "NaN" in line]
        assert observer.num_nonfinite == 0

    @pytest.mark.parametrize("bad", BAD)
    def test_nothing_but_nonfinite_values_is_an_error(self, bad: str) -> None:
        observer = self.build(INPUT, module=nn.Linear(12, 3))
        result = observer(self.value(INPUT))
        state = observer.state()
        spoilt = torch.full(INPUT.shape, BAD[bad], device=self.device)
        for call in (observer, observer.get_qparams, observer.observe, observer.get_global_scale):
            with pytest.raises(ValueError, match=r"Linear.*NaN"):
                call(spoilt)
        assert_same(observer.get_qparams(), result)
        assert_same_state(observer.state(), state)

    def test_nonfinite_values_do_not_reach_the_global_scale(self) -> None:
        case = BY_NAME["tensor_group"]
        value = self.value(case)
        spoilt = value.clone()
        value[0, :2] = 0
        spoilt[0, 0], spoilt[0, 1] = torch.inf, torch.nan
        expected = self.build(case).get_global_scale(value)
        assert torch.equal(self.build(case).get_global_scale(spoilt), expected)

    # -- wrong shapes ------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("case", "shape"),
        [
            ("channel-2d", ()),
            ("group", (24,)),
            ("group", ()),
            ("tensor_group", (48,)),
            ("block", (16,)),
            ("token", ()),
            ("group-input", ()),
            ("attn_head", (5, 4)),
        ],
    )
    def test_wrong_shape_is_a_clear_error(self, case: str, shape: tuple[int, ...]) -> None:
        observer = self.build(BY_NAME[case])
        with pytest.raises(ValueError, match=re.escape(f"got {shape}")) as error:
            observer(torch.ones(shape, device=self.device))
        assert "observed" in str(error.value)
        assert "expect" in str(error.value)
        assert BY_NAME[case].strategy in str(error.value)
        assert observer.get_qparams() == (None, None)

    def test_statistics_of_another_shape_are_a_clear_error(self) -> None:
        if self.remembers == "last":
            pytest.skip("nothing is kept")
        observer = self.build(GROUP)
        result = observer(self.value(GROUP))
        with pytest.raises(ValueError, match=re.escape("(6, 3)")) as error:
            observer(torch.ones(5, 16, device=self.device))
        assert "(5, 2)" in str(error.value)
        assert_same(observer.get_qparams(), result)

    def test_meaningless_combination_names_both(self) -> None:
        meaningless = [
            *itertools.product(["weight"], ["token", "attn_head"]),
            *itertools.product(["input", "output"], ["channel-2d", "block", "attn_head"]),
            *itertools.product(["q", "k", "v"], ["channel-2d", "group", "block", "token"]),
        ]
        for base_name, name in meaningless:
            case = BY_NAME[name]
            observer = Observer.load_from_registry(self.name, base_name, case.args())
            with pytest.raises(ValueError, match=f"'{base_name}'") as error:
                observer(self.value(case))
            assert f"'{case.strategy}'" in str(error.value)
        observer = Observer.load_from_registry(self.name, "bias", TENSOR.args())
        with pytest.raises(ValueError, match="'bias'"):
            observer(self.value(TENSOR))

    def test_missing_global_scale_is_a_clear_error(self) -> None:
        case = BY_NAME["tensor_group"]
        for module in (nn.Linear(48, 4), None):
            observer = self.cls("weight", case.args(), module)
            with pytest.raises(ValueError, match=r"weight_global_scale.*compute it first"):
                observer(self.value(case))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_global_scale_is_float32_of_one_element(self, case: Case) -> None:
        for dtype in FLOATS:
            observer = self.build(case)
            scale = observer.get_global_scale(self.value(case, dtype=dtype))
            assert scale.dtype == torch.float32
            assert scale.shape == (1,)
            assert scale.device.type == self.device.type
            assert scale.isfinite().all()
            assert (scale > 0).all()
            assert observer.get_qparams() == (None, None), "global statistics became local"
