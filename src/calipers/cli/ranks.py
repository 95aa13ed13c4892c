"""The command as one of several ranks, started by torchrun."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from calipers.calibration.batches import Progress
from calipers.distributed import Ranks

__all__ = ["RankTimeout", "showing_life"]

RankTimeout: TypeAlias = Annotated[
    float,
    typer.Option(
        min=1,
        help="Under torchrun: seconds to wait for a rank that shows no sign of life.",
    ),
]


def showing_life(ranks: Ranks, progress: Progress) -> Progress:
    """Progress that is a sign of life for ranks which wait; shown by the first one alone."""

    def advance(stage: str, done: int, total: int | None) -> None:
        ranks.show_life()
        if ranks.rank == 0:
            progress(stage, done, total)

    return advance
