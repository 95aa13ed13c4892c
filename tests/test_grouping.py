"""Groups hold every value once, by a recipe of shapes alone; chunks of them stay small."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from calipers import grouping
from calipers.observers import Observer
from calipers.ranges import Grouping, group_values, min_max
from observers.samples import CASES, Case
from ranges.brute_force import groups_of, qparam_shape
from ranges.strategies import arguments, group_indices, modest

# -- every value once ------------------------------------------------------------------------


@modest(120)
@given(st.data(), arguments(), st.integers(1, 9), st.integers(1, 70), st.integers(1, 200))
def test_pieces_cover_every_value_once(
    data: st.DataObject, args: QuantizationArgs, rows: int, cols: int, limit: int
) -> None:
    """Each value turns up once, and under the scale that the contract gives it."""
    g_idx = None
    if args.group_size:
        g_idx = data.draw(group_indices(cols, args.group_size))
    value = torch.arange(rows * cols, dtype=torch.float32).reshape(rows, cols)
    recipe = Grouping.of(value.shape, "weight", args, g_idx)
    assert recipe.qparam_shape == qparam_shape(value, args)
    owner = torch.full((rows * cols,), -1)
    numbers = torch.arange(len(groups_of(value, args, g_idx))).reshape(recipe.qparam_shape)
    for view in recipe.split(value):
        ours = numbers[view.where].reshape(view.qparam_shape)
        for where, piece in view.chunks(limit):
            kept = piece.shape[: len(where)]
            assert ours[where].shape == kept
            assert piece.numel() <= limit or piece.shape[0] == 1 or view.columns is not None
            owners = ours[where].reshape(*kept, *[1] * (piece.dim() - len(kept)))
            places = piece.long().flatten()
            assert (owner[places] == -1).all(), "a value came twice"
            owner[places] = owners.expand(piece.shape).flatten()
    expected = torch.empty(rows * cols, dtype=torch.int64)
    for number, mask in enumerate(groups_of(value, args, g_idx)):
        expected[mask.flatten()] = number
    assert torch.equal(owner, expected)


@pytest.mark.parametrize("limit", [1, 7, 64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pieces_of_every_layout(case: Case, limit: int) -> None:
    value = torch.arange(max(1, torch.Size(case.shape).numel())).float().reshape(case.shape)
    recipe = Grouping.of(value.shape, case.base_name, case.args())
    seen = [piece.flatten() for view in recipe.split(value) for _, piece in view.chunks(limit)]
    assert torch.equal(torch.cat(seen).sort().values, value.flatten())
    assert recipe.qparam_shape == case.qparams


@pytest.mark.parametrize("limit", [1, 3, 50])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_min_max_does_not_depend_on_the_size_of_pieces(
    case: Case, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for view in group_values(case.value(), case.base_name, case.args()):
        whole = min_max(view)
        with monkeypatch.context() as patch:
            patch.setattr(grouping, "CPU_CHUNK", limit)
            low, high = min_max(view)
            finite = min_max(view.finite())
        assert torch.equal(low, whole[0])
        assert torch.equal(high, whole[1])
        assert torch.equal(finite[0], low)
        assert torch.equal(finite[1], high)
        assert low.shape == high.shape == view.qparam_shape


# -- the recipe ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_grouping_is_made_of_a_shape_and_splits_what_has_it(case: Case) -> None:
    """Of importance that is expanded, without a copy, too."""
    recipe = Grouping.of(case.shape, case.base_name, case.args())
    importance = torch.rand(case.shape[-1:]).expand(case.shape)
    for groups, same in zip(
        recipe.split(importance), recipe.split(importance.contiguous()), strict=True
    ):
        assert torch.equal(groups.gathered(), same.gathered())
        assert groups.values.untyped_storage().data_ptr() == importance.untyped_storage().data_ptr()
    with pytest.raises(ValueError, match=r"value: expected shape \(.*\), got \(3, 5, 7\)"):
        recipe.split(torch.zeros(3, 5, 7))


@pytest.mark.parametrize("ordered", [True, False])
def test_join_puts_results_and_their_features_in_place(ordered: bool) -> None:
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=4)
    g_idx = None if ordered else torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 1])
    value = torch.arange(20.0).view(2, 10)
    recipe = Grouping.of(value.shape, "weight", args, g_idx)
    ends = [min_max(groups) for groups in recipe.split(value)]
    low, high = recipe.join(ends)
    (both,) = recipe.join([(torch.stack(pair, -1),) for pair in ends], (2,))
    assert torch.equal(both, torch.stack([low, high], -1))
    expected = [[3.0, 7.0, 9.0], [13.0, 17.0, 19.0]]
    if not ordered:
        expected = [[8.0, 9.0, 5.0], [18.0, 19.0, 15.0]]
    assert high.tolist() == expected


# -- scratch memory --------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators create and that are still alive."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {known.untyped_storage().data_ptr()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, Tensor):
                self.count(out.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        place = storage.data_ptr()
        if place in self.known or not storage.nbytes():
            return
        self.known.add(place)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, place, storage.nbytes())

    def forget(self, place: int, nbytes: int) -> None:
        self.known.discard(place)
        self.live -= nbytes


@contextmanager
def counted(known: Tensor) -> Iterator[LiveBytes]:
    gc.collect()
    with LiveBytes(known) as mode:
        yield mode


def test_the_counter_counts() -> None:
    value = torch.zeros(256, 1024)
    with counted(value) as mode:
        value.view(-1).sum()
        assert mode.peak <= 64
        copied = value + 1
        assert mode.peak >= value.nbytes
        del copied
        again = value * 2
        assert value.nbytes <= mode.live <= value.nbytes + 64
        assert mode.peak < 2 * value.nbytes
        del again
    assert mode.live <= 64


PIECE = 2**12
ROWS, COLS = 256, 1024
LAYOUTS = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 128},
    "group-ragged": {"strategy": "group", "group_size": 96},
    "block": {"strategy": "block", "block_structure": [32, 128]},
    "block-ragged": {"strategy": "block", "block_structure": [48, 96]},
}


def value_and_args(layout: str, dtype: torch.dtype) -> tuple[Tensor, QuantizationArgs]:
    value = torch.randn(ROWS, COLS, generator=torch.Generator().manual_seed(0)).to(dtype)
    return value, QuantizationArgs(num_bits=4, **LAYOUTS[layout])


def shuffled_groups(layout: str) -> Tensor:
    size = LAYOUTS[layout]["group_size"]
    columns = torch.arange(COLS) // size
    return columns[torch.randperm(COLS, generator=torch.Generator().manual_seed(1))]


@pytest.mark.parametrize("g_idx", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_min_max_makes_no_copy(
    layout: str, dtype: torch.dtype, g_idx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most two pieces (a gathered one and its reduction), the qparams, and g_idx itself."""
    if g_idx and "group_size" not in LAYOUTS[layout]:
        pytest.skip("no groups of columns")
    monkeypatch.setattr(grouping, "CPU_CHUNK", PIECE)
    value, args = value_and_args(layout, dtype)
    index = shuffled_groups(layout) if g_idx else None
    observer = Observer.load_from_registry("memoryless_minmax", args)
    with counted(value) as mode:
        scale, _ = observer(value, index)
    bound = 2 * PIECE * value.element_size() + 10 * scale.numel() * 4 + 8 * COLS * 8
    assert mode.peak <= bound < value.nbytes / 2


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("memoryless_mse", layout) for layout in LAYOUTS),
        ("imatrix_mse", "group-ragged"),
        ("memoryless_mse", "g_idx"),
    ],
)
def test_grid_search_works_in_bounded_memory(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most eight pieces in float32 (fake_quantize's own steps), and 16 times the qparams."""
    monkeypatch.setattr(grouping, "CPU_CHUNK", PIECE)
    index = shuffled_groups("group") if layout == "g_idx" else None
    value, args = value_and_args("group" if layout == "g_idx" else layout, torch.bfloat16)
    module = nn.Linear(COLS, ROWS, bias=False)
    observer = Observer.load_from_registry(name, "weight", args, module, grid=5)
    observer.attach(module)
    module(torch.ones(2, COLS))
    with counted(value) as mode:
        scale, _ = observer(value, index)
    bound = 8 * PIECE * 4 + 16 * scale.numel() * 4 + 8 * COLS * 8
    assert mode.peak <= bound < value.nbytes
