"""What newer versions of other packages break, by test: docs/presets.md tells users the same.

`make test-latest` tries the newest versions that pip gives. A test that is listed for them may
fail; one that passes nevertheless is no error, so that a line can go once upstream is mended.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

__all__ = ["known_breakages"]


@dataclass(frozen=True)
class _Breakage:
    """Tests whose names hold one of `tests`, from a version of transformers on."""

    transformers: str
    why: str
    tests: tuple[str, ...]


_BREAKAGES = (
    _Breakage(
        "5.24",
        "attention takes the cache as `cache`, and compressed-tensors looks for `past_key_values`",
        (
            "test_attention.py::",
            "test_attention_takes_states_and_no_weights",
            "kv_cache",
            "test_a_cache_",
            "test_caches_",
            "attention-and-cache.md",
        ),
    ),
    _Breakage(
        "5.23",
        "packed zero points are expected in the shape of unpacked ones",
        ("W4A16_ASYM",),
    ),
    _Breakage(
        "5.24",
        "`dequantize=True` gives other weights under MX formats",
        ("test_mx_of_a_float32_model_dequantizes_exactly",),
    ),
    _Breakage(
        "5.24",
        "experts that were left in one tensor raise where they came back random",
        ("test_experts_that_would_come_back_random",),
    ),
)


def known_breakages(name: str) -> Iterator[str]:
    """Why a test may fail with the installed versions.

    Args:
        name: Its node id.
    """
    try:
        installed = Version(version("transformers"))
    except PackageNotFoundError:
        return
    for each in _BREAKAGES:
        if installed >= Version(each.transformers) and any(part in name for part in each.tests):
            yield f"transformers from {each.transformers} on: {each.why}"
