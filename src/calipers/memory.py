"""Whether a tensor's elements lie in memory, and the plain tensor that they can be read as.

Pointers are handed to compiled code. A tensor may have a shape and a dtype but no memory (fake and
meta tensors, wrappers of other tensors, tensors inside of a function transform), or memory that
holds something else than its elements (lazy negation, sparse and quantized tensors).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parameter import Parameter, UninitializedBuffer, UninitializedParameter

from calipers.errors import CalipersError

__all__ = ["UnreadableError", "is_readable", "named_tensor", "plain_tensor", "plain_values"]

#: Classes whose tensors have nothing of their own.
_PLAIN = (Tensor, Parameter)
#: Dtypes in which observers compute.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
#: Dtypes that cannot be a lazy conjugate, and are read as they are or by `float()`.
_REAL = {*_FLOATS, *_INTEGERS, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool}
#: Devices whose tensors have an address. Others (xla, lazy) keep their elements in ways of their
#: own, and torch alone computes with them.
_ADDRESSED = ("cpu", "cuda")


class UnreadableError(CalipersError):
    """A tensor that compiled code cannot read as it lies; torch may still compute with it."""


def is_readable(tensor: Tensor) -> bool:
    """Whether the elements of a tensor lie at its address, one for each place of its strides."""
    if type(tensor) not in _PLAIN and _has_dispatch_of_its_own(tensor):
        return False
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return False
    if tensor.is_neg() or tensor.is_conj() or tensor.is_meta:
        return False
    return _has_memory(tensor)


def plain_tensor(tensor: Tensor) -> Tensor:
    """The same values as a tensor of class Tensor, detached, real, whose elements lie in memory.

    Memory is shared where that is possible. Lazy negation and zeros are carried out. Tensors of
    torch.func.grad, and replicated DTensors, are replaced by the tensor behind them.

    Raises:
        ValueError: It is no dense tensor of real numbers with values. The message says what it is;
            the caller adds the name of the argument.
    """
    # Under a FakeTensorMode no tensor of this thread has values.
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise ValueError("expected tensors with values, got a FakeTensorMode: observe outside it")
    if (
        type(tensor) in _PLAIN
        and tensor.dtype in _REAL
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and not tensor.is_neg()
        and not tensor.is_meta
        and _has_memory(tensor)
    ):
        return tensor.detach()
    with torch._C.DisableTorchFunctionSubclass():
        return _resolved(tensor)


def plain_values(tensor: Tensor) -> Tensor:
    """As `plain_tensor`, in a dtype to compute with: integers, booleans and float8 in float32.

    Raises:
        ValueError: As there, or a dtype that torch cannot convert.
    """
    value = plain_tensor(tensor)
    if value.dtype in _FLOATS:
        return value
    try:
        return value.float()
    except (RuntimeError, TypeError) as error:  # NotImplementedError is a RuntimeError
        raise ValueError(
            f"expected a tensor of numbers, got dtype {value.dtype}, which torch cannot convert"
        ) from error


def named_tensor(
    tensor: object, what: str, read: Callable[[Tensor], Tensor] = plain_tensor
) -> Tensor:
    """A tensor that came as an argument, read by `plain_tensor` or `plain_values`.

    Raises:
        ValueError: What came instead, after the argument's name.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{what}: expected a tensor, got {type(tensor).__name__}")
    try:
        return read(tensor)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


def _has_dispatch_of_its_own(tensor: Tensor) -> bool:
    """Whether the class computes in its own way, so that its memory may be that of others."""
    own: object = type(tensor).__torch_dispatch__
    return own is not Tensor.__torch_dispatch__


def _has_memory(tensor: Tensor) -> bool:
    """Whether a strided tensor has an address, and memory up to its last element."""
    if tensor.numel() == 0 or tensor.device.type not in _ADDRESSED:
        return True
    try:
        size, offset = tensor.element_size(), tensor.storage_offset()
        places = zip(tensor.shape, tensor.stride(), strict=True)
        end = (offset + sum((count - 1) * stride for count, stride in places) + 1) * size
        # An offset into memory that was given back is no address; some may have been given back.
        return tensor.data_ptr() > offset * size and end <= tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # no storage at all: inside of torch.vmap
        return False


