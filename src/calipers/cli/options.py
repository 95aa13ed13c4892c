"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from calipers._words import check_choice
from calipers.calibration.parts import Only
from calipers.observers.plugins import load_plugin

__all__ = [
    "ActivationObserver",
    "ActivationShadow",
    "DataFile",
    "DataSamples",
    "Device",
    "Dtype",
    "EnoughTokens",
    "EvalFile",
    "EvalSamples",
    "Force",
    "GroupSize",
    "Ignore",
    "Json",
    "KVCache",
    "ModelFolder",
    "NoLoadCheck",
    "ObserverOption",
    "OnFew",
    "OnUnfit",
    "OnlyPart",
    "Out",
    "Pick",
    "Plugins",
    "Scheme",
    "SequenceLength",
    "Shadow",
    "StatisticsFile",
    "known_part",
    "load_plugins",
]

ActivationObserver: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Observer of static activations and of the cache. "
        "Default: the scheme's, else static_minmax."
    ),
]
Shadow: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]",
        help="Another observer of weights, with options of its own, that sees the same in the "
        "same pass: the report compares all of them on batches held out. May be repeated.",
    ),
]
ActivationShadow: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[:KEY=VALUE,...]",
        help="Another observer of static activations and of the cache; may be repeated.",
    ),
]
Pick: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Whose scales are taken where there are shadows: first (the observer's) or best "
        "(in each module those of the least error)."
    ),
]
DataFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Calibration data: .txt, .jsonl, .json, .csv, .parquet or a folder saved by "
        "datasets (FOLDER:SPLIT). Samples of a model that sees or hears may name files of images. "
        "Default: the embedded calibration text.",
    ),
]
DataSamples: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Most sequences to calibrate with.")
]
EvalFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--eval",
        metavar="FILE",
        help="Text to judge by, of any kind that --data takes. "
        "Default: the embedded held-out text.",
    ),
]
EvalSamples: TypeAlias = Annotated[int, typer.Option(min=1, help="Most sequences to judge by.")]
GroupSize: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, help="Columns of a group of weights. Default: the scheme's (W4A16: 128)."),
]
KVCache: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        metavar="WORD",
        help="Quantize keys and values of the cache: fp8, int8 (one scale a layer), fp8-head or "
        "int8-head (one a head); alone with --scheme UNQUANTIZED. Default: the scheme's, else "
        "none.",
    ),
]
StatisticsFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--statistics",
        metavar="FILE",
        help="What `calipers observe` gathered, in place of data: nothing is run.",
    ),
]
OnFew: TypeAlias = Annotated[
    str,
    typer.Option(
        "--on-few-tokens",
        help="Experts that see few tokens: shrink (mix their statistics with those of all "
        "experts of the layer), pooled (take those), own or error.",
    ),
]
EnoughTokens: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Tokens from which an expert stands alone.")
]
Scheme: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="A preset (see `calipers schemes`) or a YAML file. Default: W4A16, in a group "
        "size that divides the columns of all modules."
    ),
]
ObserverOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="An option of the observer; may be repeated."),
]
OnUnfit: TypeAlias = Annotated[
    str,
    typer.Option(
        help="Modules whose columns the group size does not divide, or that --out could not "
        "be loaded back with: error, skip."
    ),
]
Out: TypeAlias = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where to write the checkpoint.")
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")]
NoLoadCheck: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--no-load-check",
        help="Do not try first, on a small twin of the model, whether DIR would load back.",
    ),
]
SequenceLength: TypeAlias = Annotated[int, typer.Option(min=2, help="Most tokens of a sequence.")]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="Where to run. Default: a GPU if there is one.")
]
Dtype: TypeAlias = Annotated[str, typer.Option(help="As float32; auto: as stored.")]
Ignore: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Module name, class name or re:REGEX to leave alone, with all it contains; "
        "may be repeated. Output heads and routers are left alone in any case.",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
ModelFolder: TypeAlias = Annotated[
    Path | None,
    typer.Argument(help="A local transformers directory; left out: the embedded demo model."),
]
OnlyPart: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--only",
        metavar="PART",
        help="language: quantize the language part alone of a model that sees or hears as well. "
        "Default: the whole model.",
    ),
]
Plugins: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="MODULE_OR_FILE.py",
        help="Import this first: it registers observers of your own; may be repeated.",
    ),
]


def known_part(only: str | None) -> Only | None:
    """What was given with `--only`; an unknown word is a CalipersError."""
    if only is not None:
        check_choice("--only", only, Only)
    return only  # type: ignore[return-value]  # checked


def load_plugins(plugins: list[str] | None) -> None:
    """Import all that was given with `--plugin`; one that cannot be imported is a CalipersError."""
    for plugin in plugins or ():
        load_plugin(plugin)
