"""`scheme_options`: a scheme with other arguments of its weights."""

from __future__ import annotations

import pytest
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from torch import nn

from calipers import SchemeError, calibrate
from calipers.calibration import attach, resolve_config


def weights_of(config: QuantizationConfig) -> list[QuantizationArgs]:
    return [group.weights for group in config.config_groups.values()]


def test_the_group_size_of_a_preset():
    [plain] = weights_of(resolve_config("W4A16"))
    [changed] = weights_of(resolve_config("W4A16", scheme_options={"group_size": 64}))
    assert changed == plain.model_copy(update={"group_size": 64})


def test_other_arguments():
    options = {"symmetric": False, "strategy": "channel", "group_size": None}
    [changed] = weights_of(resolve_config("W4A16", scheme_options=options))
    assert (changed.symmetric, changed.strategy, changed.group_size) == (False, "channel", None)


def test_the_given_scheme_is_not_changed():
    given = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=4, group_size=32)
    )
    resolve_config(given, scheme_options={"group_size": 16})
    assert given.weights.group_size == 32


def test_a_group_size_concerns_weights_in_groups_alone():
    groups = {
        "whole": QuantizationScheme(
            targets=["a"], weights=QuantizationArgs(num_bits=8, strategy="channel")
        ),
        "nvfp4": resolve_config("NVFP4").config_groups["group_0"],
        "inputs": QuantizationScheme(
            targets=["b"],
            input_activations=QuantizationArgs(num_bits=8, strategy="token", dynamic=True),
        ),
        "grouped": QuantizationScheme(
            targets=["c"], weights=QuantizationArgs(num_bits=4, group_size=32)
        ),
    }
    config = QuantizationConfig(config_groups=groups)
    changed = resolve_config(config, scheme_options={"group_size": 64})
    sizes = [args and args.group_size for args in weights_of(changed)]
    assert sizes == [None, 16, None, 64]


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("W4A16", {"grop_size": 64}, r"unknown argument 'grop_size'. Did you mean 'group_size'\?"),
        ("W4A16", {"zzz": 64}, r"unknown argument 'zzz'. Arguments of weights: num_bits, type"),
        ("W4A16", {"group_size": "64"}, r"expected a whole number of columns from 1, got '64'"),
        ("W4A16", {"group_size": 0}, r"expected a whole number of columns from 1, got 0"),
        ("W4A16", {"group_size": True}, r"expected a whole number of columns from 1, got True"),
        ("W4A16", {"num_bits": "four"}, r"scheme_options: num_bits: .*valid integer"),
        ("W4A16", {"strategy": "channel"}, r"scheme_options: .*group_size requires strategy"),
        ("W4A16", {"strategy": "token"}, r"scheme_options: .*static token"),
        ("W4A16", ["group_size"], r"scheme_options must be a mapping .* got list"),
        ("W8A8", {"group_size": 64}, r"no weights in groups .* its weights: int8 channel"),
        ("NVFP4", {"group_size": 64}, r"no weights in groups .* its weights: float4 tensor_group"),
        ("MXFP4", {"group_size": 64}, r"no weights in groups .* its weights: float4 group 32"),
        ("UNQUANTIZED", {"num_bits": 8}, r"the scheme quantizes no weights"),
    ],
)
def test_options_that_cannot_be(scheme, options, message):
    with pytest.raises(SchemeError, match=message):
        resolve_config(scheme, scheme_options=options)


def test_calibrate_and_attach_take_them():
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(192, 8, bias=False))

    with pytest.raises(SchemeError, match="--group-size 64"):
        calibrate(model())
    calibrated, attached = model(), model()
    calibrate(calibrated, scheme_options={"group_size": 64})
    assert calibrated[0].weight_scale.shape == (8, 3)
    with attach(attached, "W4A16", scheme_options={"group_size": 32}) as calibration:
        calibration.freeze()
    assert attached[0].weight_scale.shape == (8, 6)
