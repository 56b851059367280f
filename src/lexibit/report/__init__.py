"""Reports: one HTML page, which needs no other file, of a quantized model or of a study of many.

Only :mod:`lexibit.description` works without the packages of the extra ``report``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lexibit.errors import LexibitError, needs_extra
from lexibit.scores import ScoreLine

__all__ = ["of_checkpoint", "of_study"]


def of_checkpoint(
    folder: Path,
    against: Path | None = None,
    search: Path | None = None,
    scores: Sequence[ScoreLine] = (),
) -> str:
    """The report on a quantized folder or file as HTML.

    Args:
        folder: quantized.
        against: the float model that it was made from, for errors and histograms.
        search: the plan of ``lexibit search``; if not given, the folder's ``search.json`` if it has one.
        scores: of the model (:func:`lexibit.scores.read_scores`).

    Raises:
        LexibitError: the folder is not quantized, the float model is another, the plan is none, or the extra
            ``report`` is not installed.
    """
    with needs_extra("report"):
        from lexibit.report.checkpoint import checkpoint_page
    return checkpoint_page(folder, against, search, scores)


def of_study(folder: Path) -> str:
    """The report on a study's folder as HTML.

    Raises:
        LexibitError: it is no study, has no results yet, or the extra ``report`` is not installed.
    """
    with needs_extra("report"):
        from lexibit.report.study import render_study
    from lexibit import study

    results = study.results(folder)
    if results.empty:
        raise LexibitError(f"{folder}: the study has no results yet: run it first")
    return render_study(study.about(folder), results, lambda model: study.weights(folder, model))
