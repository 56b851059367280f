"""``lexibit plan``: what would be quantized, and how, without doing it."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from lexibit import checkpoint
from lexibit.cli.options import Model, takes_config
from lexibit.cli.show import Json, beside, console, print_json, size, table
from lexibit.config import LexibitConfig
from lexibit.plan import Plan

_SHOWN = 3  # names a reason is illustrated with


@takes_config
def plan(model: Model, config: LexibitConfig, json: Json = False) -> None:
    """Show what would be quantized, and how, without doing it.

    Reads the model's structure, not its weights.

    [bold]Examples[/]

    lexibit plan sentence-transformers/all-MiniLM-L6-v2 --bits 3

    lexibit plan ./my-bert --scheme linear --groups blocks:128 --exclude '*.layer.0.*'

    lexibit plan ./my-bert --bits 3 --rule '*embeddings* bits=4 groups=row' --json
    """
    made = checkpoint.plan(checkpoint.find(model, weights=False), config)
    if json:
        print_json(made.to_dict())
        return
    console.print(weights_table(made))
    if made.kept:
        console.print(kept_table(made))
    console.print(
        f"{len(made.weights)} weights, {made.covered:.1%} of the model's bytes: "
        f"{size(made.bytes_before)} -> {size(made.bytes_after)}, "
        f"{made.bits_per_weight:.3f} stored bits per quantized weight"
    )
    left = [weight for weight in made.weights if weight.why_float32]
    if left:
        console.print(
            f"in int8 or bfloat16 (lexibit.optimize) {len(left)} of them would stay in float32: "
            f"{left[0].name}, as {left[0].why_float32}",
            highlight=False,
            markup=False,
        )


def weights_table(made: Plan) -> Table:
    """A line for every weight that is quantized."""
    shown = table("Quantized", "weight", "scheme", "#bits", "#before", "#after", "#share")
    for weight in made.weights:
        shape = "x".join(map(str, weight.spec.shape))
        how = f"levels per {escape(weight.recipe.groups)}{beside(weight.spec)}"
        name = f"{escape(weight.name)}\n[dim]{shape}, {how}[/]"
        for use in weight.uses[1:]:
            name += f"\n[dim]= {escape(use.name)}[/]"
        shown.add_row(
            name,
            weight.recipe.scheme,
            str(weight.recipe.bits),
            size(weight.bytes_before),
            size(weight.bytes_after),
            f"{weight.bytes_before / max(made.bytes_before, 1):.1%}",
        )
    return shown


def kept_table(made: Plan) -> Table:
    """A line for every reason to keep parameters as they are."""
    shown = table("Kept in full precision", "why", "#parameters", "#bytes", "which")
    for reason in dict.fromkeys(kept.reason for kept in made.kept):
        same = [kept for kept in made.kept if kept.reason == reason]
        names = [escape(kept.name) for kept in same[:_SHOWN]]
        if len(same) > _SHOWN:
            names.append(f"[dim]and {len(same) - _SHOWN} more[/]")
        total = size(sum(kept.nbytes for kept in same))
        shown.add_row(escape(reason), str(len(same)), total, "\n".join(names))
    return shown
