"""`calipers.evaluation`: perplexity and output error, each with its uncertainty."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calipers.evaluation import (
    Difference,
    Perplexity,
    collect_outputs,
    evaluate_losses,
    output_error,
    paired_difference,
    perplexity,
)

VOCABULARY = 11


class Bigrams(nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=generator))
        self.modes: list[bool] = []

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        self.modes.append(self.training)
        return SimpleNamespace(logits=self.table[input_ids])


class Encoder(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(1.0, 1.0 + VOCABULARY).to(dtype)[:, None])

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table[input_ids].expand(-1, -1, 4))


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def losses_by_hand(model: Bigrams, sequence: Tensor) -> float:
    chances = model.table.detach().double().softmax(-1)
    pairs = zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True)
    return -sum(math.log(chances[last, token]) for last, token in pairs)


# -- losses ----------------------------------------------------------------------------------


def test_losses_are_sums_over_all_tokens_but_the_first() -> None:
    model, ids = Bigrams(), draw(5, 7)
    found = evaluate_losses(model, [ids[:2], ids[2:]])
    assert found.tokens == (6,) * 5
    assert found.losses == pytest.approx([losses_by_hand(model, each) for each in ids], rel=1e-6)
    assert found.value == pytest.approx(math.exp(sum(found.losses) / 30), rel=1e-12)
    assert perplexity(model, [ids[:2], ids[2:]]) == found.value


def test_how_sequences_are_batched_plays_no_part() -> None:
    model, ids = Bigrams(), draw(6, 9)
    assert evaluate_losses(model, [ids]) == evaluate_losses(model, list(ids[:, None]))


def test_sequences_of_different_lengths_weigh_by_their_tokens() -> None:
    model, long, short = Bigrams(), draw(1, 40), draw(1, 3)
    found = evaluate_losses(model, [long, short, draw(2, 1)])
    assert found.tokens == (39, 2)
    assert found.mean_loss == pytest.approx(sum(found.losses) / 41, rel=1e-12)


def test_the_mode_of_the_model_comes_back() -> None:
    model = Bigrams().train()
    with pytest.raises(ValueError, match="at least two tokens, got none"):
        evaluate_losses(model, [draw(2, 1)])
    evaluate_losses(model, [draw(2, 3)])
    assert model.modes == [False]
    assert model.training


def test_progress_counts_batches() -> None:
    seen: list[tuple[str, int, int | None]] = []
    evaluate_losses(Bigrams(), [draw(1, 3)] * 2, lambda *args: seen.append(args))
    assert seen == [("perplexity", 1, 2), ("perplexity", 2, 2)]


# -- standard errors -------------------------------------------------------------------------


def test_error_of_equal_lengths_is_that_of_a_mean() -> None:
    losses = torch.tensor([3.0, 5.0, 4.0, 8.0], dtype=torch.float64)
    found = Perplexity(tuple(losses.tolist()), (2,) * 4)
    expected = float((losses / 2).std() / math.sqrt(4))
    assert found.mean_loss_error == pytest.approx(expected, rel=1e-12)
    assert found.standard_error == pytest.approx(found.value * expected, rel=1e-12)


def _sequences(n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    counts = torch.randint(20, 60, (n,), generator=generator)
    hardness = 3 + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
    extra = 0.02 + 0.03 * torch.randn(n, generator=generator, dtype=torch.float64)
    return counts, hardness * counts, (hardness + extra) * counts


def test_errors_agree_with_the_bootstrap() -> None:
    counts, before, after = _sequences(300)
    one = Perplexity(tuple(before.tolist()), tuple(counts.tolist()))
    other = Perplexity(tuple(after.tolist()), tuple(counts.tolist()))
    generator = torch.Generator().manual_seed(3)
    picked = torch.randint(300, (4000, 300), generator=generator)
    tokens = counts[picked].sum(1)
    values = (before[picked].sum(1) / tokens).exp()
    ratios = (after[picked].sum(1) / tokens).exp() / values - 1
    # 4000 draws give a deviation to 1/sqrt(8000), some 1%; the delta method adds as much.
    assert one.standard_error == pytest.approx(float(values.std()), rel=0.05)
    change = paired_difference(one, other)
    assert change.relative_error == pytest.approx(float(ratios.std()), rel=0.05)
    assert change.relative == pytest.approx(other.value / one.value - 1, rel=1e-9)
    # What both sequences share has gone: unpaired it would be more than ten times as much.
    assert change.relative_error is not None
    assert one.standard_error is not None
    assert change.relative_error < 0.1 * one.standard_error / one.value


def test_one_sequence_has_no_error() -> None:
    one = Perplexity((4.0,), (2,))
    assert one.standard_error is None
    change = paired_difference(one, Perplexity((4.2,), (2,)))
    assert change == Difference(pytest.approx(0.1), None)
    assert change.relative_error is None


def test_results_over_other_sequences_are_no_pair() -> None:
    one = Perplexity((4.0, 5.0), (2, 3))
    with pytest.raises(ValueError, match="2 sequences of 5 tokens and 2 of 4"):
        paired_difference(one, Perplexity((4.0, 5.0), (2, 2)))


@pytest.mark.parametrize(("losses", "tokens"), [((), ()), ((1.0,), (1, 2)), ((1.0,), (0,))])
def test_a_result_needs_losses_and_tokens(
    losses: tuple[float, ...], tokens: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="as many losses as counts"):
        Perplexity(losses, tokens)


@pytest.mark.parametrize("broken", [math.nan, math.inf, 1e300])
def test_a_broken_model_has_a_result(broken: float) -> None:
    fine, found = Perplexity((1.0, 2.0), (2, 2)), Perplexity((1.0, broken), (2, 2))
    assert not math.isfinite(found.value)
    change = paired_difference(fine, found)
    assert not math.isfinite(change.relative)
    assert change.relative_error is not None


# -- outputs of models without a head --------------------------------------------------------


def test_output_error_is_a_mean_over_tokens() -> None:
    wanted = [torch.ones(2, 3), 2 * torch.ones(1, 3)]
    got = [torch.tensor([[1.1] * 3, [1.0] * 3]), torch.tensor([[1.0] * 3])]
    found = output_error(wanted, got)
    assert found.value == pytest.approx((0.1 + 0 + 0.5) / 3, rel=1e-6)
    assert (found.sequences, found.tokens) == (2, 3)
    # (s - mean c) of the two sequences is 0.1 - 2/5 and 0.5 - 1/5.
    assert found.standard_error == pytest.approx(math.sqrt(2 * 2 * 0.3**2) / 3, rel=1e-6)


def test_output_error_of_zeros_and_nan() -> None:
    zeros = torch.zeros(2, 3)
    assert output_error([zeros], [zeros]).value == 0
    assert output_error([zeros], [zeros + 1]).value == math.inf
    assert math.isnan(output_error([zeros + 1], [zeros + math.nan]).value)


@pytest.mark.parametrize(
    ("wanted", "got"),
    [([], []), ([torch.ones(2, 3)], []), ([torch.ones(2, 3)], [torch.ones(3, 3)])],
)
def test_outputs_of_other_sequences_are_refused(wanted: list[Tensor], got: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="outputs for the same sequences"):
        output_error(wanted, got)


def test_outputs_are_kept_by_sequence_on_the_cpu() -> None:
    model, ids = Encoder(torch.bfloat16), draw(3, 5)
    found = collect_outputs(model, [ids[:2], ids[2:]])
    assert [each.shape for each in found] == [(5, 4)] * 3
    assert {(each.dtype, each.device.type) for each in found} == {(torch.float32, "cpu")}
    expected = ids[1][:, None].expand(-1, 4) + 1
    assert torch.equal(found[1], expected.float())
    with torch.no_grad():
        model.table.mul_(3)
    assert torch.equal(found[1], expected.float())


@pytest.mark.parametrize(
    ("max_tokens", "kept"), [(1, 1), (5, 1), (14, 2), (15, 3), (19, 3), (20, 4), (100, 4)]
)
def test_outputs_are_capped_in_whole_sequences(max_tokens: int, kept: int) -> None:
    ids = draw(4, 5)
    found = collect_outputs(Encoder(), [ids[:3], ids[3:]], max_tokens=max_tokens)
    assert len(found) == kept


def test_a_model_without_hidden_states_is_refused() -> None:
    class Scores(Encoder):
        def forward(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(scores=self.table[input_ids])

    with pytest.raises(ValueError, match="Scores: expected an output with last_hidden_state"):
        collect_outputs(Scores(), [draw(2, 3)])
    with pytest.raises(ValueError, match="got none"):
        collect_outputs(Encoder(), [])
