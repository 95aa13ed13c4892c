from __future__ import annotations

import pytest
import torch
from compressed_tensors.offload import (
    disable_onloading,
    offload_module,
    set_onload_device,
)
from compressed_tensors.offload.cache import CPUCache, DiskCache, OffloadCache
from torch import nn

from calibration.tiny_models import picture, tiny_llama, token_batches
from calipers.calibration import attach


def offloaded(model: nn.Module, where: str, directory) -> nn.Module:
    if where == "cpu":
        # What it returns differs between versions; the model is changed in place.
        set_onload_device(model, torch.device("cpu"))
        return model
    directory.mkdir()
    for module in model.modules():
        offload_module(module, torch.device("cpu"), "disk", offload_dir=str(directory))
    return model


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("preset", ["W4A16", "FP8", "NVFP4", "MXFP4"])
@pytest.mark.parametrize("observer", ["memoryless_minmax", "imatrix_mse"])
def test_offloaded_models_get_the_same_scales(tmp_path, where, preset, observer):
    batches = token_batches()
    model = offloaded(tiny_llama(), where, tmp_path / "weights")
    plain = tiny_llama()
    reports = []
    for each in (model, plain):
        with attach(each, preset, observer=observer) as calibration:
            calibration.run(batches)
            reports.append(calibration.freeze())
    assert reports[0].modules == reports[1].modules
    expected = dict(plain.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name].float(), value.float()), name
    cache = {"cpu": CPUCache, "disk": DiskCache}[where]
    module = model.model.layers[0].self_attn.q_proj
    assert type(module._parameters) is cache
    with disable_onloading():
        place = {"cpu": "cpu", "disk": "meta"}[where]
        assert module.weight_scale.device.type == place
    with torch.no_grad():
        assert torch.equal(model(**batches[0]).logits, plain(**batches[0]).logits)


class Stopped(Exception):
    pass


def stop(stage: str, done: int, total: int | None) -> None:
    if (stage, done) == ("weights", 4):
        raise Stopped


def test_an_offloaded_model_is_put_back_where_freezing_fails(tmp_path):
    model = offloaded(tiny_llama(), "cpu", tmp_path)
    before = picture(model)
    calibration = attach(model, "NVFP4A16", observer="memoryless_minmax")
    with pytest.raises(Stopped):
        calibration.freeze(progress=stop)
    calibration.detach()
    assert picture(model) == before
    with torch.no_grad():
        plain = tiny_llama()(**token_batches(1)[0]).logits
        assert torch.equal(model(**token_batches(1)[0]).logits, plain)


def test_detaching_an_offloaded_model_leaves_no_trace(tmp_path):
    model = offloaded(tiny_llama(), "cpu", tmp_path)
    before = picture(model)
    with attach(model, "FP8") as calibration:
        calibration.run(token_batches(1))
    assert picture(model) == before
    assert isinstance(model.lm_head._parameters, OffloadCache)
