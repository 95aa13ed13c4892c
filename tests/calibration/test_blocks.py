"""Calibration block by block: the scales of a model run whole, and nothing left behind."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from compressed_tensors.offload import offload_module
from compressed_tensors.offload.cache import OffloadCache
from torch import nn

import architectures
from calibration.tiny_models import tiny_llama, token_batches
from calipers.calibration import calibrate
from calipers.calibration.lockstep import Lockstep, find_blocks
from calipers.errors import CalipersError


def padded_batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    batches = token_batches(count)
    for number, batch in enumerate(batches):
        counts = torch.tensor([[8], [8 - number]])
        batch["attention_mask"] = (torch.arange(8) < counts).long()
    return batches


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def expect_same(one: nn.Module, other: nn.Module) -> None:
    left, right = state_of(one), state_of(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


SCHEMES: dict[str, tuple[Any, ...]] = {
    "W4A16": ("W4A16", None, {}),
    "W4A16 hessian": ("W4A16", "optimal", {"observer_options": {"objective": "hessian"}}),
    "FP8 with a cache": ("FP8", "memoryless_minmax", {"kv_cache": "FP8"}),
    "NVFP4 histogram": ("NVFP4", None, {"activation_observer": "histogram"}),
    "moving averages": ("W8A8", "mse", {}),
    "no data": ("W4A16", "memoryless_minmax", {}),
    "shadows": ("W4A16", "optimal", {"shadow": ("static_minmax", "imatrix_mse"), "pick": "best"}),
}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("case", SCHEMES)
def test_scales_are_those_of_the_whole_model(kind: str, case: str) -> None:
    scheme, observer, options = SCHEMES[case]
    whole, blocks = (getattr(architectures, kind)().bfloat16() for _ in range(2))
    told = calibrate(whole, scheme, observer, padded_batches(), **options).to_dict()
    found = calibrate(blocks, scheme, observer, padded_batches(), memory="blocks", **options)
    expect_same(whole, blocks)
    assert {**found.to_dict(), "seconds": 0} == {**told, "seconds": 0}
    ids = token_batches(1, seed=9)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(whole(ids).logits, blocks(ids).logits)


@pytest.mark.parametrize("kind", ["gemma3_text", "mixtral", "bert", "vit", "t5", "qwen2_vl"])
def test_of_any_architecture_with_blocks(kind: str) -> None:
    whole, blocks = (getattr(architectures, kind)() for _ in range(2))
    batches = [architectures.example_inputs(whole, seed) for seed in range(3)]
    options = {"on_missing": "skip", "observer": "static_minmax"}
    calibrate(whole, "FP8", data=batches, **options)
    calibrate(blocks, "FP8", data=batches, memory="blocks", **options)
    expect_same(whole, blocks)


def test_blocks_after_quantized_ones_see_what_these_give() -> None:
    model, batches = tiny_llama(layers=3), padded_batches()
    calibrate(model, "W4A16", data=batches, memory="blocks", propagate=True)
    # by hand: one layer after the other, each by what the quantized ones before it give
    by_hand, plain = tiny_llama(layers=3), tiny_llama(layers=3)
    for number in range(3):
        others = [f"re:model.layers.{each}\\..*" for each in range(3) if each != number]
        calibrate(by_hand, "W4A16", data=batches, ignore=others)
    expect_same(by_hand, model)
    calibrate(plain, "W4A16", data=batches)
    first, last = "model.layers.0.mlp.up_proj", "model.layers.2.mlp.up_proj"
    scales = [
        {name: each.get_submodule(name).weight_scale for name in (first, last)}
        for each in (plain, model)
    ]
    assert torch.equal(scales[0][first], scales[1][first])
    assert not torch.equal(scales[0][last], scales[1][last])


class Watched(nn.Module):
    """Two blocks, one of which may do something at a call."""

    def __init__(
        self, at_call: Callable[[int], None] = lambda _: None, again: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
        self.at_call, self.again, self.calls = at_call, again, 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.blocks[0](hidden)
        self.calls += 1
        self.at_call(self.calls)
        hidden = self.blocks[1](hidden)
        return self.blocks[0](hidden) if self.again else hidden


def raising(kind: type[BaseException]) -> Callable[[int], None]:
    def at_call(call: int) -> None:
        if call == 2:
            raise kind("of a batch")

    return at_call


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_in_any_batch_goes_on_and_leaves_nothing(kind: type[BaseException]) -> None:
    model = Watched(raising(kind))
    before = state_of(copy.deepcopy(model))
    with pytest.raises(kind, match="of a batch"):
        calibrate(model, "FP8", data=[torch.randn(4, 8) for _ in range(3)], memory="blocks")
    assert state_of(model).keys() == before.keys()
    assert not any("forward" in vars(each) for each in model.modules())
    assert not any(hasattr(each, "quantization_scheme") for each in model.modules())
    calibrate(Watched(), "FP8", data=[torch.randn(4, 8)], memory="blocks")


def test_an_interrupt_inside_of_a_block_goes_on() -> None:
    model = Watched()
    model.blocks[1][0].register_forward_pre_hook(lambda *_: raising(KeyboardInterrupt)(2))
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, "FP8", data=[torch.randn(4, 8) for _ in range(3)], memory="blocks")


def test_a_block_that_is_called_again_is_named() -> None:
    with pytest.raises(CalipersError, match=r"blocks\.0: the model calls this block again"):
        calibrate(Watched(again=True), "FP8", data=[torch.randn(4, 8)], memory="blocks")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(CalipersError, match="no ModuleList of blocks"):
        calibrate(nn.Sequential(nn.Linear(8, 8)), "FP8", data=[torch.randn(2, 8)], memory="blocks")


def test_propagate_needs_blocks() -> None:
    with pytest.raises(CalipersError, match="propagate"):
        calibrate(tiny_llama(), "FP8", data=token_batches(), propagate=True)


def test_batches_may_pass_by_blocks() -> None:
    """Batches of text stand in front of the language part while those with images are run."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))
            self.text = nn.ModuleList(nn.Sequential(nn.Linear(8, 8)) for _ in range(2))

        def forward(self, hidden: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
            if image is not None:
                for block in self.vision:
                    image = block(image)
                hidden = hidden + image
            for block in self.text:
                hidden = block(hidden)
            return hidden

    torch.manual_seed(0)
    whole = Towers()
    blocks = copy.deepcopy(whole)
    batches = [{"hidden": torch.randn(4, 8)} for _ in range(4)]
    batches[1]["image"] = batches[3]["image"] = torch.randn(4, 8)
    calibrate(whole, "FP8", data=batches)
    calibrate(blocks, "FP8", data=batches, memory="blocks")
    expect_same(whole, blocks)


def test_each_block_of_an_offloaded_model_is_brought_in_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, blocks = tiny_llama(layers=2), tiny_llama(layers=2)
    for module in list(blocks.modules()):
        offload_module(module, torch.device("cpu"), torch.device("cpu"))
    cache: Any = type(blocks.model.layers[0].mlp.up_proj._parameters)
    assert issubclass(cache, OffloadCache)
    seen: list[int] = []
    onload = cache.onload

    def counting(self: Any, offloaded: torch.Tensor) -> torch.Tensor:
        seen.append(id(offloaded))
        return onload(self, offloaded)

    calibrate(whole, "FP8", data=token_batches(6))
    monkeypatch.setattr(cache, "onload", counting)
    calibrate(blocks, "FP8", data=token_batches(6), memory="blocks")
    layer = blocks.model.layers[1].mlp.up_proj._parameters
    # to run, to derive, and to write back: not once for each batch
    assert seen.count(id(layer.offloaded_values["weight"])) < 6
    monkeypatch.undo()
    expect_same(whole, blocks)


def test_blocks_are_members_of_lists_that_have_parts() -> None:
    assert list(find_blocks(tiny_llama(layers=2))) == ["model.layers.0", "model.layers.1"]
    assert list(find_blocks(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))) == []
    t5 = find_blocks(architectures.t5())
    assert all(name.startswith(("encoder.block.", "decoder.block.")) for name in t5)
    moe = find_blocks(architectures.qwen3_moe())
    assert all(name.count(".") == 2 for name in moe)


