"""Options that several commands have, spelled out once."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

__all__ = ["ActivationObserver", "DataSamples", "Device", "Dtype", "SequenceLength"]

ActivationObserver: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Observer of static activations. Default: the scheme's, else static_minmax."),
]
DataSamples: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Most sequences to calibrate with.")
]
SequenceLength: TypeAlias = Annotated[int, typer.Option(min=2, help="Most tokens of a sequence.")]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="Where to run. Default: a GPU if there is one.")
]
Dtype: TypeAlias = Annotated[str, typer.Option(help="As float32; auto: as stored.")]
