"""Two passes merged are one pass over all the data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from architectures import qwen3_moe
from calibration.tiny_models import tiny_llama, tiny_moe, token_batches
from calipers import Statistics, StatisticsError, observe
from calipers.statistics_files.kinds import unpack


def ids(count: int, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (1, 9), generator=generator)} for _ in range(count)]


def assert_alike(found: Statistics, expected: Statistics, sums: float) -> None:
    """Equal but for sums, which differ by so much at most, relatively."""
    assert found.modules == expected.modules
    assert found.states.keys() == expected.states.keys()
    for key, kinds in expected.states.items():
        for kind, packed in kinds.items():
            state, own = unpack(packed), unpack(found.states[key][kind])
            assert own.keys() == state.keys(), key
            for entry, value in state.items():
                assert own[entry].dtype == value.dtype
                if kind == "moments" and value.dtype == torch.float64:
                    largest = value.abs().max()
                    assert (own[entry] - value).abs().max() <= sums * largest, (key, entry)
                else:
                    assert torch.equal(own[entry], value), (key, kind, entry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", [[1, 4], [2, 2, 1], [5, 0], [0, 5]])
def test_any_split(dtype: torch.dtype, split: list[int]) -> None:
    options: dict[str, Any] = {"histograms": True, "kv": True, "products": 32, "outputs": True}
    batches = ids(5)
    expected = observe(tiny_llama().to(dtype), batches, **options)
    parts = []
    for count in split:
        part, batches = batches[:count], batches[count:]
        parts.append(observe(tiny_llama().to(dtype), part, **options))
    merged = parts[0].merge(*parts[1:])
    assert_alike(merged, expected, sums=1e-15)
    assert [each.batches for each in merged.manifest.data] == split
    assert merged.manifest.batches == 5


def test_both_orders_give_the_same_extremes_and_counts() -> None:
    one, other = (observe(tiny_llama(), ids(2, seed), histograms=True) for seed in (1, 2))
    assert_alike(one.merge(other), other.merge(one), sums=1e-15)


def test_a_merge_is_not_one_of_its_parts() -> None:
    one, other = (observe(tiny_llama(), ids(2, seed)) for seed in (1, 2))
    with pytest.raises(AssertionError):
        assert_alike(one.merge(other), one, sums=1e-3)


def test_experts_that_only_one_pass_reaches() -> None:
    data = [torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    one, other = observe(tiny_moe((0,)), data[:1]), observe(tiny_moe((0, 1)), data[1:])
    merged = one.merge(other)
    second = "layers.0.experts.1.up_proj.weight"
    assert not int(one.states[second]["moments"]["num_input_tokens"])
    expected = other.states[second]["moments"]["input_square_sum"]
    assert torch.equal(merged.states[second]["moments"]["input_square_sum"], expected)
    assert int(merged.states[second]["moments"]["num_input_tokens"]) == 10


def test_what_does_not_belong_together() -> None:
    one = observe(tiny_llama(), ids(2), name="text")
    with pytest.raises(StatisticsError, match=r"hold the same data \(text\): it would count twice"):
        one.merge(one)
    with pytest.raises(StatisticsError, match="of different models: its weights"):
        one.merge(observe(tiny_llama(seed=1), ids(2, 4)))
    with pytest.raises(StatisticsError, match="of different models: LlamaForCausalLM there"):
        one.merge(observe(qwen3_moe(), ids(1)))
    with pytest.raises(StatisticsError, match="hold different statistics: Options"):
        one.merge(observe(tiny_llama(), ids(2, 4), histograms=True))
    with pytest.raises(StatisticsError, match=r"of different modules: model\.layers\.0\.mlp\.up"):
        one.merge(observe(tiny_llama(), ids(2, 4), ignore="re:.*up_proj"))


def test_passes_without_data_are_not_the_same_data() -> None:
    empty = observe(tiny_llama(), [])
    merged = empty.merge(observe(tiny_llama(), []), observe(tiny_llama(), token_batches()))
    assert merged.manifest.batches == 2