def test_one_thread_runs_at_a_time() -> None:
    running: list[int] = []
    most = 0

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            nonlocal most
            running.append(1)
            most = max(most, len(running))
            result: torch.Tensor = self.inner(hidden)
            running.pop()
            return result

    model = nn.ModuleList([Block(), Block()])
    lockstep = Lockstep(find_blocks(model))
    ends: list[int] = []

    def run(number: int) -> Callable[[], None]:
        def batch() -> None:
            hidden = torch.randn(1, 2)
            for block in model:
                hidden = block(hidden)
            ends.append(number)

        return batch

    with lockstep.gates():
        lockstep.start([run(number) for number in range(5)], nullcontext)
        while (block := lockstep.next_block()) is not None:
            lockstep.run(block, nullcontext, keep=True)
    assert ends == [0, 1, 2, 3, 4]
    assert most == 1


TEAMS = """
import os
import torch
from contextlib import nullcontext
from calipers.calibration.lockstep import Lockstep

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    def forward(self, x):
        x.square().sum()
        return self.layers[0](x)

torch.set_num_threads(4)
model, x = Model(), torch.ones(2**19, 4)
lockstep = Lockstep({"layers.0": model.layers[0]})
with lockstep.gates(), torch.no_grad():
    before = len(os.listdir("/proc/self/task"))
    lockstep.start([lambda: model(x)] * 3, lambda _: nullcontext())
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_of_waiting_batches_have_no_team() -> None:
    """More threads than cores make those of the team at work sleep between operations."""
    # in a process of its own, since threads of other tests would count
    done = subprocess.run([sys.executable, "-c", TEAMS], capture_output=True, text=True, check=True)
    assert int(done.stdout) == 3  # one a batch
