"""Log probabilities of texts by vLLM, printed as JSON; run by the Python of .venv-vllm.

Usage: `python vllm_logprobs.py CHECKPOINT DTYPE own|lent < TOKENS`. TOKENS is a JSON list of lists
of token numbers. vLLM writes its log to stdout too, so the result is the one line that begins with
"LOGPROBS ". Nothing here imports calipers, since an engine has none.

"lent" replaces two things that vLLM compiles for AVX-512 alone. In place of `cpu_gemm_wna16`, its
product of activations with int4 weights, stands the one below. Where a cache is quantized, it holds
values of the model's dtype, which are rounded to FP8 before they enter it. All else stays vLLM's:
reading config.json, loading and fusing tensors, repacking codes and zero points for the kernel, the
names, shapes and sharing of the cache's scales.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, _custom_ops
from vllm.model_executor.layers.attention import attention
from vllm.v1.attention.backends import cpu_attn


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


def lend_fp8_cache() -> None:
    """Let vLLM's attention keep keys and values in the model's dtype, rounded to FP8 before."""
    cpu_attn.is_quantized_kv_cache = lambda word: False
    attention.kv_cache_dtype_str_to_dtype = lambda word, model: model.dtype
    for name in (
        "cpu_attn_get_scheduler_metadata",
        "cpu_attn_reshape_and_cache",
        "cpu_attention_with_kv_cache",
    ):
        setattr(_custom_ops, name, as_unquantized(getattr(_custom_ops, name)))
    update = cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update

    def update_rounded(
        self: Any, layer: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any
    ) -> None:
        rounded = in_fp8(key, layer._k_scale), in_fp8(value, layer._v_scale)
        update(self, layer, *rounded, *rest)

    cpu_attn.CPUAttentionBackendImpl.do_kv_cache_update = update_rounded


def as_unquantized(kernel: Any) -> Any:
    """A kernel that is told of no quantized cache."""

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        return kernel(*args, **{**kwargs, "kv_cache_dtype": "auto"})

    return call


def in_fp8(state: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Keys or values of shape (tokens, heads, head_dim), rounded by one scale or one a head."""
    scale = scale.view(-1, 1).to(state.dtype)
    codes = (state / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.to(state.dtype) * scale


def has_quantized_cache(checkpoint: str) -> bool:
    config = json.loads((Path(checkpoint) / "config.json").read_text(encoding="utf-8"))
    return bool(config.get("quantization_config", {}).get("kv_cache_scheme"))


def main(checkpoint: str, dtype: str, kernels: str) -> None:
    prompts: list[list[int]] = json.load(sys.stdin)
    if kernels == "lent":
        _custom_ops.cpu_gemm_wna16 = multiply_wna16
        if has_quantized_cache(checkpoint):
            lend_fp8_cache()
    engine = LLM(
        checkpoint,
        dtype=dtype,
        skip_tokenizer_init=True,
        # of a model that sees the language part alone is asked
        limit_mm_per_prompt=dict.fromkeys(("image", "video", "audio"), 0),
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
