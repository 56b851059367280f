"""``lexibit quantize``: a model into a new, smaller folder."""

from __future__ import annotations

import json as read_json
import time
from pathlib import Path
from typing import Annotated

import typer

from lexibit import checkpoint, memory
from lexibit.checkpoint import streaming
from lexibit.cli.calibrating import Calibrate, Data, Length, Texts, calibrating
from lexibit.cli.options import Model, takes_plan
from lexibit.cli.show import Json, console, print_json, size
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError


@takes_plan
def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(help="The new folder; must not exist yet, or be empty.")],
    config: LexibitConfig,
    search: Path | None,
    calibrate: Calibrate = None,
    data: Data = None,
    texts: Texts = None,
    length: Length = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help="What weights may take while they are worked on, like 2GB: as many at once as fit. The "
            "program takes some by itself. All that is free, if not given.",
            metavar="SIZE",
        ),
    ] = None,
    shard_size: Annotated[
        str, typer.Option(help="No file grows above this, but for one tensor.", metavar="SIZE")
    ] = "50GB",
    ray: Annotated[
        str | None,
        typer.Option(
            help="Quantize on the machines of a Ray cluster, which all see MODEL under the same path: its "
            "address, or auto.",
            metavar="ADDRESS",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Quantize a model into a new folder, really packed.

    The folder is loaded with from_pretrained after 'import lexibit'. A plan of lexibit search is kept in it,
    as search.json.

    With --calibrate a text file is enough to keep more of a model, most of all at 2 and 3 bits; what became
    of each weight is kept as calibration.json.

    Weights are read, quantized and written one by one, so that a checkpoint may be larger than memory; only
    calibration, and a model that transformers makes something else of, load the model as a whole. A run that
    was killed goes on when the same command is given again.

    [bold]Examples[/]

    lexibit quantize sentence-transformers/all-MiniLM-L6-v2 ./minilm-4bit

    lexibit quantize ./my-bert ./my-bert-2bit --bits 2 --calibrate my-texts.txt

    lexibit quantize ./my-bert ./my-bert-2bit --bits 2 --outliers 0.001 --calibrate my-texts.txt

    lexibit quantize ./my-bert ./my-bert-3bit --bits 3 --groups row --levels-dtype float16

    lexibit quantize ./my-bert ./paper --bits 3 --option init=k-means++ --option iterations=3

    lexibit quantize ./my-bert ./mixed --bits 3 --rule '*embeddings* bits=4 scheme=linear'

    lexibit quantize ./my-llama ./llama-4bit --scheme lq --groups row --memory 2GB --shard-size 5GB
    """
    start = time.perf_counter()
    workers = _workers(max_memory, ray)
    shard_bytes = memory.parse(shard_size, "--shard-size")
    source = checkpoint.find(model)
    plan, nbytes = checkpoint.quantize_to(
        source,
        out,
        config,
        progress=not json and console.is_terminal,
        beside={} if search is None else {"search.json": search.read_bytes()},
        calibrate=calibrating(source, out, calibrate, data, texts, length, config.seed),
        shard_size=shard_bytes,
        workers=workers,
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
    how = "not calibrated: --calibrate TEXT keeps more of the model"
    if calibrate is not None:
        how = f"calibrated on {calibrate}{_lost(out / checkpoint.CALIBRATION)}"
    console.print(
        f"{config.scheme}, levels in {config.levels_dtype} shared by {config.recipe().groups}; {how}",
        style="dim",
        highlight=False,
    )


def _workers(max_memory: str | None, ray: str | None) -> streaming.Workers | None:
    if ray is not None:
        if max_memory is not None:
            raise LexibitError("--memory is of this machine, and --ray leaves the work to others: give one")
        return streaming.Cluster(ray)
    return None if max_memory is None else streaming.Local(memory.parse(max_memory, "--memory"))


def _lost(file: Path) -> str:
    """What the outputs of a layer lose in the mean, calibrated and not."""
    told = read_json.loads(file.read_text(encoding="utf-8"))
    lost = [(one["before"], one["after"]) for one in told if one["before"] is not None]
    if not lost:
        return ""
    before, after = (sum(side) / len(lost) for side in zip(*lost, strict=True))
    return (
        f": in the mean a layer's outputs lose {after:.1%}, and {before:.1%} by the scheme alone (each in "
        f"{file.name})"
    )
