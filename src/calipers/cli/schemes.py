"""What commands say and choose about schemes: the default, sizes of groups, words for caches."""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationConfig

from calipers.calibration import resolve_config
from calipers.calibration.checks import suggest_group_size
from calipers.calibration.config import KV_CACHES, has_free_group_size
from calipers.calibration.module_checks import find_shape_problems
from calipers.calibration.parts import Only
from calipers.calibration.targets import resolve_modules, schemes_by_target

__all__ = ["DEFAULT_SCHEME", "choose_group_size", "group_size_of", "kv_cache_of", "sized"]

DEFAULT_SCHEME = "W4A16"


def sized(group_size: int | None) -> dict[str, Any]:
    """`--group-size` as an option of a scheme."""
    return {} if group_size is None else {"group_size": group_size}


def choose_group_size(
    model: Any, patterns: tuple[str, ...], only: Only | None = None
) -> tuple[int | None, str | None]:
    """A group size for the default scheme, where its own does not fit all modules.

    Returns:
        The size, and what to say about it; None and None where the scheme's own fits, or none does.
    """
    targets = resolve_modules(model, resolve_config(DEFAULT_SCHEME, patterns), only).targets
    unfit = [each.name for each in targets if any(find_shape_problems(each))]
    size = suggest_group_size(targets) if unfit else None
    if size is None:
        return None, None
    return size, (
        f"{size}, since 128 does not divide the columns of {len(unfit)} of {len(targets)} modules"
    )


def group_size_of(config: QuantizationConfig) -> int | None:
    """The size of the groups that weights are quantized in; None without groups, or with several.

    That of a format which fixes it (NVFP4, MXFP4) is not told: nobody chooses it.
    """
    weights = [each.weights for each in schemes_by_target(config).values()]
    sizes = {args.group_size for args in weights if args and has_free_group_size(args)}
    return sizes.pop() if len(sizes) == 1 else None


def kv_cache_of(config: QuantizationConfig) -> str | None:
    """A word for what keys and values are quantized to; None where they are not."""
    args = config.kv_cache_scheme
    if args is None:
        return None
    kind, strategy = (getattr(each, "value", each) for each in (args.type, args.strategy))
    known = {(each["type"], each["strategy"]): word for word, each in KV_CACHES.items()}
    word = known.get((kind, strategy)) if args.num_bits == 8 and args.symmetric else None
    return word or f"{kind}{args.num_bits} {strategy}"
