"""``lexibit sensitivity``: which weights mind being quantized."""

from __future__ import annotations

from dataclasses import asdict

from rich.markup import escape

from lexibit import checkpoint
from lexibit.cli.measures import BatchSize, Data, Limit, TaskName, Text, measures
from lexibit.cli.options import Model, takes_config
from lexibit.cli.show import Json, console, print_json, print_score, table
from lexibit.config import LexibitConfig
from lexibit.errors import LexibitError
from lexibit.sensitivity import sensitivity as rank


@takes_config
def sensitivity(
    model: Model,
    config: LexibitConfig,
    text: Text = None,
    task: TaskName = None,
    data: Data = None,
    limit: Limit = None,
    batch_size: BatchSize = 16,
    json: Json = False,
) -> None:
    """Quantize one weight at a time, and rank the damage each does.

    On text, damage is the distance of the model's outputs to those of the float model; on a task, the drop
    of the score.

    [bold]Examples[/]

    lexibit sensitivity ./my-bert --bits 3 --text sentences.txt

    lexibit sensitivity ./minilm --scheme binary --bits 2 --task sts --data ./data --limit 300 --json
    """
    folder = checkpoint.find(model)
    if not folder.is_dir():
        raise LexibitError(f"{model}: outputs need a model's folder, not a file of weights")
    loaded = checkpoint.load_float(folder)
    if text is None and task is None:
        raise LexibitError("give --text FILE, or --task NAME and --data DIR, to measure the damage on")
    judges = measures(
        folder,
        loaded,
        text=text,
        task=task,
        data=data,
        limit=limit,
        batch_size=batch_size,
        seed=config.seed,
    )
    ranked = rank(
        loaded,
        config,
        reference=judges.reference,
        score=judges.score,
        progress=not json and console.is_terminal,
    )
    if json:
        print_json({"model": model, "config": config.to_dict(), **asdict(ranked)})
        return
    scored = judges.score is not None
    columns = ["weight", "#stored", "#error", *(["#drop", "#score"] if scored else [])]
    shown = table(
        f"{model}, one weight quantized at a time", *columns, *(["#outputs", "#cosine"] if text else [])
    )
    for one in ranked.weights:
        row = [f"{escape(one.name)}\n[dim]{one.kind}, {one.weights:,} weights[/]"]
        row += [f"{one.bits_per_weight:.3f}", f"{one.error:.5f}"]
        row += [f"{one.drop:+.2f}", f"{one.score:.2f}"] if one.drop is not None else []
        row += [f"{one.output_error:.2e}", f"{one.cosine:.5f}"] if one.output_error is not None else []
        shown.add_row(*row)
    console.print(shown)
    console.print(
        "stored: bits a weight takes; error: |W - W^|^2 / |W|^2"
        + ("; outputs: |A - B|^2 / |A|^2 of the model's outputs" if text else "")
        + ("; drop: of the task's score" if scored else ""),
        style="dim",
    )
    if ranked.float_score is not None:
        print_score("the float model", ranked.float_score)
