"""The command line: one file a command, each a thin cover over a Python call."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer
from rich.markup import escape
from transformers.utils.logging import disable_progress_bar

from lexibit import __version__
from lexibit.cli.bench import bench
from lexibit.cli.compare import compare
from lexibit.cli.compare_schemes import compare_schemes
from lexibit.cli.demo import demo
from lexibit.cli.dequantize import dequantize
from lexibit.cli.evaluate import evaluate
from lexibit.cli.export import export
from lexibit.cli.finetune import finetune
from lexibit.cli.info import info
from lexibit.cli.inspect import inspect
from lexibit.cli.moments import moments
from lexibit.cli.plan import plan
from lexibit.cli.push import push
from lexibit.cli.quantize import quantize
from lexibit.cli.report import report
from lexibit.cli.search import search
from lexibit.cli.sensitivity import sensitivity
from lexibit.cli.show import errors
from lexibit.cli.study import app as study
from lexibit.cli.tune import tune
from lexibit.cli.verify import verify
from lexibit.errors import LexibitError

_INTERRUPTED = 130

app = typer.Typer(
    name="lexibit",
    help="Pre-trained language models in one to eight bits.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lexibit {__version__}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the options that stand before a command."""


for command in (
    plan,
    quantize,
    inspect,
    verify,
    compare,
    sensitivity,
    compare_schemes,
    search,
    moments,
    evaluate,
    finetune,
    tune,
    bench,
    dequantize,
    export,
    report,
    push,
    demo,
    info,
):
    app.command()(command)
app.add_typer(study)


def main() -> None:
    """Run a command; exit with 0 if it succeeded, 1 if it failed, 2 for wrong usage, 130 for Ctrl-C."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        app()
    except (LexibitError, OSError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != _INTERRUPTED:
            raise
        errors.print(
            "interrupted: nothing was left half-written; quantizing, training, search, calibration and "
            "studies go on when the same command is given again"
        )
        sys.stdout.flush()
        # a thread may be in the middle of a large weight: do not wait for it
        os._exit(_INTERRUPTED)
