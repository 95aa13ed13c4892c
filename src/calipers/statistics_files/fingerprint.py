"""`Fingerprint`: by what statistics know again the model that they were gathered from.

It is cheap: of each tensor at most `SAMPLED` values are read, spread evenly over it, with its name,
shape and dtype. So another training, another size or another dtype shows, while a change of a few
single values may not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from compressed_tensors.offload import disable_onloading
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from calipers._words import listing

__all__ = ["SAMPLED", "Fingerprint", "saved_tensors", "weight_digest"]

#: Most values of a tensor that are read.
SAMPLED = 1024
#: Fields of a config that tell where or how a model was loaded, not what it computes.
_PASSING = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "dtype",
        "experts_implementation",
        "quantization_config",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def weight_digest(weight: Tensor, dtype: torch.dtype | None = None) -> str:
    """What shape, dtype and sampled values of a tensor are known again by, 32 hexadecimal digits.

    No other values are read, so that of a tensor in a mapped file only some pages are.

    Args:
        weight: Any tensor with memory, on any device, of any strides.
        dtype: In which the tensor will be, and is known again; None for its own.

    Example:
        >>> weight = torch.arange(6.0).view(2, 3)
        >>> weight_digest(weight) == weight_digest(weight.clone())
        True
        >>> weight_digest(weight) == weight_digest(weight.bfloat16())
        False
    """
    weight, dtype = weight.detach(), dtype or weight.dtype
    digest = hashlib.sha256(f"{dtype} {tuple(weight.shape)}".encode())
    if weight.numel():
        count = min(weight.numel(), SAMPLED)
        places = torch.arange(count, dtype=torch.int64, device="cpu") * (weight.numel() - 1)
        places = (places // max(1, count - 1)).to(weight.device)
        plain = weight.view(torch.uint8) if weight.dtype.itemsize == 1 else weight
        values = plain[torch.unravel_index(places, plain.shape)] if plain.dim() else plain
        if dtype != weight.dtype:
            values = values.view(weight.dtype).to(dtype)
        digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


class Fingerprint(BaseModel):
    """What a model is known again by.

    Attributes:
        kind: Name of its class.
        config: Its config, without the fields that tell where or how it was loaded.
        tensors: How many parameters and saved buffers it has.
        digest: One digest of the names and the `weight_digest` of all of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    config: dict[str, Any]
    tensors: int
    digest: str

    @classmethod
    def of(cls, model: nn.Module, digests: Mapping[str, str] | None = None) -> Fingerprint:
        """The fingerprint of a model; experts are meant taken apart.

        Args:
            model: The model, its weights anywhere.
            digests: The `weight_digest` of each of its `saved_tensors`, in their order; None to
                compute them.
        """
        if digests is None:
            digests = {name: weight_digest(each) for name, each in saved_tensors(model)}
        digest = hashlib.sha256()
        for name, each in digests.items():
            digest.update(f"{name} {each}\n".encode())
        config: Any = getattr(model, "config", None)
        found = config.to_dict() if hasattr(config, "to_dict") else {}
        return cls(
            kind=type(model).__name__,
            config=_lasting(json.loads(json.dumps(found, default=str))),
            tensors=len(digests),
            digest=digest.hexdigest(),
        )

    def differences(self, other: Fingerprint) -> list[str]:
        """How another model differs from this one, each in a few words; empty for the same one."""
        found = []
        if self.kind != other.kind:
            found.append(f"{self.kind} there, {other.kind} here")
        fields = list(_changed_fields(self.config, other.config))
        if fields:
            found.append(f"its config differs: {listing(fields, 3)}")
        if self.tensors != other.tensors:
            found.append(f"{self.tensors} tensors there, {other.tensors} here")
        elif self.digest != other.digest:
            found.append("its weights have other names, shapes, dtypes or values")
        return found


def saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers by full name, each brought in as long as it is looked at.

    A tied one comes under each of its names.
    """
    with disable_onloading():
        named = [
            (prefix, module, key)
            for prefix, module in model.named_modules(remove_duplicate=False)
            for own, left_out in (
                (module._parameters, ()),
                (module._buffers, module._non_persistent_buffers_set),
            )
            for key, value in own.items()
            if value is not None and key not in left_out
        ]
    for prefix, module, key in sorted(named, key=lambda each: (each[0], each[2])):
        yield f"{prefix}.{key}" if prefix else key, getattr(module, key)


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    """A config without passing fields, sub-configs included."""
    return {
        key: _lasting(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _PASSING
    }


def _changed_fields(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Fields that both have, of other values: versions of transformers add and drop fields."""
    for key in there.keys() & here.keys():
        old, new = there[key], here[key]
        if isinstance(old, dict) and isinstance(new, dict):
            yield from (f"{key}.{each}" for each in _changed_fields(old, new))
        elif old != new:
            yield f"{key} is {old!r} there, {new!r} here"
