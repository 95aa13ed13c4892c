"""Tiny random models that see or hear as well, with batches of text, of images and of sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from architectures import (
    GROUPED,
    SIZES,
    example_inputs,
    gemma3,
    qwen2_vl,
    qwen3_vl,
    tiny,
    whisper,
)

TOKENS = 12
VISION = {**SIZES, "num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
del VISION["vocab_size"]


def llama4_vision() -> Any:
    """With experts, which this model keeps in one parameter."""
    projector = {"vision_output_dim": 128, "projector_input_dim": 128, "projector_output_dim": 128}
    return tiny(
        "Llama4ForConditionalGeneration",
        "Llama4Config",
        text_config={
            **GROUPED,
            "intermediate_size_mlp": 256,
            "num_local_experts": 2,
            "head_dim": 32,
            "pad_token_id": 0,
        },
        vision_config={**VISION, **projector, "num_channels": 3, "intermediate_size": 512},
        image_token_index=120,
    )


def qwen2_audio() -> Any:
    return tiny(
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        text_config={**GROUPED, "model_type": "qwen2"},
        audio_config={
            "d_model": 128,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 128,
            "num_mel_bins": 8,
            "max_source_positions": 8,
        },
        audio_token_index=120,
    )


def llava(dtype: torch.dtype = torch.float32) -> Any:
    """With room for the tokens of `llava_processor`, of which <image> is the 300th."""
    text = {**GROUPED, "vocab_size": 320, "model_type": "llama", "max_position_embeddings": 64}
    model = tiny(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        text_config=text,
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=300,
    )
    return model.to(dtype)


def llava_processor(tokenizer: Any) -> Any:
    """A processor for `llava`, which makes 16 tokens of an image; without torchvision."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.pad_token = "</s>"
    template = (
        "{% for m in messages %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


MODELS = {
    "gemma3": gemma3,
    "qwen2_vl": qwen2_vl,
    "qwen3_vl": qwen3_vl,
    "llama4_vision": llama4_vision,
    "qwen2_audio": qwen2_audio,
    "whisper": whisper,
}


def text_inputs(model: Any, seed: int = 1) -> dict[str, Tensor]:
    """Token ids alone; Whisper, which is nothing without sound, gets some."""
    return cast(model, example_inputs(model, seed))


def all_inputs(model: Any, seed: int = 1) -> dict[str, Tensor]:
    """Inputs that reach all of a model, with images where it sees beside what it reads."""
    make = other_inputs if hasattr(model.config, "vision_config") else text_inputs
    return make(model, seed)


def other_inputs(model: Any, seed: int = 2) -> dict[str, Tensor]:
    """Token ids with an image or a sound among them."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    ids = torch.randint(3, 100, (2, TOKENS), generator=generator)
    kind = type(model).__name__
    if kind.startswith("Whisper"):
        return text_inputs(model, seed)
    ids[:, 3:7] = 120
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind.startswith("Gemma3"):
        found |= {"pixel_values": noise(2, 3, 32, 32), "token_type_ids": (ids == 120).long()}
    elif kind.startswith("Qwen2Audio"):
        heard = torch.ones(2, 16, dtype=torch.long)
        found |= {"input_features": noise(2, 8, 16), "feature_attention_mask": heard}
    elif kind.startswith("Qwen"):
        size = model.config.vision_config.patch_size
        ids[:, 2], ids[:, 7] = 122, 123
        found |= {
            "pixel_values": noise(2 * 16, 3 * 2 * size * size),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": (ids == 120).int(),
        }
    else:
        found |= {"pixel_values": noise(2, 3, 32, 32)}
    return cast(model, found)


def cast(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Images and sounds in the model's dtype."""
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def stored(model: Any, path: Path, dtype: torch.dtype) -> Any:
    """The model as a user has it: from a folder, in this dtype (buffers stay as they are)."""
    model.save_pretrained(path)
    return type(model).from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def logits_of(model: Any) -> list[Tensor]:
    """Logits for text, and for text with an image or a sound."""
    return [model(**inputs).logits.float() for inputs in (text_inputs(model), other_inputs(model))]
