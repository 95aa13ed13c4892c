"""Tensors that are not what they seem: without memory, lazy, or of another kind than dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import UninitializedParameter

__all__ = ["REFUSED", "SAME", "Wrapper", "negative_bit"]

Make = Callable[[Tensor], Any]


class Wrapper(Tensor):
    """A tensor made by `_make_wrapper_subclass`: a shape and a dtype, and another that computes."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrapped(value):
            return value.inner if isinstance(value, Wrapper) else value

        named = {key: unwrapped(value) for key, value in (kwargs or {}).items()}
        found = function(*map(unwrapped, args), **named)
        return Wrapper(found) if isinstance(found, Tensor) else found


class Transparent(Wrapper):
    """The same, but what is computed with it is a plain tensor, also a detached one."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def unwrapped(value):
            return value.inner if isinstance(value, Wrapper) else value

        named = {key: unwrapped(value) for key, value in (kwargs or {}).items()}
        return function(*map(unwrapped, args), **named)


def negative_bit(value: Tensor) -> Tensor:
    """`-value` whose memory holds `value`, at every other place."""
    lazy = torch.conj(torch.complex(value, value)).imag
    assert lazy.is_neg()
    return lazy


def distributed(value: Tensor) -> Tensor:
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return distribute_tensor(value, init_device_mesh("cpu", (1,)), [Replicate()])


def given_back(value: Tensor, size: int = 0) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(size)
    return value


#: Tensors of other values than they were made of, but values: what they stand for.
SAME: dict[str, tuple[Make, Callable[[Tensor], Tensor]]] = {
    "negative bit": (negative_bit, lambda value: -value),
    "zero tensor": (lambda value: torch._efficientzerotensor(value.shape), torch.zeros_like),
    "DTensor": (distributed, lambda value: value),
    "transparent wrapper": (Transparent, lambda value: value),
}
#: Tensors that are refused, and what the error must say.
REFUSED: dict[str, tuple[Make, str]] = {
    "FakeTensor": (lambda value: FakeTensorMode().from_tensor(value), "got a FakeTensor of shape"),
    "wrapper": (Wrapper, "got a Wrapper of shape"),
    "meta": (lambda value: value.to("meta"), "got a meta tensor of shape"),
    "memory given back": (given_back, "whose memory was given back"),
    "part of it given back": (lambda value: given_back(value, 16), "whose memory was given back"),
    "sparse": (Tensor.to_sparse, "layout torch.sparse_coo"),
    "nested": (lambda value: torch.nested.nested_tensor([value, value[1:]]), "got a nested one"),
    "jagged": (
        lambda value: torch.nested.nested_tensor([value, value[1:]], layout=torch.jagged),
        "got a nested one",
    ),
    "quantized": (
        lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8),
        "got a quantized one",
    ),
    "complex": (lambda value: torch.complex(value, value), "got complex values .torch.complex64."),
    "complex, lazy": (
        lambda value: torch.conj(torch.complex(value, value)),
        "got complex values .torch.complex64.",
    ),
    "not initialized": (lambda value: UninitializedParameter(), "one that is not initialized"),
    "no numbers": (
        lambda value: torch.zeros(value.shape, dtype=torch.uint8).view(torch.bits8),
        "got dtype torch.bits8",
    ),
    "list": (lambda value: value.tolist(), "expected a tensor, got list"),
}
