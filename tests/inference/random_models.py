"""Random models of kinds that no package brings along: experts, and models that see as well.

Their weights are larger than those that training begins with, so that tokens differ in probability.
They are float32: from a checkpoint of packed int4 weights whose scales are bfloat16, transformers
makes a bfloat16 model that sees, whatever dtype it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["MODELS", "SEEING", "tokens", "write"]

_VOCABULARY = 512
#: Tokens of images and what stands around them begin here.
_SPECIAL = 500
_SPREAD = 0.08
_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {
    **_SIZES,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": _VOCABULARY,
    "initializer_range": _SPREAD,
    "max_position_embeddings": 512,
}
_VISION = {**_SIZES, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}


def _made(kind: str, config: str, **fields: Any) -> Any:
    made = getattr(transformers, config)(**fields)
    return getattr(transformers, kind)(made).eval()


def qwen3_moe() -> Any:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    return _made("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_TEXT, **experts)


def mixtral() -> Any:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _made("MixtralForCausalLM", "MixtralConfig", **_TEXT, **experts)


def gemma3() -> Any:
    return _made(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config=_TEXT,
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=500,
        boi_token_index=501,
        eoi_token_index=502,
    )


def llava() -> Any:
    return _made(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        text_config={**_TEXT, "model_type": "llama"},
        vision_config={**_VISION, "model_type": "clip_vision_model"},
        image_token_index=500,
    )


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    return _made(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        text_config={**_TEXT, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 128, "hidden_size": 128, "num_heads": 4},
        image_token_id=500,
        video_token_id=501,
        vision_start_token_id=502,
        vision_end_token_id=503,
    )


#: Those of `MODELS` that transformers loads as models of several kinds of input.
SEEING = ("gemma3", "llava", "qwen2-vl")
MODELS: dict[str, Callable[[], Any]] = {
    "qwen3-moe": qwen3_moe,
    "mixtral": mixtral,
    "gemma3": gemma3,
    "llava": llava,
    "qwen2-vl": qwen2_vl,
}


def write(name: str, path: Path) -> Path:
    """Write a model of `MODELS` into a folder, in float32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(path)
    return path


def tokens(seed: int, texts: int, length: int) -> torch.Tensor:
    """Random tokens of text, shape (texts, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, _SPECIAL, (texts, length), generator=generator)
