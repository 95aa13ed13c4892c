"""`make_twin`: a small random model of another one's architecture, to try things on."""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from torch import nn

from calipers.calibration.targets import kind_of

__all__ = ["make_twin", "plain_defaults"]

#: Models up to this many parameters are as small as a twin needs to be.
_SMALL = 3_000_000
#: Widths up to this many stay; wider ones shrink to about it.
_WIDTH = 256
_VOCABULARY = 512
_EXPERTS = 16

_LAYERS = re.compile(r"(^|_)(n_?layers?|num_layers|depth|layers|num_blocks)$")
_HEADS = ("num_attention_heads", "num_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_CODER_HEADS = ("encoder_attention_heads", "decoder_attention_heads")
_HEAD_DIMS = ("head_dim", "d_kv", "qk_head_dim", "v_head_dim", "kv_lora_rank")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim")
_IS_WIDTH = re.compile(
    r"(^|_)(hidden_size|d_model|n_embd|n_inner|d_ff|d_inner|dim|inner_dim|embed_dim|hidden_dim|"
    r"intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|projection_dim|lru_width|"
    r"width|classifier_pooling_size)$"
)
_IS_VOCABULARY = re.compile(r"(^|_)(vocab_size|vocab_size_per_layer_input|n_vocab)$")
_IS_TOKEN = re.compile(r"_token_(id|index)$|^(image|video|audio)_token(_id|_index)?$")


def make_twin(model: nn.Module, attention: str = "eager") -> Any:
    """A small model of the same class and architecture, with random weights, on the CPU.

    Its layers are those that the model begins with, as many as it takes to see each kind of module
    that the model has; widths, experts and vocabulary are smaller too. So its modules have names
    that the model's have. A model that is small already is built as it is.

    Args:
        model: A transformers model, its weights anywhere; not touched.
        attention: Which attention function the twin calls.

    Raises:
        Exception: Whatever the class raises where it cannot be built so small.
    """
    source: Any = model
    config = copy.deepcopy(source.config)
    configs, needed = list(_configs(config)), _layers_needed(model)
    for each in configs:
        each.__dict__.pop("quantization_config", None)
        _fewer_layers(each, needed)
    with disable_onloading():
        is_small = sum(parameter.numel() for parameter in model.parameters()) <= _SMALL
        dtypes = {
            name: each.dtype for name, each in model.named_parameters() if each.is_floating_point()
        }
    widths: dict[int, int] = {}
    for shrink in () if is_small else (_fewer_heads, _narrower):
        for each in configs:
            shrink(each, widths)
    kind: Any = type(model)
    dtype = source.dtype if source.dtype.is_floating_point else torch.float32
    twin = kind._from_config(config, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.05)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02)
            if name in dtypes:  # a class may make some in float32, whatever the model's dtype
                parameter.data = parameter.data.to(dtypes[name])
    return twin.eval()


@contextmanager
def plain_defaults() -> Iterator[None]:
    """A block after which torch's random numbers, default dtype and device are as before it."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.set_default_dtype(torch.float32)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _configs(config: Any) -> Iterator[Any]:
    """A config and the sub-configs in it, each once."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _configs(value)


def _layers_needed(model: nn.Module) -> dict[int, int]:
    """Number of layers of a stack to how many of the first of them show every kind of module."""
    needed: dict[int, int] = defaultdict(int)
    for stack_name, stack in model.named_modules():
        if not isinstance(stack, nn.ModuleList) or re.search(r"\.\d+(\.|$)", stack_name):
            continue
        seen: set[tuple[str, type[nn.Module]]] = set()
        last = 0
        for place, layer in enumerate(stack):
            kinds = {(kind_of(name), type(each)) for name, each in layer.named_modules()}
            if kinds - seen:
                seen |= kinds
                last = place
        needed[len(stack)] = max(needed[len(stack)], last + 1)
    return needed


def _fewer_layers(config: Any, needed: Mapping[int, int]) -> None:
    for key, value in _numbers(config).items():
        fewer = max(2, needed.get(value, 2))
        if not _LAYERS.search(key) or value <= fewer:
            continue
        setattr(config, key, fewer)
        for other, values in list(vars(config).items()):
            if isinstance(values, list) and len(values) == value:
                setattr(config, other, values[:fewer])