def _resolved(tensor: Tensor) -> Tensor:
    if isinstance(tensor, (UninitializedBuffer, UninitializedParameter)):
        raise ValueError("expected a tensor with values, got one that is not initialized")
    if tensor.is_nested:
        raise ValueError(
            "expected a dense tensor, got a nested one; give its parts, or pad it and give a mask"
        )
    if tensor.is_meta:
        raise ValueError(
            f"expected a tensor with values, got a meta tensor of shape {tuple(tensor.shape)}; "
            "load the weights first"
        )
    if type(tensor) not in _PLAIN and _has_dispatch_of_its_own(tensor):
        return plain_tensor(_unwrapped(tensor))
    if torch._C._functorch.is_gradtrackingtensor(tensor):
        return plain_tensor(torch._C._functorch.get_unwrapped(tensor))
    shape = tuple(tensor.shape)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise ValueError(
            f"expected a tensor with values, got one of shape {shape} inside of torch.func.vmap or "
            "another transform; observe outside of it"
        )
    if torch._is_functional_tensor(tensor):
        raise ValueError(
            f"expected a tensor with values, got a functional tensor of shape {shape}; observe "
            "outside of torch.func.functionalize"
        )
    if tensor.is_quantized:
        raise ValueError(
            f"expected a tensor of real numbers, got a quantized one ({tensor.dtype}); "
            "call dequantize() first"
        )
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"expected a dense tensor, got one of layout {tensor.layout} and shape {shape}; "
            "call to_dense() first"
        )
    if tensor.is_complex():
        raise ValueError(
            f"expected a tensor of real numbers, got complex values ({tensor.dtype}); observe "
            "torch.view_as_real(...), or real and imaginary part apart"
        )
    if tensor._is_zerotensor():
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    plain = tensor.detach().as_subclass(Tensor).resolve_neg()
    if not _has_memory(plain):
        raise ValueError(
            f"expected a tensor with values, got one of shape {shape} whose memory was given back"
        )
    return plain


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor behind one of a class with a dispatch of its own."""
    if _is_a(tensor, "torch._subclasses.fake_tensor", "FakeTensor"):
        raise ValueError(
            f"expected a tensor with values, got a FakeTensor of shape {tuple(tensor.shape)}"
        )
    if _is_a(tensor, "torch.distributed.tensor", "DTensor"):
        return _whole_of_distributed(tensor)
    if _is_a(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        return tensor.trigger_wait()  # type: ignore[attr-defined, no-any-return]
    cause = None
    try:
        plain = tensor.detach().as_subclass(Tensor)
        if type(plain) is Tensor and is_readable(plain):
            return plain
    except Exception as error:  # code of the class, which may raise anything
        cause = error
    raise ValueError(
        f"expected a tensor with values, got a {type(tensor).__name__} of shape "
        f"{tuple(tensor.shape)}, a wrapper without values of its own; give the tensor behind it "
        "(dequantize(), to_dense())"
    ) from cause


def _whole_of_distributed(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor where it is the whole."""
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    placements = tensor.placements  # type: ignore[attr-defined]
    split = [
        str(placement)
        for number, placement in enumerate(placements)
        if not placement.is_replicate() and mesh.size(number) > 1
    ]
    if split:
        raise ValueError(
            f"expected a whole tensor, got a DTensor of shape {tuple(tensor.shape)} spread over "
            f"ranks ({', '.join(split)}); observe full_tensor(), or to_local() if each rank shall "
            "have scales of its own"
        )
    return tensor.to_local()  # type: ignore[attr-defined, no-any-return]


def _is_a(tensor: Tensor, module: str, name: str) -> bool:
    """Whether a tensor is of a class in a module that may not be imported: then it is not."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(tensor, getattr(loaded, name, ()))
