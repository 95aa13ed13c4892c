"""What compiled searches share: the key of a kind of search, and a silent torch.compile."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs

__all__ = ["SchemeKey", "compile_quietly"]


class SchemeKey:
    """Arguments as a key: what of them decides how a value is rounded and scaled."""

    def __init__(self, args: QuantizationArgs) -> None:
        self.args = args
        decisive = args.model_dump(
            include={"num_bits", "type", "symmetric", "group_size", "scale_dtype", "zp_dtype"}
        )
        self._tuple = tuple(map(str, decisive.values()))

    def __hash__(self) -> int:
        return hash(self._tuple)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SchemeKey) and self._tuple == other._tuple


def compile_quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for vector code on the CPU, without the warnings that it raises as it works."""
    # One rounding for a product and its sum: faster, and nearer to the exact value.
    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    with _no_warnings():
        compiled = torch.compile(function, options=options)

    @functools.wraps(function)
    def quiet(*inputs: Any) -> Any:
        with _no_warnings():
            return compiled(*inputs)

    return quiet


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep to itself what torch.compile remarks upon while it works: it is not the user's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
