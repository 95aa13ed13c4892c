"""`loading_experts`: transformers loads what it would not load, or not as it is stored."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from compressed_tensors.quantization.utils import is_module_quantized
from compressed_tensors.utils import patch_attr
from torch import nn

from calipers.calibration.experts import find_fused_experts, joins_experts, separate_experts

__all__ = ["loading_experts"]


@contextmanager
def loading_experts() -> Iterator[None]:
    """A block in which transformers loads all that `calipers.save` writes, with equal logits.

    Outside of it two kinds of compressed-tensors checkpoints do not load, or load as another model:

    - Quantized experts. transformers joins the experts of a layer into one parameter, as it does
      for unquantized checkpoints. That is exact for weights in packed symmetric integers and MXFP4
      alone: it forgets that their inputs are quantized, and cannot read other formats. Inside, each
      expert is made of Linear layers, which compressed-tensors quantizes as any other.
    - Packed weights of models that initialize the weights of their layers by name (SigLIP, T5,
      Mamba ...), and of embeddings. transformers looks for `weight` where the loaded layer holds
      `weight_packed`: "'Linear' object has no attribute 'weight'". Inside, such a weight counts as
      initialized, which it is, since it was loaded.

    Any other checkpoint is loaded as outside. The block holds for all threads. A transformers that
    keeps experts as modules is left as it is.

    Example:
        Of a checkpoint that `calipers.save` wrote::

            with loading_experts():
                model = AutoModelForCausalLM.from_pretrained("Qwen3-30B-A3B-NVFP4")
    """
    with _experts_one_by_one(), _packed_weights_initialized():
        yield


@contextmanager
def _packed_weights_initialized() -> Iterator[None]:
    from transformers import PreTrainedModel

    initialize: Any = PreTrainedModel.initialize_weights

    def with_stand_ins(self: Any) -> None:
        packed = [
            module
            for module in self.modules()
            if isinstance(module, (nn.Linear, nn.Embedding))
            and is_module_quantized(module)
            and "weight" not in module._parameters
        ]
        try:
            for module in packed:
                module.register_parameter("weight", _initialized(module))
            initialize(self)
        finally:
            for module in packed:
                module._parameters.pop("weight", None)

    with patch_attr(PreTrainedModel, "initialize_weights", with_stand_ins):
        yield


def _initialized(module: Any) -> nn.Parameter:
    """A weight without memory that transformers takes for one that needs no initial values."""
    if isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
    else:
        shape = (module.out_features, module.in_features)
    stand_in: Any = nn.Parameter(
        torch.empty(shape, dtype=torch.bfloat16, device="meta"), requires_grad=False
    )
    stand_in._is_hf_initialized = True
    return stand_in  # type: ignore[no-any-return]


@contextmanager
def _experts_one_by_one() -> Iterator[None]:
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    kind: Any = CompressedTensorsHfQuantizer
    if not hasattr(kind, "update_weight_conversions"):
        yield
        return
    prepare, convert = kind._process_model_before_weight_loading, kind.update_weight_conversions
    joined: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()

    def with_experts(self: Any, model: Any, **kwargs: Any) -> Any:
        restore = separate_experts(model)
        result = prepare(self, model, **kwargs)
        restore()
        left = list(find_fused_experts(model))
        joined[self] = [each.removeprefix(f"{model.base_model_prefix}.") for each in left]
        return result

    def with_own_merges(self: Any, conversions: list[Any]) -> list[Any]:
        merges = [each for each in conversions if joins_experts(each)]
        others = [each for each in conversions if not joins_experts(each)]
        own = [made for each in merges for made in _for_modules(each, joined.get(self, []))]
        return [*own, *convert(self, others)]

    with (
        patch_attr(kind, "_process_model_before_weight_loading", with_experts),
        patch_attr(kind, "update_weight_conversions", with_own_merges),
    ):
        yield


def _for_modules(conversion: Any, names: list[str]) -> Iterator[Any]:
    """A conversion that joins the experts of any module, for those alone that are not quantized.

    The library's own would expect quantized ones.
    """
    leaves = [each.partition("*.")[2] for each in conversion._original_source_patterns]
    (target,) = conversion._original_target_patterns
    for name in names:
        place = f"{name}.{target.rpartition('.')[2]}"
        if not re.search(f"{target}$", place):
            continue
        made = type(conversion)(
            # a pattern in which "*." stands for ".*\\."
            source_patterns=[rf"{re.escape(name)}\.*.{re.escape(leaf)}$" for leaf in leaves],
            target_patterns=place,
            operations=list(conversion.operations),
        )
        made.scope_prefix = conversion.scope_prefix
        made.base_model_prefix = conversion.base_model_prefix
        yield made
