"""``lexibit bench``: how fast a quantized model runs here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from lexibit import benchmark, checkpoint
from lexibit.cli.options import Model, takes_config
from lexibit.cli.show import Json, console, print_json, size, table
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.files import write_json
from lexibit.nn import codebooks
from lexibit.quantize import quantize


@takes_config
def bench(
    model: Model,
    config: LexibitConfig,
    texts: Annotated[str, typer.Option(help="Texts at a time, like 1,8.")] = "1,8",
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a text, like 16,128; these, or as many as the model takes, if not given."
        ),
    ] = None,
    threads: Annotated[
        str | None, typer.Option(help="Threads, like 1,2; as many as PyTorch uses if not given.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How many times each runs.", min=1)] = 15,
    peers: Annotated[
        bool, typer.Option("--peers", help="Beside PyTorch's bf16 and int8, ONNX Runtime and OpenVINO.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the result to this JSON file.")] = None,
    json: Json = False,
) -> None:
    """Time a quantized model against float32 on this machine, on random tokens.

    A float model is quantized first, as the options say. The float32 model has the very weights that the
    codes stand for, and everyone runs in turn in this process: compare the ratios. Sizes are those of all
    weights in memory, biases and norms too. Results vary less under OMP_WAIT_POLICY=PASSIVE on a machine that
    others use.

    [bold]Examples[/]

    lexibit bench ./my-bert-3bit

    lexibit bench ./my-bert --bits 3 --groups row --threads 1,2 --peers
    """
    folder = checkpoint.find(model)
    if folder.is_file():
        raise LexibitError(f"{model}: to be timed a model must run: give its folder, not a file of weights")
    loaded = checkpoint.load_model(folder)
    if not codebooks(loaded):
        quantize(loaded, config, progress=not json and console.is_terminal)
    elif config.to_dict() != LexibitConfig.recommended().to_dict():
        raise LexibitError(f"{model} is quantized already: leave the options that say how out")
    found = benchmark.bench(
        loaded,
        texts=_counts("--texts", texts),
        tokens=None if tokens is None else _counts("--tokens", tokens),
        threads=None if threads is None else _counts("--threads", threads),
        others=peers,
        rounds=rounds,
        seed=config.seed,
        progress=not json and console.is_terminal,
    )
    if out is not None:
        write_json(out, asdict(found))
    if json:
        print_json(asdict(found))
        return
    console.print(_table(model, found))
    told = ", ".join(f"{name} {value}" for name, value in found.machine.items() if value)
    console.print(f"medians of {found.rounds} rounds, and quartiles; {told}", style="dim", highlight=False)


def _counts(option: str, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise LexibitError(f"{option} {text!r}: give whole numbers from 1, like 1,8")
    return counts


def _table(model: str, found: benchmark.Bench) -> Table:
    shown = table(
        model, "model", "#size", "#threads", "#texts", "#tokens", "#ms", "#quartiles", "#x", "#cosine"
    )
    for one in found.timings:
        shown.add_row(
            one.name,
            size(found.bytes[one.name]),
            *map(str, (one.threads, one.texts, one.tokens)),
            f"{1e3 * one.seconds:.1f}",
            f"{1e3 * one.low:.1f}-{1e3 * one.high:.1f}",
            f"{one.times:.2f}",
            f"{one.cosine:.4f}",
        )
    return shown
