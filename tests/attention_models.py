"""Tiny random models of every kind of attention, and what is asked of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from architectures import GROUPED, SIZES

_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
    **SIZES,
    "num_key_value_heads": 4,
}
_WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
#: Name to class, config class and fields. Rotary tables stay in float32, as in a loaded model.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 32}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 32, **_WINDOWS}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 32, **_WINDOWS},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_LATENT, "first_k_dense_replace": 1},
    ),
    #: No layer of experts, whose weights are another matter.
    "latent": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**_LATENT, "first_k_dense_replace": 2},
    ),
}


def make(name: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random model of `MODELS` in eval mode."""
    torch.manual_seed(0)
    kind, config, fields = MODELS[name]
    made = getattr(transformers, config)(**{**fields, **changes})
    return getattr(transformers, kind)._from_config(made, dtype=dtype).eval()


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Unpadded tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 100, (2, 12), generator=generator)}] * count


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of the model for tokens that it was not calibrated with."""
    generator = torch.Generator().manual_seed(2)
    found: torch.Tensor = model(torch.randint(3, 100, (2, 12), generator=generator)).logits
    return found


def continued(model: Any) -> torch.Tensor:
    """Three tokens and six that the model generates with a cache."""
    ids: torch.Tensor = model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=6, min_new_tokens=6, do_sample=False
    )
    return ids
