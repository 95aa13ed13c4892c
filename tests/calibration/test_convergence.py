"""Data that ends once scales have settled."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from calibration.tiny_models import tiny_llama, token_batches
from calipers.calibration import attach, calibrate
from calipers.errors import CalipersError

ONES = torch.ones(1, 4, 16)


def linear():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16))


def test_the_same_inputs_again_and_again_are_enough_after_two():
    batches = [ONES] * 50
    report = calibrate(linear(), "FP8", "memoryless_minmax", batches, until_stable=0.01)
    assert report.batches == 2
    found = report.stability
    assert (found.reached, found.batches, found.tokens, found.moved) == (True, 2, 8, 0)
    assert found.slowest == "0.input"


def test_a_scale_that_grows_is_waited_for():
    batches = [ONES * min(1 + number, 6) for number in range(40)]
    report = calibrate(linear(), "FP8", "memoryless_minmax", iter(batches), until_stable=0.01)
    # looked at after 1, 2, 4, 8 and 16; the last change comes with the sixth
    assert report.batches == 16
    assert report.stability.moved == 0


def weights(strategy):
    args = QuantizationArgs(num_bits=4, strategy=strategy)
    return QuantizationScheme(targets=["Linear"], weights=args)


def test_scales_of_weights_are_watched():
    other = ONES * torch.linspace(-3, 3, 16).exp()
    report = calibrate(linear(), weights("channel"), "optimal", [ONES, other], until_stable=1e-6)
    assert not report.stability.reached
    assert report.stability.slowest == "0.weight"
    assert report.stability.moved > 1e-6
    settled = calibrate(linear(), weights("channel"), "optimal", [ONES] * 9, until_stable=1e-6)
    assert settled.batches == 2


def test_weights_of_one_scale_are_watched_by_their_inputs():
    other = ONES * torch.arange(16.0)
    report = calibrate(linear(), weights("tensor"), "optimal", [ONES, other], until_stable=0.01)
    assert not report.stability.reached
    assert report.stability.moved > 0.01


def test_looking_changes_no_scale():
    for scheme in ("NVFP4A16", "W4A16"):
        plain, other = tiny_llama(), tiny_llama()
        batches = token_batches(8)
        report = calibrate(plain, scheme, "optimal", batches)
        looked = calibrate(other, scheme, "optimal", batches, until_stable=1e-9)
        assert looked.batches == 8
        for row in report.modules:
            one, two = (each.get_submodule(row.name).weight_scale for each in (plain, other))
            assert torch.equal(one, two)


def test_held_out_batches_settle_nothing():
    batches = [ONES, ONES, 2 * ONES, *[2 * ONES] * 30]
    report = calibrate(
        linear(), "FP8", "memoryless_minmax", batches, activation_shadow="mse", until_stable=0.01
    )
    assert report.batches > 3
    assert float(report.modules[0].activation_measures["input"].moved or 0) == 0


def test_scales_are_those_of_the_batches_that_were_run():
    model, other = tiny_llama(), tiny_llama()
    batches = token_batches(16)
    report = calibrate(model, "W4A16", "optimal", batches, until_stable=0.05)
    assert report.stability.reached
    assert report.batches < 16
    calibrate(other, "W4A16", "optimal", batches[: report.batches])
    for row in report.modules:
        one, two = (each.get_submodule(row.name).weight_scale for each in (model, other))
        assert torch.equal(one, two)


def test_without_it_nothing_is_told():
    assert calibrate(linear(), "FP8", "memoryless_minmax", [ONES]).stability is None


@pytest.mark.parametrize("limit", [0, 1, -0.1, True, "0.01"])
def test_what_is_no_share_is_refused(limit):
    with pytest.raises(CalipersError, match="until_stable: expected by what share"):
        calibrate(linear(), "FP8", "memoryless_minmax", [ONES], until_stable=limit)


def test_blocks_are_refused():
    with pytest.raises(CalipersError, match="needs memory='whole'"):
        calibrate(
            tiny_llama(), "W4A16", "optimal", token_batches(2), memory="blocks", until_stable=0.01
        )


def test_a_calibration_by_hand_takes_it_as_well():
    with attach(linear(), "FP8") as calibration:
        calibration.run([ONES] * 9, until_stable=0.01)
        assert calibration.batches == 2
