"""The native library: how it comes into being, and its minimum and maximum against torch's."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import generate_gparam
from loguru import logger

from calipers.engines import dispatch
from calipers.engines.native import abi, build, cache, grid, hessian, optimal
from calipers.engines.native import min_max as native_min_max
from calipers.observers import Observer
from calipers.ranges import (
    Groups,
    ShrinkGrid,
    group_values,
    min_max,
    search_grid_ranges,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STRATEGIES = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group of 2": {"strategy": "group", "group_size": 2},
    "group of 16": {"strategy": "group", "group_size": 16},
    "group of 32": {"strategy": "group", "group_size": 32},
    "short last group": {"strategy": "group", "group_size": 96},
    "blocks with short ends": {"strategy": "block", "block_structure": [48, 32]},
}


def values(rows: int = 300, cols: int = 400, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(rows, cols, generator=generator) * 3).to(dtype)


def assert_same_extremes(view: Groups) -> None:
    native, eager = min_max(view, engine="native"), min_max(view, engine="eager")
    assert not dispatch._failures
    for found, expected in zip(native, eager, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


class TestMinMax:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("name", STRATEGIES)
    def test_strategies(self, name, dtype):
        args = QuantizationArgs(num_bits=8, **STRATEGIES[name])
        for view in group_values(values(dtype=dtype), "weight", args):
            assert_same_extremes(view)

    @pytest.mark.parametrize("base_name", ["input", "k"])
    def test_activations_and_attention_states(self, base_name):
        strategy = {"input": "tensor", "k": "attn_head"}[base_name]
        states = values(2 * 40, 24 * 32).view(2, 40, 24, 32).transpose(1, 2)
        args = QuantizationArgs(num_bits=8, strategy=strategy)
        for view in group_values(states, base_name, args):
            assert_same_extremes(view)

    def test_groups_of_activations_and_columns_in_any_order(self):
        args = QuantizationArgs(num_bits=8, strategy="group", group_size=16)
        for view in group_values(values(), "input", args):
            assert_same_extremes(view)
        for view in group_values(values(), "weight", args, torch.arange(400).remainder(25)):
            assert_same_extremes(view)

    def test_values_that_lie_apart(self):
        args = QuantizationArgs(num_bits=8, strategy="group", group_size=16)
        for value in (values().t(), values()[:, ::2], values().expand(2, -1, -1)):
            for view in group_values(value, "weight", args):
                assert_same_extremes(view)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("size", [16, 50, 400])
    @pytest.mark.parametrize("odd", [torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    def test_odd_values_show_and_are_left_out(self, odd, size, dtype):
        value = values(dtype=dtype)
        value[::3, 7], value[5], value[6, :200] = odd, odd, -odd
        args = QuantizationArgs(num_bits=8, strategy="group", group_size=size)
        for view in group_values(value, "weight", args):
            assert_same_extremes(view)
            assert_same_extremes(view.finite())

    def test_every_sixteen_bit_float(self):
        every = torch.arange(-(2**15), 2**15).to(torch.int16)
        for dtype in DTYPES[1:]:
            view = Groups(every.view(dtype).view(-1, 1, 1), (2,))
            assert_same_extremes(view)
            assert_same_extremes(Groups(every.view(dtype).view(-1, 16), (1,)).finite())

    def test_any_number_of_threads(self, on_one_thread_and_five):
        view = group_values(values(), "weight", QuantizationArgs(num_bits=8, strategy="channel"))
        one, five = on_one_thread_and_five(lambda: min_max(view[0], engine="native"))
        assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


@pytest.fixture
def on_one_thread_and_five(monkeypatch):
    """What a search finds on one thread, and, cut into parts however small it is, on five."""
    parts = []

    def counted(*work):
        parts.append(abi.number_of_parts(*work))
        return parts[-1]

    monkeypatch.setattr(abi, "WORTH_THREADS", 1)
    for module in (grid, hessian, native_min_max, optimal):
        monkeypatch.setattr(module, "number_of_parts", counted)

    def search_twice(search):
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 5):
                torch.set_num_threads(count)
                parts.clear()
                found.append(search())
                assert max(parts) == count, "the engine did not take part, or not in parts"
        finally:
            torch.set_num_threads(threads)
        return found

    return search_twice


@pytest.mark.parametrize("bits", [4, 8])
def test_grid_search_on_any_number_of_threads(bits, on_one_thread_and_five):
    args = QuantizationArgs(num_bits=bits, strategy="group", group_size=16)
    (view,) = group_values(values(), "weight", args)
    extremes = [min_max(view)]
    search = ShrinkGrid(maxshrink=0.2, grid=100, patience=5, norm=2.4)
    ((one,), (five,)) = on_one_thread_and_five(
        lambda: search_grid_ranges([view], extremes, args, search, engine="native")
    )
    assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


@pytest.mark.parametrize("objective", ["mse", "hessian"])
@pytest.mark.parametrize(
    "scheme",
    [
        {"strategy": "group", "group_size": 16},
        {"strategy": "group", "group_size": 16, "symmetric": False},
        {"strategy": "channel"},
        {"strategy": "group", "group_size": 16, "type": "float"},
    ],
    ids=["int4", "int4 asymmetric", "int4 channel", "fp4"],
)
def test_optimal_on_any_number_of_threads(scheme, objective, on_one_thread_and_five):
    args = QuantizationArgs(num_bits=4, observer_kwargs={"objective": objective}, **scheme)
    value = values(96, 64)

    def search():
        observer = Observer.load_from_registry("optimal", "weight", args)
        observer.observe_input(values(100, 64) + values(100, 64).roll(1, -1))
        return observer(value)

    one, five = on_one_thread_and_five(search)
    assert all(torch.equal(a, b) for a, b in zip(one, five, strict=True))


def test_steps_that_clip_too_much_are_left_out():
    """Counted: with int8 far fewer than all 80 steps, with the same answer."""
    value, args = values(512, 256), QuantizationArgs(num_bits=8, strategy="channel")
    (view,) = group_values(value, "weight", args)
    extremes = min_max(view)
    search = ShrinkGrid(maxshrink=0.8, grid=100, patience=0, norm=2.4)
    (found,) = search_grid_ranges([view], [extremes], args, search, engine="native")
    assert grid.evaluated.count <= 512 * 24
    (expected,) = search_grid_ranges([view], [extremes], args, search, engine="eager")
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("preset", ["NVFP4A16", "MXFP4A16", "MXFP8A16"])
def test_steps_of_one_rounded_scale_are_tried_once(preset):
    """Counted: some of the 20 steps alone, with the same answer."""
    value, args = values(512, 256), preset_name_to_scheme(preset, ["Linear"]).weights
    (view,) = group_values(value, "weight", args)
    extremes, global_scale = [min_max(view)], None
    if args.strategy == "tensor_group":
        global_scale = generate_gparam(value.amin(), value.amax())
    search = ShrinkGrid(maxshrink=0.2, grid=100, patience=0, norm=2.4)
    found, expected = (
        search_grid_ranges([view], extremes, args, search, global_scale=global_scale, engine=engine)
        for engine in ("native", "eager")
    )
    groups = value.numel() // args.group_size
    assert groups <= grid.evaluated.count <= groups * (5 if global_scale is not None else 2)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


@pytest.mark.parametrize("weighted", [False, True])
def test_candidates_are_dismissed_by_their_squares(weighted):
    """Counted: powers other than squares of a few steps alone, with the same answer."""
    value, args = values(512, 256), QuantizationArgs(num_bits=8, strategy="channel")
    (view,) = group_values(value, "weight", args)
    weight = torch.rand(256, generator=torch.Generator().manual_seed(1)).expand(512, 256)
    importance = list(group_values(weight, "weight", args)) if weighted else None
    counts, extremes = [], [min_max(view)]
    for norm in (2.0, 2.4):
        search = ShrinkGrid(maxshrink=0.2, grid=100, patience=0, norm=norm)
        (found,) = search_grid_ranges(
            [view], extremes, args, search, importance=importance, engine="native"
        )
        counts.append(grid.evaluated.count)
        (expected,) = search_grid_ranges(
            [view], extremes, args, search, importance=importance, engine="eager"
        )
        assert torch.equal(found[1], expected[1])
    assert counts[1] <= 0.7 * counts[0]
    if weighted:  # weights may make up for any clipping, so that squares take all steps
        assert counts[0] == 512 * 20


class TestBuild:
    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch, tmp_path):
        monkeypatch.setenv("CALIPERS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(dispatch, "_failures", {})
        for cached in (build.library, build.compiler):
            cached.cache_clear()
        dispatch._warn_once.cache_clear()
        yield
        for cached in (build.library, build.compiler):
            cached.cache_clear()

    def test_it_is_compiled_once_and_nothing_else_is_left(self, tmp_path):
        assert not build.is_built()
        build.library()
        assert build.is_built()
        (made,) = (tmp_path / "cache").iterdir()
        written = made.stat().st_mtime_ns
        build.library.cache_clear()
        build.library()
        assert made.stat().st_mtime_ns == written

    def test_without_torch_s_openmp_it_starts_threads_of_its_own(self, monkeypatch):
        monkeypatch.setattr(build, "_FLAGS", [*build._FLAGS, "-DOWN_THREADS"])
        for cached in (build._flags, build._fingerprint):
            monkeypatch.setattr(build, cached.__name__, cached.__wrapped__)
        view = group_values(
            values(1000), "weight", QuantizationArgs(num_bits=8, strategy="channel")
        )
        assert_same_extremes(view[0])

    def test_a_compiler_that_fails_is_one_warning(self, monkeypatch, tmp_path):
        fake = tmp_path / "c++"
        fake.write_text("#!/bin/sh\necho no such instruction >&2\nexit 1\n")
        fake.chmod(0o755)
        monkeypatch.setenv("CXX", str(fake))
        messages: list[str] = []
        sink = logger.add(messages.append, format="{message}", level="WARNING")
        view = group_values(values(), "weight", QuantizationArgs(num_bits=8, strategy="channel"))
        try:
            found = [min_max(view[0], engine="native") for _ in range(2)]
        finally:
            logger.remove(sink)
        assert all(torch.equal(each[0], values().amin(1, keepdim=True)) for each in found)
        assert len(messages) == 1
        assert "no such instruction" in messages[0]
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_structure_of_another_size_is_found_when_the_library_is_loaded(self, monkeypatch):
        class Longer(abi.NativeStrides):
            _fields_ = (("more", ctypes.c_int64),)

        abi.library()
        monkeypatch.setitem(abi.STRUCTURES, "Box", Longer)
        size = ctypes.sizeof(abi.NativeStrides)
        build.library.cache_clear()
        with pytest.raises(
            build.BuildError, match=f"Box has {size} bytes in C\\+\\+ and {size + 8}"
        ):
            abi.library()

    @pytest.mark.slow
    def test_two_processes_may_build_at_once(self, tmp_path):
        code = "from calipers.engines.native.build import library; library().min_max"
        both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        assert [each.wait(timeout=300) for each in both] == [0, 0]
        assert len(list((tmp_path / "cache").iterdir())) == 1

    def test_a_cache_that_cannot_be_written(self, monkeypatch, tmp_path):
        monkeypatch.delenv("CALIPERS_CACHE")
        blocked = tmp_path / "file"
        blocked.write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
        cache._private_folder.cache_clear()
        build.library()
        assert build.is_built()
