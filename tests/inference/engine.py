"""Log probabilities that vLLM and transformers give the tokens of a text, for one checkpoint."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import calipers

__all__ = [
    "PYTHON",
    "EngineError",
    "load",
    "memory_log_probabilities",
    "transformers_log_probabilities",
    "vllm_log_probabilities",
]

_ROOT = Path(__file__).parents[2]
#: Python of the environment that `make test-vllm` builds.
PYTHON = _ROOT / ".venv-vllm" / "bin" / "python"
_SCRIPT = Path(__file__).with_name("vllm_logprobs.py")
#: What Python runs at its start there.
_LENT = Path(__file__).with_name("lent")
_MARK = "LOGPROBS "


class EngineError(Exception):
    """vLLM stopped; the text is its own last message."""


def vllm_log_probabilities(
    checkpoint: Path, tokens: Tensor, *, dtype: str = "float32", kernels: str = "lent"
) -> Tensor:
    """By vLLM, in a process of its own.

    Args:
        checkpoint: Folder.
        tokens: Shape (texts, length).
        dtype: What vLLM computes in.
        kernels: "own" for vLLM's int4 kernel and FP8 cache, "lent" for those of
            `vllm_logprobs.py`.

    Returns:
        Shape (texts, length - 1), float64: of each token but the first, given those before it.

    Raises:
        EngineError: vLLM refused the checkpoint.
    """
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(_LENT),
    }
    done = subprocess.run(
        [PYTHON, _SCRIPT, checkpoint, dtype, kernels],
        input=json.dumps(tokens.tolist()),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise EngineError(_last_message(done.stderr))
    found = json.loads(lines[0].removeprefix(_MARK))
    return torch.tensor(found["logprobs"], dtype=torch.float64)


def transformers_log_probabilities(checkpoint: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """By transformers, of the same checkpoint; shapes as for `vllm_log_probabilities`."""
    return memory_log_probabilities(load(checkpoint, dtype), tokens)


def load(checkpoint: Path, dtype: torch.dtype) -> Any:
    """A model of text, with experts or without, or one that sees as well."""
    config = AutoConfig.from_pretrained(checkpoint)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    with calipers.loading_experts():
        return kind.from_pretrained(checkpoint, dtype=dtype)


@torch.no_grad()
def memory_log_probabilities(model: Any, tokens: Tensor) -> Tensor:
    """By a model in memory."""
    found = []
    for text in tokens:
        logits = model.eval()(input_ids=text[None]).logits[0, :-1].double()
        found.append(logits.log_softmax(-1).gather(-1, text[1:, None])[:, 0])
    return torch.stack(found)


def _last_message(log: str) -> str:
    # From the last line that names an exception on; vLLM prefixes lines with the rank.
    lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in log.splitlines()]
    starts = [i for i, line in enumerate(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return "\n".join(lines[starts[-1] :] if starts else lines[-20:]).strip()
