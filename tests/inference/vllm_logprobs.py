"""Log probabilities of texts by vLLM, printed as JSON; run by the Python of .venv-vllm.

Usage: `python vllm_logprobs.py CHECKPOINT DTYPE own|lent < TOKENS`. TOKENS is a JSON list of lists
of token numbers. vLLM writes its log to stdout too, so the result is the one line that begins with
"LOGPROBS ". Nothing here imports calipers, since an engine has none.

"lent" replaces `cpu_gemm_wna16`, vLLM's product of activations with int4 weights, by the one below:
vLLM compiles its own for AVX-512 and 16-bit activations alone. All else stays vLLM's: reading
config.json, loading and fusing tensors, repacking codes and zero points for the kernel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from vllm import LLM, SamplingParams, _custom_ops


def multiply_wna16(
    input: torch.Tensor,
    q_weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> torch.Tensor:
    """What `cpu_gemm_wna16` computes, from the layout that `CPUWNA16LinearKernel` repacks to.

    Args:
        input: Activations, shape (..., columns).
        q_weight: Codes, int32, eight to one, shape (rows / 16, columns * 2).
        scales: Shape (groups, rows).
        zeros: Zero points, int32, eight to one, shape (groups, rows / 8); None stands for 8.
        bias: Shape (rows,).
        pack_factor: Codes in an int32.
        isa_hint: Not used.
    """
    columns, (groups, rows) = input.shape[-1], scales.shape
    blocks = unpack(q_weight.view(rows // 16, columns, 2), pack_factor)
    codes = blocks.permute(1, 0, 2).reshape(groups, columns // groups, rows)
    zero = 8 if zeros is None else unpack(zeros, pack_factor).unsqueeze(1)
    weight = ((codes - zero) * scales.unsqueeze(1)).reshape(columns, rows)
    return torch.nn.functional.linear(input, weight.T.to(input.dtype), bias)


def unpack(packed: torch.Tensor, pack_factor: int) -> torch.Tensor:
    """4-bit codes along the last dimension."""
    shifts = torch.arange(pack_factor, dtype=torch.int32) * 4
    return ((packed.unsqueeze(-1) >> shifts) & 15).flatten(-2)


def main(checkpoint: str, dtype: str, wna16: str) -> None:
    prompts: list[list[int]] = json.load(sys.stdin)
    if wna16 == "lent":
        _custom_ops.cpu_gemm_wna16 = multiply_wna16
    engine = LLM(
        checkpoint,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=4,
        seed=0,
        # a prompt that begins like another one would get no log probabilities for that part
        enable_prefix_caching=False,
    )
    outputs: Any = engine.generate(
        [{"prompt_token_ids": tokens} for tokens in prompts],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    found = []
    for tokens, each in zip(prompts, outputs, strict=True):
        pairs = zip(tokens[1:], each.prompt_logprobs[1:], strict=True)
        found.append([entry[token].logprob for token, entry in pairs])
    print("LOGPROBS " + json.dumps({"logprobs": found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
