"""What compiled searches share: the key of a kind of search, and a silent torch.compile."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs
from torch._inductor.runtime.cache_dir_utils import cache_dir

__all__ = ["SchemeKey", "Work", "compile_quietly", "count_work"]


class SchemeKey:
    """Arguments as a key: what of them decides how a value is rounded and scaled."""

    def __init__(self, args: QuantizationArgs) -> None:
        self.args = args
        decisive = args.model_dump(
            include={"num_bits", "type", "symmetric", "group_size", "scale_dtype", "zp_dtype"}
        )
        self._tuple = tuple(map(str, decisive.values()))

    def __str__(self) -> str:
        return " ".join(self._tuple)

    def __hash__(self) -> int:
        return hash(self._tuple)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SchemeKey) and self._tuple == other._tuple


#: Values searched in this process by each kind of search.
_searched: Counter[str] = Counter()
#: Kinds of search of which this process has noted that they were compiled.
_noted: set[str] = set()


@dataclass(frozen=True)
class Work:
    """What is known of a kind of search when an engine is chosen for it.

    Args:
        kind: A name, different for all that is compiled on its own.
        values: Number of values searched in this process so far.
    """

    kind: str
    values: int

    @property
    def compiled_before(self) -> bool:
        """Whether this machine has compiled it, so that its disk cache is warm."""
        return self.kind in _noted or self._marker().exists()

    def note_compiled(self) -> None:
        """Remember that it was compiled, beside what the compiler remembers."""
        if self.kind in _noted:
            return
        _noted.add(self.kind)
        with suppress(OSError):  # a cache that cannot be written is a cache that stays cold
            self._marker().parent.mkdir(parents=True, exist_ok=True)
            self._marker().touch()

    def _marker(self) -> Path:
        made_by = f"{torch.__version__} {_own_version()} {self.kind}"
        return Path(cache_dir()) / "calipers" / sha256(made_by.encode()).hexdigest()[:20]


@functools.cache
def _own_version() -> str:
    return version("calipers")


def count_work(kind: str, values: int) -> Work:
    """Add values to what was searched with this kind of search."""
    _searched[kind] += values
    return Work(kind, _searched[kind])


def compile_quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for vector code on the CPU, without the warnings that it raises as it works."""
    function = _with_own_code(function)
    # One rounding for a product and its sum: faster, and nearer to the exact value.
    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
    with _no_warnings():
        compiled = torch.compile(function, options=options)

    @functools.wraps(function)
    def quiet(*inputs: Any) -> Any:
        with _no_warnings():
            return compiled(*inputs)

    return quiet


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function with a copy of its code.

    torch counts compilations by code and gives up, silently, after eight: those of one kind of
    search must not count for the others that the same lines make.
    """
    if isinstance(function, MethodType):
        return MethodType(_with_own_code(function.__func__), function.__self__)
    assert isinstance(function, FunctionType)
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep to itself what torch.compile remarks upon while it works: it is not the user's code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
