"""What a study takes beyond its cells' own work: a thousand cells of nothing, in processes, and once more.

    python benchmarks/study.py [CELLS]

Prints milliseconds a cell: of the first run, which does every cell in its own step, with its folder,
checksums and rows on the disk; of a second run that finds all done; and of reading the results.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lexibit.study import Cell, Store, results
from lexibit.study.pools import Processes
from lexibit.study.runner import run_cells
from lexibit.study.steps import Step


class Nothing(Step):
    """A step that measures nothing, at once."""

    def work(self, steps: Path) -> dict[str, Any]:
        """Write a score."""
        score = {"metric": "m", "value": 1.0, "low": 0.0, "high": 2.0, "higher": True, "examples": 1}
        self.out(steps).write_text(json.dumps({"scores": {"m": [score]}, "split": "dev"}))
        return {"bytes": 1, "parameters": 1, "bits_per_weight": 8.0, "bits_per_parameter": 8.0}


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    labels = {"model": "m", "task": "t", "scheme": "s", "groups": None, "importance": None, "tuned": False}
    cells = [
        Cell(labels | {"bits": 1, "seed": seed}, Nothing(f"{seed:064x}"[::-1], "evaluate"))
        for seed in range(count)
    ]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "study")
        store.begin({"cells": [cell.key for cell in cells]})
        for name in ("first run", "second run"):
            start = time.perf_counter()
            with Processes(1, 10**9) as pool:
                before, failed = run_cells(cells, store, pool, "nothing")
            seconds = time.perf_counter() - start
            print(f"{name}: {1000 * seconds / count:.2f} ms a cell ({before} done before, {failed} failed)")
        start = time.perf_counter()
        rows = len(results(store.folder))
        print(f"results: {1000 * (time.perf_counter() - start) / count:.2f} ms a cell ({rows} rows)")


if __name__ == "__main__":
    main()
