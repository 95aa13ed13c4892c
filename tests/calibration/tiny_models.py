"""Small models and views of them, shared by the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors import InternalModule
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_llama(layers: int = 1, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def token_batches(count: int = 2, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 64, (2, 8), generator=generator)} for _ in range(count)]


class Mlp(nn.Module):
    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.act = nn.SiLU()
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.up_proj(hidden)))


class MoeLayer(nn.Module):
    """Experts of which only those in `active` ever get tokens."""

    def __init__(self, active: tuple[int, ...], experts: int = 4) -> None:
        super().__init__()
        self.active = active
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + sum((self.experts[i](hidden * (i + 1)) for i in self.active), 0 * hidden)


class MoeModel(nn.Module):
    def __init__(self, *active: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoeLayer(each) for each in active)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def tiny_moe(*active: tuple[int, ...], seed: int = 0) -> MoeModel:
    torch.manual_seed(seed)
    return MoeModel(*active)


def hidden_batches(count: int = 2, width: int = 32, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, width, generator=generator) for _ in range(count)]


def picture(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could leave behind: compare two with ==.

    Tensors are held by place and bytes, attributes by identity, observers by name alone.
    """
    seen: dict[str, Any] = {"state_dict": list(model.state_dict())}
    for name, module in model.named_modules():
        if isinstance(module, InternalModule):
            seen[name] = type(module)
            continue
        fields: dict[str, Any] = {}
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers"):
                fields[key] = [(k, _tensor(v)) for k, v in value.items()]
            elif isinstance(value, dict):
                fields[key] = [(k, id(v)) for k, v in value.items()]
            elif isinstance(value, (bool, int, float, str)):
                fields[key] = value
            else:
                # a bound method is a new object at each look
                fields[key] = id(getattr(value, "__func__", value))
        seen[name] = fields
    return seen


def _tensor(value: torch.Tensor | None) -> Any:
    if value is None:
        return None
    data = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    return value.data_ptr(), value.dtype, value.requires_grad, hash(data)
