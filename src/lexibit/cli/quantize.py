"""``lexibit quantize``: a model into a new, smaller folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from lexibit import checkpoint
from lexibit.cli.options import Model, takes_plan
from lexibit.cli.show import Json, console, print_json, size
from lexibit.config import LexibitConfig


@takes_plan
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The new folder; must not exist yet.")],
    config: LexibitConfig,
    search: Path | None,
    json: Json = False,
) -> None:
    """Quantize a model into a new folder, really packed.

    The folder is loaded with from_pretrained after 'import lexibit'. A plan of lexibit search is kept in it,
    as search.json.

    [bold]Examples[/]

    lexibit quantize sentence-transformers/all-MiniLM-L6-v2 ./minilm-4bit

    lexibit quantize ./my-bert ./my-bert-3bit --bits 3 --groups row --levels-dtype float16

    lexibit quantize ./my-bert ./paper --bits 3 --option init=k-means++ --option iterations=3

    lexibit quantize ./my-bert ./mixed --bits 3 --rule '*embeddings* bits=4 scheme=linear'
    """
    start = time.perf_counter()
    plan, nbytes = checkpoint.quantize_to(
        checkpoint.find(model),
        out,
        config,
        progress=not json and console.is_terminal,
        beside={} if search is None else {"search.json": search.read_bytes()},
    )
    seconds = time.perf_counter() - start
    if json:
        totals = {"out": str(out), "file_bytes": nbytes, "seconds": seconds}
        print_json(totals | plan.to_dict())
        return
    console.print(
        f"[bold]{out}[/]: {len(plan.weights)} weights in {plan.bits_per_weight:.3f} stored bits "
        f"each; {size(plan.bytes_before)} of parameters -> {size(nbytes)} on disk, "
        f"{plan.bytes_before / nbytes:.2f}x smaller; {seconds:.1f} s",
        highlight=False,
    )
