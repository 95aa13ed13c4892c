"""A batch counts wholly or not at all, and threads lose nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from calibration.test_masked_batches import Layered, assert_equal, batch, held
from calipers.calibration import attach
from calipers.calibration.session import Calibration

SCHEME = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(num_bits=8, strategy="channel"),
    input_activations=QuantizationArgs(num_bits=8),
    output_activations=QuantizationArgs(num_bits=8),
)
CHOICES: list[dict[str, Any]] = [
    {"observer": "imatrix_mse", "activation_observer": "static_minmax"},
    {"observer": "imatrix_mse", "activation_observer": "minmax"},
    {"observer": "optimal", "activation_observer": "histogram"},
    {
        "observer": "optimal",
        "observer_options": {"objective": "hessian"},
        "activation_observer": "mse",
    },
]
choices = pytest.mark.parametrize(
    "choice", CHOICES, ids=["static", "minmax", "histogram", "hessian"]
)


def values(seed: int) -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed))


@choices
def test_a_failing_batch_does_not_count_and_a_retry_counts_once(choice: dict[str, Any]) -> None:
    model = Layered()
    with attach(model, SCHEME, **choice) as calibration:
        calibration.run([values(0)])
        before = held(calibration)
        model.fail = True
        with pytest.raises(RuntimeError, match="half way"):
            calibration.run([values(1)])
        with pytest.raises(RuntimeError, match="half way"):
            calibration.run([batch()])
        assert_equal(held(calibration), before)
        assert calibration.batches == 1
        model.fail = False
        calibration.run([values(1)])
        found = held(calibration)
        report = calibration.freeze()
        assert report.batches == 2
        assert report.tokens_given == 0
        assert report.unmasked == []
    with attach(Layered(), SCHEME, **choice) as calibration:
        calibration.run([values(0), values(1)])
        assert_equal(found, held(calibration))


@choices
def test_a_batch_that_an_observer_refuses_does_not_count(choice: dict[str, Any]) -> None:
    model = Layered()
    with attach(model, SCHEME, **choice) as calibration:
        calibration.run([values(0)])
        before = held(calibration)
        nothing = values(1)
        nothing[0, 1:4] = torch.nan  # all that the routed layer sees
        with pytest.raises(ValueError, match="routed"):
            calibration.run([nothing])
        assert_equal(held(calibration), before)


def test_an_interrupt_takes_the_batch_back() -> None:
    model = Layered()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with attach(model, SCHEME) as calibration:
        calibration.run([values(0)])
        before = held(calibration)
        handle = model.routed.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            calibration.run([values(1)])
        handle.remove()
        assert_equal(held(calibration), before)


@pytest.mark.parametrize("choice", [CHOICES[0], CHOICES[2]], ids=["static", "histogram"])
def test_threads_lose_nothing(choice: dict[str, Any]) -> None:
    batches = [values(seed) for seed in range(40)]
    with attach(Layered(), SCHEME, **choice) as calibration:
        calibration.run(batches)
        expected = held(calibration)
    model = Layered().train()
    with attach(model, SCHEME, **choice) as calibration:
        threads = [
            threading.Thread(
                target=lambda part: [calibration.run([each]) for each in part],
                args=(batches[index::4],),
            )
            for index in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calibration.batches == 40
        assert_equal(held(calibration), expected, rtol=1e-12)
        assert all(module.training for module in model.modules() if "Linear" in str(type(module)))


def test_calls_of_the_model_itself_from_threads_lose_no_tokens() -> None:
    with attach(Layered(), SCHEME, activation_observer="histogram") as calibration:
        model = calibration.model
        x = values(0)
        threads = [threading.Thread(target=lambda: [model(x) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calibration.observed[0].tokens == 800
        assert int(model.inner.input_observer.counts.sum()) == 80 * x.numel()


def test_freezing_waits_for_a_run() -> None:
    started, go_on = threading.Event(), threading.Event()

    def batches(calibration: Calibration) -> Any:
        yield values(0)
        started.set()
        go_on.wait(timeout=60)
        yield values(1)

    with attach(Layered(), SCHEME) as calibration:
        run = threading.Thread(target=lambda: calibration.run(batches(calibration)))
        run.start()
        started.wait(timeout=60)
        reports: list[Any] = []
        freeze = threading.Thread(target=lambda: reports.append(calibration.freeze()))
        freeze.start()
        freeze.join(timeout=0.2)
        assert freeze.is_alive()
        go_on.set()
        run.join(timeout=60)
        freeze.join(timeout=60)
        assert reports[0].batches == 2
