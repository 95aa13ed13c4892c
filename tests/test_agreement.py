"""KL divergence and top-1 agreement of logits, and the bootstrap of a change of the perplexity."""

from __future__ import annotations

import pytest
import torch

from calipers.agreement import ReferenceLogits
from calipers.evaluation import Perplexity, bootstrap_interval, paired_difference


def logits(sequences=3, tokens=7, words=11, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, words, generator=generator) * spread for _ in range(sequences)]


def agreement(reference, others, **options):
    kept = ReferenceLogits(len(reference), **options)
    for number, each in enumerate(reference):
        kept.keep(number, each)
    for number, each in enumerate(others):
        kept.compare(number, each)
    return kept.agreement()


def test_the_divergence_is_that_of_torch():
    one, two = logits(), logits(seed=1)
    found = agreement(one, two)
    p, q = torch.cat(one).log_softmax(-1), torch.cat(two).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert found.kl == pytest.approx(float(wanted), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
    assert (found.sequences, found.tokens) == (3, 21)
    assert found.kl_error > 0


def test_a_model_agrees_with_itself():
    found = agreement(logits(), logits())
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1 == 1
    assert agreement(logits(1), logits(1)).kl_error is None


def test_impossible_words_add_nothing():
    one = [torch.tensor([[0.0, 0.0, -torch.inf]])]
    two = [torch.tensor([[0.0, 0.0, -torch.inf]])]
    assert agreement(one, two).kl == 0


def test_few_bytes_keep_tokens_of_every_sequence():
    one, two = logits(tokens=100), logits(tokens=100, seed=1)
    found = agreement(one, two, max_bytes=3 * 10 * 11 * 4)
    assert (found.sequences, found.tokens) == (3, 30)
    places = torch.arange(10) * 10
    some = agreement([each[places] for each in one], [each[places] for each in two])
    assert found.kl == pytest.approx(some.kl)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"11 words\) as of the reference, got \(7, 12\)"):
        agreement(logits(), logits(words=12))
    with pytest.raises(ValueError, match="saw no sequence 3"):
        agreement(logits(), logits(sequences=4))


def test_the_bootstrap_agrees_with_the_delta_method():
    generator = torch.Generator().manual_seed(0)
    losses = (torch.rand(200, generator=generator) * 10 + 20).tolist()
    noise = (torch.randn(200, generator=generator) * 0.2 + 0.1).tolist()
    before = Perplexity(tuple(losses), (10,) * 200)
    after = Perplexity(tuple(a + b for a, b in zip(losses, noise, strict=True)), (10,) * 200)
    change = paired_difference(before, after)
    low, high = bootstrap_interval(before, after)
    assert low < change.relative < high
    assert (high - low) / 2 / 1.96 == pytest.approx(change.relative_error, rel=0.1)
    assert bootstrap_interval(before, after) == (low, high)


def test_one_sequence_has_no_interval():
    one = Perplexity((4.0,), (2,))
    assert bootstrap_interval(one, one) is None
    with pytest.raises(ValueError, match="same sequences"):
        bootstrap_interval(one, Perplexity((4.0,), (3,)))
