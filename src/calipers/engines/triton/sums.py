"""Sums over groups for candidate scales on CUDA by Triton: values are loaded once for a tile."""

from __future__ import annotations

import torch
from torch import Tensor

from calipers.engines.kernels import CandidateSums, Problem
from calipers.engines.triton import launch
from calipers.engines.triton import sums_kernels as kernels
from calipers.formats import Format

__all__ = ["candidate_sums", "sum_rows", "supports"]

#: Values of a program.
TILE = 4096


def supports(problem: Problem) -> bool:
    """Whether the kernel can make sums: rows are float32, of every format."""
    return True


def sum_rows(
    number_format: Format,
    values: Tensor,
    importance: Tensor | None,
    inverse_base: Tensor,
    factor: Tensor,
    zero_point: Tensor | None,
) -> Tensor:
    """For each row and candidate the sums of `calipers.ranges.candidate_sums.Sums`, all of them.

    Args:
        number_format: The number format.
        values: Shape (rows, n), float32.
        importance: Of the same shape, >= 0; None weighs all alike.
        inverse_base: Shape (rows,): x = value * inverse_base.
        factor: Candidate scales in units of the base, shape (candidates, rows).
        zero_point: Of the same shape; None for zero.

    Returns:
        Shape (3 * candidates + 1, rows), float32: sums of w x q, of w q^2, of squared residuals,
        and of what clipping alone costs at the last candidate.
    """
    rows, length = values.shape
    count = factor.shape[0]
    values, factor = values.contiguous(), factor.contiguous()
    found = torch.empty(3 * count + 1, rows, dtype=torch.float32, device=values.device)
    block = min(TILE, launch.power_of_two(length))
    per_program = min(TILE // block, launch.power_of_two(rows))
    arguments = {
        "values": values,
        "weights": values if importance is None else importance.contiguous(),
        "inverse_base": inverse_base.contiguous(),
        "ratios": factor,
        "zeros": factor if zero_point is None else zero_point.contiguous(),
        "found": found,
        "num_rows": rows,
        "length": length,
        "count": count,
        "WEIGHTED": importance is not None,
        "SHIFTED": zero_point is not None,
        "INTEGER": number_format.integer,
        "LOWEST": number_format.low,
        "HIGHEST": number_format.high,
        "SHIFT": number_format.shift,
        "SMALLEST": number_format.smallest_bits,
        "SHORT": length <= block,
        "BLOCK_G": per_program,
        "BLOCK_N": block,
    }
    with launch.on_device(values.device):
        launch.launch(kernels.sum_candidates, -(-rows // per_program), arguments)
    return found


candidate_sums = CandidateSums(sum_rows=sum_rows)
