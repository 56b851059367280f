"""Studies: a matrix of runs at one command, resumable, on one machine or many."""

from lexibit.errors import needs_extra

with needs_extra("study"):
    from lexibit.study.cells import Cell, cells
    from lexibit.study.definition import Study, read
    from lexibit.study.runner import Done, finished, run
    from lexibit.study.store import Store, about, is_study, results, weights
    from lexibit.study.table import Table, called, table, written

__all__ = [
    "Cell",
    "Done",
    "Store",
    "Study",
    "Table",
    "about",
    "called",
    "cells",
    "finished",
    "is_study",
    "read",
    "results",
    "run",
    "table",
    "weights",
    "written",
]
