"""Tiny random models of the architectures that the field brings, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}


def tiny(kind: str, config: str, **fields: Any) -> Any:
    """A random model of the class and config class of these names."""
    torch.manual_seed(0)
    made = getattr(transformers, config)(**fields)
    return getattr(transformers, kind)(made).eval()


def llama() -> Any:
    return tiny("LlamaForCausalLM", "LlamaConfig", **GROUPED)


def tied_llama() -> Any:
    return tiny("LlamaForCausalLM", "LlamaConfig", tie_word_embeddings=True, **GROUPED)


def mistral() -> Any:
    return tiny("MistralForCausalLM", "MistralConfig", sliding_window=4, **GROUPED)


def qwen3() -> Any:
    return tiny("Qwen3ForCausalLM", "Qwen3Config", head_dim=32, **GROUPED)


def gemma3_text() -> Any:
    return tiny("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=32, **GROUPED)


def phi3() -> Any:
    return tiny("Phi3ForCausalLM", "Phi3Config", pad_token_id=0, **GROUPED)


def olmo2() -> Any:
    return tiny("Olmo2ForCausalLM", "Olmo2Config", pad_token_id=0, **GROUPED)


def gpt2() -> Any:
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 128}
    return tiny("GPT2LMHeadModel", "GPT2Config", **sizes)


def whisper() -> Any:
    return tiny(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        vocab_size=128,
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=1,
        eos_token_id=2,
    )


def roberta() -> Any:
    return tiny("RobertaForMaskedLM", "RobertaConfig", max_position_embeddings=64, **SIZES)


def bert() -> Any:
    return tiny("BertForMaskedLM", "BertConfig", **SIZES)


def modernbert() -> Any:
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return tiny("ModernBertForMaskedLM", "ModernBertConfig", pad_token_id=0, **tokens, **SIZES)


def t5() -> Any:
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    return tiny(
        "T5ForConditionalGeneration", "T5Config", vocab_size=128, decoder_start_token_id=0, **sizes
    )


def gpt2_classifier() -> Any:
    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 128, "pad_token_id": 0}
    return tiny("GPT2ForSequenceClassification", "GPT2Config", **sizes)


def llama_classifier() -> Any:
    return tiny("LlamaForSequenceClassification", "LlamaConfig", pad_token_id=0, **GROUPED)


def falcon() -> Any:
    return tiny("FalconForCausalLM", "FalconConfig", alibi=False, ffn_hidden_size=256, **SIZES)


def mixtral() -> Any:
    return tiny("MixtralForCausalLM", "MixtralConfig", num_local_experts=2, **GROUPED)


def qwen3_moe(**fields: Any) -> Any:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    return tiny(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", **{**GROUPED, **sizes, "head_dim": 32, **fields}
    )


_LATENT = {
    "kv_lora_rank": 128,
    "q_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
_SHARED_EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}


def deepseek_v3() -> Any:
    fields = {**GROUPED, **_SHARED_EXPERTS, **_LATENT}
    return tiny("DeepseekV3ForCausalLM", "DeepseekV3Config", **fields)


def glm4_moe() -> Any:
    fields = {**GROUPED, **_SHARED_EXPERTS, "head_dim": 32}
    return tiny("Glm4MoeForCausalLM", "Glm4MoeConfig", **fields)


def granite_moe() -> Any:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return tiny("GraniteMoeForCausalLM", "GraniteMoeConfig", **{**GROUPED, **sizes})


def gpt_oss() -> Any:
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "pad_token_id": 0}
    return tiny("GptOssForCausalLM", "GptOssConfig", **{**GROUPED, **sizes})


def spread_weights(model: nn.Module) -> Any:
    """Weights so large that whatever is wrong with a layer shows in the output."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model


def llama4() -> Any:
    sizes = {**GROUPED, "intermediate_size_mlp": 256, "num_local_experts": 2, "head_dim": 32}
    return tiny("Llama4ForCausalLM", "Llama4TextConfig", pad_token_id=0, **sizes)


def qwen3_next() -> Any:
    return tiny(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        layer_types=["linear_attention", "full_attention"],
        **GROUPED,
    )


def jamba() -> Any:
    return tiny(
        "JambaForCausalLM",
        "JambaConfig",
        num_experts=2,
        num_experts_per_tok=1,
        use_mamba_kernels=False,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
        mamba_dt_rank=16,
        **GROUPED,
    )


def mamba() -> Any:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 128, "time_step_rank": 16}
    return tiny("MambaForCausalLM", "MambaConfig", **sizes)


def _of_images() -> dict[str, int]:
    sizes = {**SIZES, "image_size": 32, "patch_size": 8}
    del sizes["vocab_size"]
    return sizes


def clip() -> Any:
    return tiny("CLIPVisionModel", "CLIPVisionConfig", **_of_images())


def vit() -> Any:
    return tiny("ViTForImageClassification", "ViTConfig", **_of_images())


def siglip() -> Any:
    return tiny("SiglipVisionModel", "SiglipVisionConfig", **_of_images())


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    return tiny(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        text_config={**GROUPED, "rope_parameters": rope},
        vision_config={"depth": 1, "embed_dim": 128, "hidden_size": 128, "num_heads": 4},
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )


def qwen3_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}
    vision = {"depth": 1, "hidden_size": 128, "intermediate_size": 128, "num_heads": 4}
    return tiny(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        text_config={**GROUPED, "head_dim": 32, "rope_parameters": rope},
        vision_config={
            **vision,
            "out_hidden_size": 128,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
        image_token_id=120,
        video_token_id=121,
        vision_start_token_id=122,
        vision_end_token_id=123,
    )


def gemma3() -> Any:
    return tiny(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        text_config={**GROUPED, "head_dim": 32},
        vision_config={**SIZES, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=120,
        boi_token_index=121,
        eoi_token_index=122,
    )


def example_inputs(model: nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs that the model takes: token ids, an image, or sound and token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (2, 12), generator=generator)
    kind = type(model).__name__
    if kind.startswith("Whisper"):
        sound = torch.randn(2, 8, 16, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids}
    if kind.startswith(("Siglip", "CLIP", "ViT")):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if kind.startswith("T5"):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


@torch.no_grad()
def output_of(model: Any) -> torch.Tensor:
    """Logits, or hidden states of a model without a head, for its example inputs."""
    output = model(**example_inputs(model))
    found: torch.Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found.float()
