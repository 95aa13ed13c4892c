"""Every preset on the demo model: calibrate, save, load with transformers, the same logits."""

import copy
import warnings

import pytest
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as PRESETS
from transformers import AutoModelForCausalLM, AutoTokenizer

import calipers
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_PATH
from calipers.text import read_batches

#: The presets that quantize nothing; there is no quantized checkpoint to write.
NOTHING = {"UNQUANTIZED"}


@pytest.fixture(scope="module")
def demo():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype="auto").eval()


@pytest.fixture(scope="module")
def batches():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    data = read_batches(CALIBRATION_TEXT, tokenizer, sequence_length=64, samples=8)
    judged = read_batches(HELDOUT_TEXT, tokenizer, sequence_length=64, samples=2)
    return [{"input_ids": ids} for ids in data], judged[0]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - NOTHING))
def test_a_saved_preset_gives_the_logits_of_the_model_in_memory(preset, demo, batches, tmp_path):
    data, ids = batches
    model = copy.deepcopy(demo)
    plain = demo(input_ids=ids).logits
    report = calipers.calibrate(model, preset, "memoryless_minmax", data)
    assert len(report.modules) == 21
    expected = model(input_ids=ids).logits
    assert not torch.equal(expected, plain), "the model in memory must run quantized"

    path = calipers.save(model, tmp_path / preset)
    with warnings.catch_warnings():
        # raised while transformers loads some formats, whoever wrote them
        warnings.simplefilter("ignore")
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    logits = loaded(input_ids=ids).logits

    spread = float(expected.float().max() - expected.float().min())
    assert float((logits.float() - expected.float()).abs().max()) <= 1e-3 * spread


def test_the_preset_without_quantization_leaves_the_model_alone(demo, batches):
    data, ids = batches
    model = copy.deepcopy(demo)
    report = calipers.calibrate(model, "UNQUANTIZED", data=data)
    assert report.modules == []
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, demo(input_ids=ids).logits)
    with pytest.raises(calipers.CheckpointError, match="no quantized module"):
        calipers.save(model, "unused")
