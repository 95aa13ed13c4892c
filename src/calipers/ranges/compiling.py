"""A silent torch.compile for the Inductor engine."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

__all__ = ["compile_quietly"]


def compile_quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for vector code on the CPU, without the warnings that it raises as it works."""
    # torch counts compilations by code and gives up, silently, after eight: those of one kind of
    # search must not count for the others that the same lines make.
    assert isinstance(function, FunctionType)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    # One rounding for a product and its sum: faster, and nearer to the exact value.
    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    with _no_warnings():
        compiled = torch.compile(own, options=options)

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
