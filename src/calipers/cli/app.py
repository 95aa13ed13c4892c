"""The commands, put together."""

from __future__ import annotations

from typing import Annotated

import typer

from calipers import __version__
from calipers.cli.calibrate import calibrate
from calipers.cli.commands import CONTEXT, Command, Group
from calipers.cli.compare import compare
from calipers.cli.convert import convert
from calipers.cli.coverage import coverage
from calipers.cli.demo import demo
from calipers.cli.doctor import doctor
from calipers.cli.evaluate import evaluate
from calipers.cli.inspect import inspect
from calipers.cli.listings import observers, schemes
from calipers.cli.merge import merge
from calipers.cli.observe import observe
from calipers.cli.plan import plan
from calipers.cli.quantize import quantize
from calipers.cli.report import report

__all__ = ["app"]

app = typer.Typer(
    cls=Group,
    context_settings=CONTEXT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a fault of ours shows as Python's own traceback
    help="Measure tensors, pick quantization scales, write compressed-tensors checkpoints.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


for _command in (
    calibrate,
    quantize,
    evaluate,
    compare,
    report,
    plan,
    observe,
    merge,
    inspect,
    convert,
    coverage,
    demo,
    observers,
    schemes,
    doctor,
):
    app.command(cls=Command, context_settings=CONTEXT)(_command)
