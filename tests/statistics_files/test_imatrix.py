"""imatrix files of llama.cpp: read, written, and named as transformers names them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import gemma3_text, llama, mistral, mixtral, qwen3, qwen3_moe
from calibration.tiny_models import tiny_moe
from calipers import Statistics, StatisticsError, calibrate, observe
from calipers.observing import statistics_from_imatrix
from calipers.statistics_files import write_imatrix
from calipers.statistics_files.imatrix import _Names

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")


def ids(count: int = 2, seed: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(0, 128, (1, 33), generator=generator)} for _ in range(count)
    ]


def written_by_llama_cpp(path: Path, sums: dict[str, Any], counts: dict[str, Any]) -> Path:
    """A file as `llama-imatrix` writes it: ggml drops dimensions of 1 behind the first."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["wiki.train.raw"])
    writer.add_uint32("imatrix.chunk_count", 3)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in sorted(sums):
        rows, numbers = (np.array(each, dtype=np.float32) for each in (sums[name], counts[name]))
        one = len(numbers) == 1
        writer.add_tensor(f"{name}.in_sum2", rows.reshape(-1) if one else rows)
        writer.add_tensor(f"{name}.counts", numbers if one else numbers.reshape(-1, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def moments(found: Statistics, module: str) -> dict[str, torch.Tensor]:
    return found.states[f"{module}.weight"]["moments"]


def test_a_file_of_llama_cpp(tmp_path: Path) -> None:
    rows = np.arange(1, 129, dtype=np.float32).reshape(1, 128) / 7
    path = written_by_llama_cpp(
        tmp_path / "imatrix.gguf",
        {"blk.0.attn_q.weight": rows, "blk.1.attn_output.weight": rows * 2},
        {"blk.0.attn_q.weight": [1536], "blk.1.attn_output.weight": [1500]},
    )
    found = statistics_from_imatrix(path, llama())
    own = moments(found, "model.layers.0.self_attn.q_proj")
    assert torch.equal(own["input_square_sum"], torch.from_numpy(rows[0]).double())
    assert int(own["num_input_tokens"]) == 1536
    other = moments(found, "model.layers.1.self_attn.o_proj")
    assert torch.equal(other["input_square_sum"], torch.from_numpy(rows[0] * 2).double())
    assert found.modules["model.layers.1.self_attn.o_proj"].tokens == 1500
    assert found.modules["model.layers.1.self_attn.q_proj"].tokens == 0
    (data,) = found.manifest.data
    assert (data.name, data.batches, data.tokens_given) == ("wiki.train.raw", 3, 1536)


def test_experts_are_matrices_of_one_tensor(tmp_path: Path) -> None:
    model = qwen3_moe()
    experts = model.config.num_experts
    rows = np.arange(experts * 128, dtype=np.float32).reshape(experts, 128) + 1
    numbers = list(range(experts))
    path = written_by_llama_cpp(
        tmp_path / "imatrix.gguf",
        {"blk.1.ffn_up_exps.weight": rows},
        {"blk.1.ffn_up_exps.weight": numbers},
    )
    found = statistics_from_imatrix(path, model)
    for number in numbers:
        own = moments(found, f"model.layers.1.mlp.experts.{number}.up_proj")
        assert int(own["num_input_tokens"]) == number
        assert ("input_square_sum" in own) == (number > 0)
        if number:
            assert torch.equal(own["input_square_sum"], torch.from_numpy(rows[number]).double())


@pytest.mark.parametrize("make", [llama, qwen3, qwen3_moe, mixtral])
def test_there_and_back(make: Callable[[], Any], tmp_path: Path) -> None:
    found = observe(make(), ids())
    write_imatrix(found, tmp_path / "one.gguf")
    back = statistics_from_imatrix(tmp_path / "one.gguf", make())
    for module, each in found.modules.items():
        assert back.modules[module].tokens == each.tokens, module
        own, its = moments(found, module), moments(back, module)
        assert int(own["num_input_tokens"]) == int(its["num_input_tokens"])
        if each.tokens:
            expected = own["input_square_sum"].float().double()
            assert torch.equal(its["input_square_sum"], expected)
    write_imatrix(back, tmp_path / "two.gguf")
    first, second = (gguf.GGUFReader(tmp_path / name) for name in ("one.gguf", "two.gguf"))
    assert [each.name for each in second.tensors] == [each.name for each in first.tensors]
    for a, b in zip(first.tensors, second.tensors, strict=True):
        assert np.array_equal(a.data, b.data)
    assert first.fields["general.type"].contents() == "imatrix"
    assert "general.architecture" not in first.fields


def test_a_model_is_calibrated_from_it(tmp_path: Path) -> None:
    write_imatrix(observe(llama(), ids()), tmp_path / "imatrix.gguf")
    found = statistics_from_imatrix(tmp_path / "imatrix.gguf", llama())
    by_data, by_file = llama(), llama()
    calibrate(by_data, "W4A16", data=ids(), observer_options={"objective": "imatrix"})
    report = calibrate(by_file, "W4A16", statistics=found)
    assert {each.tokens for each in report.modules} == {66}
    scales = [
        torch.cat([v.flatten() for k, v in model.state_dict().items() if k.endswith("_scale")])
        for model in (by_data, by_file)
    ]
    # sums are float32 in the file: a few scales may be the next candidate
    assert torch.isclose(*scales, rtol=1e-5).float().mean() > 0.99
    with pytest.raises(StatisticsError, match="no input of it, only what concerns its weight"):
        calibrate(llama(), "FP8", statistics=found)


@pytest.mark.parametrize("make", [llama, mistral, qwen3, gemma3_text])
def test_names_are_those_of_transformers(make: Callable[[], Any]) -> None:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    model = make()
    kind = {"mistral": "llama"}.get(model.config.model_type, model.config.model_type)
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config={})
    known = get_gguf_hf_weights_map(model, processor, model_type=kind)
    found = observe(make(), ids(1))
    names = _Names.of(found.manifest.fingerprint)
    own = {names.find(module).tensor: f"{module}.weight" for module in found.modules}
    assert own.items() <= known.items()
    assert len(own) == len(found.modules) == 14


def test_models_that_see_have_the_names_of_their_language_part() -> None:
    found = observe(llama(), ids(1)).manifest.fingerprint
    seeing = found.model_copy(update={"config": {"text_config": found.config, "model_type": "x"}})
    names = _Names.of(seeing)
    place = names.find("model.language_model.layers.1.mlp.up_proj")
    assert place is not None
    assert place.tensor == "blk.1.ffn_up.weight"
    assert names.find("model.vision_tower.encoder.layers.0.mlp.fc1") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.0.attn_q.weight": np.ones((1, 64))}, "of another model: blk.0.attn_q.weight has 1 "),
        ({"blk.0.attn_q.weight": -np.ones((1, 128))}, "must be finite float32 from 0"),
        ({"blk.9.attn_q.weight": np.ones((1, 128))}, "none of its tensors belongs"),
    ],
)
def test_what_is_not_of_the_model(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    counts = {name: [1] for name in change}
    path = written_by_llama_cpp(tmp_path / "imatrix.gguf", change, counts)
    with pytest.raises(StatisticsError, match=message):
        statistics_from_imatrix(path, llama())


def test_what_is_no_imatrix(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(b"nothing of the kind" * 10)
    with pytest.raises(StatisticsError, match="damaged, or no GGUF file"):
        statistics_from_imatrix(path, llama())
    with pytest.raises(StatisticsError, match="no such imatrix file"):
        statistics_from_imatrix(tmp_path / "nothing.gguf", llama())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(StatisticsError, match="a GGUF file of the type None, no imatrix"):
        statistics_from_imatrix(path, llama())


def test_an_architecture_that_gguf_does_not_know(tmp_path: Path) -> None:
    data = [torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))]
    found = observe(tiny_moe((0, 1)), data)
    with pytest.raises(StatisticsError, match="knows no architecture None"):
        write_imatrix(found, tmp_path / "imatrix.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *args)

    found = observe(llama(), ids(1))
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(StatisticsError, match=r"pip install 'calipers\[gguf\]'"):
        write_imatrix(found, tmp_path / "imatrix.gguf")
    assert list(tmp_path.iterdir()) == []
