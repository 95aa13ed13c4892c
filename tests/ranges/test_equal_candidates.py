"""Where candidates are equal up to rounding the native grid takes the step of the reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs

from calipers.ranges import ShrinkGrid, group_values, min_max, search_grid_ranges

GRIDS = [(5, 0.2, 100, 1.0), (1000, 1 - 0.8 / 1.8, 200, 1.8)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("norm", [1.0, 2.4, 5.0, 100.0])
@pytest.mark.parametrize("values", ["single", "two", "constant"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_references_step(bits, values, norm, grid):
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(64, 1, generator=generator)
    pick = torch.rand(64, 32, generator=generator) < 0.5
    x = {"single": size, "two": torch.where(pick, 1.3, -0.7) * size, "constant": size.repeat(1, 32)}
    args = QuantizationArgs(num_bits=bits, strategy="channel")
    views = group_values(x[values], "weight", args)
    patience, maxshrink, steps, expand = grid
    shrink = ShrinkGrid(maxshrink, steps, patience, norm, expand)
    (eager,), (native,) = (
        search_grid_ranges(views, [min_max(views[0])], args, shrink, engine=engine)
        for engine in ("eager", "native")
    )
    assert torch.equal(eager[0], native[0])
    assert torch.equal(eager[1], native[1])
