"""``lexibit info``: what computes here, and why."""

from __future__ import annotations

import platform

import torch
import transformers

from lexibit import __version__
from lexibit.cli.show import Json, console, print_json
from lexibit.ops import COMPUTE, native


def info(json: Json = False) -> None:
    """Show the versions, and which kernels run weights in codes on this machine, and why.

    LEXIBIT_KERNELS chooses others, by name.

    [bold]Examples[/]

    lexibit info

    LEXIBIT_KERNELS=reference lexibit info --json
    """
    choice = native.chosen()
    dtypes = [str(dtype).removeprefix("torch.") for dtype in native.DTYPES]
    compute = [one for one in COMPUTE if native.supports(one)]
    found = {
        "lexibit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "kernels": choice.name,
        "why": choice.why,
        "available": native.available(),
        "dtypes": dtypes,
        "compute": compute,
        "threads": torch.get_num_threads() if choice.name == native.REFERENCE or native.parallel() else 1,
    }
    if json:
        print_json(found)
        return
    packages = ", ".join(f"{name} {found[name]}" for name in ("lexibit", "torch", "transformers", "python"))
    console.print(f"{packages}, {found['machine']}", highlight=False)
    console.print(f"kernels: [bold]{choice.name}[/], {choice.why}", highlight=False)
    if choice.name != native.REFERENCE:
        console.print(
            f"         for products in {', '.join(compute)}; of another dtype, or on another device, "
            "PyTorch's own operations decode",
            highlight=False,
        )
    console.print(f"threads: {found['threads']}", highlight=False)