def _fewer_heads(config: Any, widths: dict[int, int]) -> None:
    """Smaller head counts with heads as wide as before, and the hidden size that follows."""
    numbers = _numbers(config)
    hidden = next((numbers[key] for key in _HIDDEN if key in numbers), None)
    heads_key = next((key for key in _HEADS if key in numbers), None)
    if heads_key is None:
        coder = [key for key in _CODER_HEADS if key in numbers]
        if not coder or hidden is None:
            return
        size = hidden // numbers[coder[0]]
        heads = _heads_for(size, hidden, 2)
        for key in coder:
            setattr(config, key, heads)
        widths[hidden] = heads * size
        return
    heads = numbers[heads_key]
    expand, wide = vars(config).get("expand"), numbers.get("head_dim")
    if hidden and expand and wide and heads * wide == expand * hidden:  # Mamba 2
        widths[hidden] = _WIDTH
        setattr(config, heads_key, expand * _WIDTH // wide)
        return
    explicit = any(key in numbers for key in _HEAD_DIMS)
    kv_key = next((key for key in _KV_HEADS if key in numbers), None)
    kv = numbers[kv_key] if kv_key else heads
    if (
        hidden is not None
        and hidden % heads == 0
        and (not explicit or hidden == heads * (wide or 0))
    ):
        fewer = min(heads, _heads_for(hidden // heads, hidden, 2))
        widths[hidden] = fewer * (hidden // heads)
    elif explicit:
        fewer = min(4 - heads % 2, heads)
    else:
        return
    setattr(config, heads_key, fewer)
    if kv_key is not None:
        pairs = 2 if fewer % 2 == 0 and kv > 1 else 1
        setattr(config, kv_key, fewer if kv == heads else pairs)


def _heads_for(size: int, hidden: int, least: int) -> int:
    """How many heads of a size make a width that groups divide as they divide the hidden size."""
    granularity = math.gcd(hidden, 128)
    heads = least
    while (heads * size) % granularity:
        heads += least
    return heads


def _narrower(config: Any, widths: dict[int, int]) -> None:
    numbers = _numbers(config)
    hidden = next((numbers[key] for key in _HIDDEN if key in numbers), None)
    expand = vars(config).get("expand")
    for key, value in numbers.items():
        if _IS_WIDTH.search(key) and "head" not in key and value > _WIDTH:
            if key == "intermediate_size" and expand and hidden and value == expand * hidden:
                setattr(config, key, int(expand * widths.get(hidden, _narrow(hidden))))
                continue
            setattr(config, key, widths.setdefault(value, _narrow(value)))
        elif key in _EXPERT_COUNTS and value > _EXPERTS:
            setattr(config, key, max(_EXPERTS, numbers.get("num_experts_per_tok", 0)))
        elif _IS_VOCABULARY.search(key) and value > _VOCABULARY:
            setattr(config, key, _VOCABULARY)
    if hasattr(config, "use_mamba_kernels"):
        config.use_mamba_kernels = False
    _fewer_tokens(config)


def _narrow(value: int) -> int:
    """A width near 256 that the same group sizes divide as this one."""
    power = math.gcd(value, 128)
    return _WIDTH if power == 128 else _WIDTH + power


def _fewer_tokens(config: Any) -> None:
    """Move ids of special tokens into the small vocabulary; different ids stay different."""
    place = _VOCABULARY - 1
    moved: dict[int, int] = {}
    for key, value in list(vars(config).items()):
        if not _IS_TOKEN.search(key) or value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(each, int) for each in values):
            continue
        for each in values:
            if each >= _VOCABULARY and each not in moved:
                moved[each] = place
                place -= 1
        new = [moved.get(each, each) for each in values]
        setattr(config, key, new if isinstance(value, list) else new[0])


def _numbers(config: Any) -> dict[str, int]:
    """The integers of a config by field."""
    return {key: value for key, value in vars(config).items() if type(value) is int}
