"""Modules that multiply by a matrix and are no Linear: named with their share, never silent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from architectures import tiny
from calipers.calibration import calibrate
from calipers.calibration.summaries import summarize_left_alone
from calipers.errors import SchemeError, UnknownModuleError

ONLY = "compressed-tensors quantizes Linear and Embedding only"


class Mixed(nn.Module):
    """A quarter of the weights each: Linear, Conv1D, in_proj_weight and out_proj, raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 96)
        self.conv = Conv1D(128, 32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.raw = nn.ParameterDict({"proj": torch.randn(32, 128)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x, x, x)[0] + self.first(x)
        return self.second(x).sum() + self.conv(x).sum() + (x @ self.raw["proj"]).sum()


def gpt2(**more: Any) -> Any:
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 128}
    special = {"bos_token_id": 1, "eos_token_id": 2}
    return tiny("GPT2LMHeadModel", "GPT2Config", **sizes, **special, **more)


def scheme(*targets: str) -> QuantizationScheme:
    args = QuantizationArgs(num_bits=8, strategy="channel")
    return QuantizationScheme(targets=list(targets), weights=args)


def test_they_are_named_with_their_shares() -> None:
    report = calibrate(Mixed(), "W8A8", "memoryless_minmax", [torch.randn(1, 4, 32)])
    assert report.quantized_share == 0.25
    found = {each.name: (each.kind, each.reason, each.share) for each in report.left_alone}
    assert found == {
        "conv": ("Conv1D", "not a Linear", 0.25),
        "attn": ("MultiheadAttention", "not a Linear", 0.1875),
        "attn.out_proj": ("NonDynamicallyQuantizableLinear", "never called", 0.0625),
        "raw": ("ParameterDict", "not a Linear", 0.25),
    }
    told = "only Linear and Embedding can be quantized"
    assert summarize_left_alone(report.left_alone) == [
        f"conv: Conv1D: {told} (25.0%)",
        f"attn: MultiheadAttention: {told} (18.8%)",
        "attn.out_proj: never called (6.2%)",
        f"raw: ParameterDict: {told} (25.0%)",
    ]
    assert f"conv: Conv1D: {told} (25.0%)" in str(report)
    with pytest.raises(UnknownModuleError, match=rf"left alone \(Conv1D: {told}\)"):
        report["conv"]
    assert sum(each["share"] for each in report.to_dict()["left_alone"]) == 0.75


def test_shares_and_what_was_quantized_make_the_whole() -> None:
    model = Mixed()
    calibrate(model, scheme("first"), "memoryless_minmax")
    report = calibrate(model, scheme("second"), "memoryless_minmax")
    shares = {each.name: each.share for each in report.left_alone}
    assert shares["first"] == 0  # quantized before
    assert report.quantized_share + sum(shares.values()) == 1


@pytest.mark.parametrize(
    ("model", "target", "name"),
    [
        (gpt2, "Conv1D", "Conv1D"),
        (gpt2, "transformer.h.0.attn.c_attn", "Conv1D"),
        (gpt2, r"re:.*\.c_(attn|proj|fc)$", "Conv1D"),
        (Mixed, "MultiheadAttention", "MultiheadAttention"),
        (Mixed, "attn", "MultiheadAttention"),
        (Mixed, "raw", "ParameterDict"),
        (Mixed, "re:.*", "ParameterDict"),
    ],
)
def test_targets_that_name_them_are_refused(model: Any, target: str, name: str) -> None:
    with pytest.raises(SchemeError, match=f"{name} cannot be quantized: {ONLY}"):
        calibrate(model(), scheme(target), "memoryless_minmax")


def test_a_model_of_nothing_else_is_refused_with_the_share() -> None:
    told = f"100% of the weights that stay are in 8 Conv1D: {ONLY}"
    with pytest.raises(SchemeError, match=told):
        calibrate(gpt2(), "W8A8", "memoryless_minmax")


def test_the_library_passes_over_a_conv1d_without_a_word() -> None:
    """Why they are refused: were this to fail, Conv1D could be quantized."""
    model = gpt2()
    config = QuantizationConfig(config_groups={"group_0": scheme("Conv1D")})
    apply_quantization_config(model, config)
    module = model.transformer.h[0].attn.c_attn
    assert not hasattr(module, "quantization_scheme")
    assert set(module.state_dict()) == {"weight", "bias"}
    compressor = ModelCompressor.from_pretrained_model(model)
    if compressor is not None:
        compressor.compress_model(model)
    assert module.weight.dtype == torch.float32
