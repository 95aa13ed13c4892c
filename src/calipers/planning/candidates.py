"""`Candidate`: a scheme that a module may get, and the bits that it takes as stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil

import torch
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationScheme,
    QuantizationStrategy,
)

from calipers.calibration.config import SchemeLike, has_free_group_size, resolve_config
from calipers.calibration.targets import has_global_scale, schemes_by_target
from calipers.errors import SchemeError

__all__ = ["Candidate", "read_candidates", "stored_bits"]


@dataclass(frozen=True)
class Candidate:
    """A scheme of weights that may be chosen.

    Attributes:
        name: What the caller calls it: "W4A16".
        scheme: Its scheme; the targets are replaced once modules are chosen.
    """

    name: str
    scheme: QuantizationScheme

    @property
    def args(self) -> QuantizationArgs:
        """Arguments of its weights."""
        assert self.scheme.weights is not None  # read_candidates refuses others
        return self.scheme.weights


def read_candidates(
    candidates: str | Iterable[SchemeLike], group_size: int | None = None
) -> list[Candidate]:
    """Read what may be chosen from.

    Args:
        candidates: Schemes as `calibrate` takes them, or names in one string with commas.
        group_size: Columns of a group of weights, where a candidate leaves that open; None leaves
            each its own.

    Raises:
        SchemeError: No candidate or one given twice, an unknown one, one that quantizes more than
            weights, or several groups of modules in one.
    """
    listed: list[SchemeLike]
    if isinstance(candidates, str):
        listed = [each.strip() for each in candidates.split(",") if each.strip()]
    else:
        listed = list(candidates)
    if not listed:
        raise SchemeError("candidates (--candidates): expected at least one scheme, got none")
    found = [_read(each, group_size) for each in listed]
    names = [each.name for each in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SchemeError(f"candidates (--candidates): {twice} is given twice")
    return found


def _read(given: SchemeLike, group_size: int | None) -> Candidate:
    config = resolve_config(given)
    schemes = list(schemes_by_target(config).values())
    name = given.upper() if isinstance(given, str) else str(given)
    if not isinstance(given, str):
        name = type(given).__name__ if not hasattr(given, "__fspath__") else name
    if len(schemes) != 1 or schemes[0].weights is None or config.kv_cache_scheme is not None:
        raise SchemeError(
            f"candidate {name} (--candidates): expected one group of modules, with weights"
        )
    scheme = schemes[0]
    if scheme.input_activations is not None or scheme.output_activations is not None:
        raise SchemeError(
            f"candidate {name} (--candidates) quantizes activations, whose error is not predicted: "
            "expected schemes of weights alone, as W4A16, W8A16, NVFP4A16"
        )
    if group_size is not None and has_free_group_size(scheme.weights):
        config = resolve_config(config, (), {"group_size": group_size})
        scheme = next(iter(schemes_by_target(config).values()))
    return Candidate(name, scheme)


def stored_bits(args: QuantizationArgs, rows: int, columns: int, dtype: torch.dtype) -> int:
    """Bits that a weight takes in a checkpoint: codes, scales, zero points, global scale.

    Args:
        args: Its arguments.
        rows: Rows of the weight.
        columns: Columns of the weight.
        dtype: Of the unquantized weight, which is that of scales unless the format has its own.

    Returns:
        Bits without the shape that packed formats note, of 128 bits, and without headers.

    Example:
        >>> w4 = QuantizationArgs(num_bits=4, strategy="group", group_size=64)
        >>> stored_bits(w4, 8, 128, torch.bfloat16) / (8 * 128)
        4.25
    """
    strategy = args.strategy
    if strategy in (QuantizationStrategy.GROUP, QuantizationStrategy.TENSOR_GROUP):
        scales = rows * ceil(columns / (args.group_size or columns))
    elif strategy == QuantizationStrategy.CHANNEL:
        scales = rows
    elif strategy == QuantizationStrategy.BLOCK and args.block_structure is not None:
        height, width = args.block_structure
        scales = ceil(rows / height) * ceil(columns / width)
    else:
        scales = 1
    own = args.scale_dtype if isinstance(args.scale_dtype, torch.dtype) else dtype
    bits: int = rows * columns * args.num_bits + scales * own.itemsize * 8
    if not args.symmetric:
        bits += scales * args.num_bits
    return bits + 32 * has_global_scale(args)
