"""The table: means, spreads and shares against a hand's count, and what stands in each form of text."""

from __future__ import annotations

import io
import math
import re

import pandas as pd
import pytest

from lexibit import LexibitError
from lexibit.study import Store, table, written

NAN = math.nan


def row(cell, task, scheme, bits, score, *, tuned=False, seed=0, low=NAN, high=NAN, higher=True, **more):
    metric = more.pop("metric", "accuracy x 100" if higher else "perplexity")
    return {
        "cell": cell,
        "study": "s",
        "model": "m",
        "task": task,
        "scheme": scheme,
        "bits": bits,
        "groups": None,
        "importance": None,
        "tuned": tuned,
        "seed": seed,
        "metric": metric,
        "score": score,
        "low": low,
        "high": high,
        "higher": higher,
        "examples": 50,
        "bytes": 32_000_000 if scheme == "float" else 4_000_000,
        "bits_per_weight": 32.0 if scheme == "float" else 3.1,
    } | more


@pytest.fixture
def study(tmp_path):
    """A function that makes a study's folder of some rows."""

    def make(rows, **about):
        store = Store(tmp_path / "s")
        cells = list(dict.fromkeys(one["cell"] for one in rows))
        store.begin({"cells": cells} | about)
        for cell in cells:
            store.write_rows(cell, [one for one in rows if one["cell"] == cell])
        return tmp_path / "s"

    return make


TWO_TASKS = [
    row("a", "mrpc", "float", 32, 80.0, low=70.0, high=90.0),
    row("a", "mrpc", "float", 32, 85.0, metric="F1 x 100"),
    row("b", "rte", "float", 32, 60.0, low=50.0, high=70.0),
    row("c", "mrpc", "k-means", 3, 72.0, low=62.0, high=82.0),
    row("c", "mrpc", "k-means", 3, 79.0, metric="F1 x 100"),
    row("d", "rte", "k-means", 3, 54.0, low=44.0, high=64.0),
]


def test_a_line_has_scores_their_average_and_what_is_kept(study):
    made = table(study(TWO_TASKS))
    assert made.labels == ("scheme", "bits")
    assert made.tasks == {"mrpc": "accuracy x 100", "rte": "accuracy x 100"}
    first, second = made.lines
    assert first["mrpc"] == (80.0, 70.0, 90.0)
    assert (first["average"], first["kept"], first["MB"]) == (70.0, 1.0, 32.0)
    assert (second["average"], second["kept"]) == (63.0, 0.9)
    assert (second["MB"], second["smaller"], second["bits_per_weight"]) == (4.0, 8.0, 3.1)


def test_of_several_seeds_it_has_the_mean_and_the_range(study):
    rows = [
        row(f"{scheme}{seed}", "mrpc", scheme, bits, score, seed=seed, low=0.0, high=100.0)
        for scheme, bits, scores in (("float", 32, (80.0, 84.0)), ("k-means", 3, (60.0, NAN)))
        for seed, score in enumerate(scores)
    ]
    made = table(study(rows))
    assert made.seeds == 2
    assert made.lines[0]["mrpc"] == (82.0, 80.0, 84.0)
    # a score that is none is the worst there is
    assert made.lines[1]["mrpc"] == (30.0, 0.0, 60.0)
    assert made.lines[1]["kept"] == pytest.approx(30 / 82)
    assert "Means over 2 seeds" in written(made, "markdown")


def test_perplexities_keep_the_other_way_round(study):
    rows = [
        row("a", "wikitext-2", "float", 32, 20.0, higher=False),
        row("b", "wikitext-2", "k-means", 3, 25.0, higher=False),
    ]
    assert table(study(rows)).lines[1]["kept"] == 0.8


def test_a_perplexity_that_is_none_keeps_nothing(study):
    rows = [
        row(f"{scheme}{seed}", "wikitext-2", scheme, bits, score, seed=seed, higher=False)
        for scheme, bits, scores in (("float", 32, (20.0, 20.0)), ("k-means", 3, (40.0, NAN)))
        for seed, score in enumerate(scores)
    ]
    made = table(study(rows))
    assert made.lines[1]["wikitext-2"] == (math.inf, 40.0, math.inf)
    assert made.lines[1]["kept"] == 0
    assert "| inf (40.0 to inf) | 0.0 % |" in written(made, "markdown")


def test_a_line_that_lacks_a_seed_says_so_and_is_held_against_the_same_seeds(study):
    rows = [
        row("a", "mrpc", "float", 32, 80.0, seed=0, low=0.0, high=100.0),
        row("b", "mrpc", "float", 32, 60.0, seed=1, low=0.0, high=100.0),
        row("c", "mrpc", "k-means", 3, 40.0, seed=0, low=0.0, high=100.0),
    ]
    made = table(study(rows))
    assert made.lines[1]["mrpc"] == (40.0, 40.0, 40.0)
    assert made.lines[1]["kept"] == 0.5
    assert made.few == ["m, mrpc, k-means, 3 bits: 1 of 2 seeds"]
    assert "Only m, mrpc, k-means, 3 bits: 1 of 2 seeds" in written(made, "markdown")


def test_kinds_of_metrics_that_differ_have_no_share(study):
    rows = [row("a", "mrpc", "float", 32, 80.0), row("b", "wikitext-2", "float", 32, 20.0, higher=False)]
    assert table(study(rows)).lines[0]["kept"] is None


def test_a_line_without_all_tasks_has_no_average(study):
    made = table(study(TWO_TASKS[:-1]))
    assert made.lines[1]["average"] is None
    assert made.lines[1]["rte"] is None


def test_another_metric_may_be_asked_for(study):
    made = table(study(TWO_TASKS), metric="F1 x 100")
    assert made.tasks == {"mrpc": "F1 x 100"}
    assert made.lines[1]["mrpc"][0] == 79.0
    with pytest.raises(LexibitError, match="unknown metric 'F1 x 10': did you mean 'F1 x 100'"):
        table(study(TWO_TASKS), metric="F1 x 10")


def test_cells_that_failed_are_listed_with_their_errors(study):
    failed = row("e", "rte", "linear", 2, NAN) | {"metric": None, "error": "lexibit quantize: no space"}
    text = written(table(study([*TWO_TASKS, failed])), "markdown")
    assert "Failed: m, rte, linear, 2 bits, seed 0: lexibit quantize: no space" in text
    assert len(table(study([*TWO_TASKS, failed])).lines) == 2


def test_published_cells_stand_beside_those_of_the_same_experiment(study):
    schemes = {"k-means": {"scheme": "kmeans", "option": {"init": "k-means++"}}}
    tuned = [one | {"tuned": one["scheme"] != "float"} for one in TWO_TASKS]
    made = table(study(tuned, schemes=schemes), model="bert-base-uncased")
    sources = [line["source"] for line in made.lines]
    assert sources == [
        None,
        "Zhao et al. 2020, Table 1: bert-base-uncased",
        None,
        "Zhao et al. 2020, Table 2: bert-base-uncased",
    ]
    papers = made.lines[3]
    assert (papers["mrpc"][0], papers["rte"][0]) == (86.0, 70.0)
    assert papers["average"] == 78.0
    assert papers["kept"] == pytest.approx(78.0 / ((86.3 + 72.2) / 2))
    # before tuning the paper says nothing
    assert [line["source"] for line in table(study(TWO_TASKS), model="bert-base-uncased").lines][2:] == [None]
    text = written(table(study(TWO_TASKS[3:]), model="albert-base-v2"), "markdown")
    assert "Nothing that papers print for albert-base-v2 is of the same experiment" in text


def test_what_a_paper_says_of_all_tasks_is_what_is_kept(study):
    rows = [one | {"scheme": "OCS" if one["bits"] == 3 else "float"} for one in TWO_TASKS]
    made = table(
        study(rows, schemes={"OCS": {"scheme": "ocs", "option": {"ratio": 0.05}}}), model="bert-base"
    )
    assert [line["source"] for line in made.lines] == [
        None,
        None,
        "Hu, Meinel, Yang 2022, abstract: bert-base",
    ]
    assert made.lines[2]["kept"] == 0.98
    assert made.lines[2]["mrpc"] is None


def test_another_metric_than_the_papers_has_nothing_beside_it(study):
    made = table(study(TWO_TASKS), model="bert-base-uncased", metric="F1 x 100")
    assert made.lines[1]["mrpc"][0] == 90.4
    rows = [one | {"metric": one["metric"].replace("F1", "macro F1")} for one in TWO_TASKS]
    made = table(study(rows), model="bert-base-uncased", metric="macro F1 x 100")
    assert [line["source"] for line in made.lines] == [None, None]


def test_a_study_may_choose_what_stands_beside_each_model(study):
    made = table(study(TWO_TASKS, published={"m": "albert-base-v2"}))
    assert made.lines[1]["source"] == "Zhao et al. 2020, Table 3: albert-base-v2"
    with pytest.raises(LexibitError, match="unknown model of published numbers 'bert'"):
        table(study(TWO_TASKS), model="bert")


def test_markdown_has_a_cell_for_each_column(study):
    piped = [one | {"scheme": "a|b" if one["bits"] == 3 else "float"} for one in TWO_TASKS]
    text = written(table(study(piped)), "markdown")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in lines} == {10}
    assert (
        "| a\\|b | 3 | 4 | 8.0x | 3.100 | 72.00 (62.0 to 82.0) | 54.00 (44.0 to 64.0) | 63.00 | 90.0 % |"
        in text
    )
    assert "mrpc: accuracy x 100, 50 examples" in text


def test_csv_is_read_back_as_the_same_numbers(study):
    found = pd.read_csv(io.StringIO(written(table(study(TWO_TASKS)), "csv")))
    assert list(found["mrpc"]) == [80.0, 72.0]
    assert list(found["mrpc_low"]) == [70.0, 62.0]
    assert list(found["kept"]) == [1.0, 0.9]


def test_latex_escapes_what_it_would_take_for_itself(study):
    rows = [one | {"scheme": "OCS 5 %_&" if one["scheme"] != "float" else "float"} for one in TWO_TASKS]
    text = written(table(study(rows)), "latex")
    assert r"OCS 5 \%\_\&" in text
    assert text.count(r"\\") == 3
    assert r"\begin{tabular}{llrrrrrrr}" in text


def test_names_cannot_break_out_of_a_table(study):
    evil = "a\\|<b>\nc"
    rows = [one | {"scheme": evil if one["bits"] == 3 else "float", "model": evil} for one in TWO_TASKS]
    failed = row("e", "rte", evil, 2, NAN) | {"metric": None, "model": evil, "error": "x\n\\input{y}"}
    made = table(study([*rows, failed]))
    markdown = written(made, "markdown")
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.split(r"(?<!\\)\|", line.replace(r"\\", ""))) == 11 for line in lines)
    assert "<b>" not in markdown.replace(r"\<b>", "")
    # a comment is a line
    assert all(line[:1] in "%\\af" or "scheme" in line for line in written(made, "latex").splitlines())


def test_an_error_of_several_cells_is_told_once(study):
    cells = [row(f"e{bits}", "rte", "k-means", bits, NAN) | {"metric": None, "error": "x"} for bits in (2, 3)]
    made = table(study([*TWO_TASKS[:3], *cells]))
    assert made.failed == ["m, rte, k-means, 2 bits, seed 0; m, rte, k-means, 3 bits, seed 0: x"]


def test_a_study_of_which_all_failed_says_why(study):
    failed = row("e", "rte", "k-means", 2, NAN) | {"metric": None, "error": "no space"}
    made = table(study([failed]))
    assert written(made, "markdown").strip() == "Failed: m, rte, k-means, 2 bits, seed 0: no space"
    assert written(made, "csv").startswith("model,scheme,")


def test_wrong_usage_is_one_message(study, tmp_path):
    with pytest.raises(LexibitError, match="unknown format 'html'"):
        written(table(study(TWO_TASKS)), "html")
    with pytest.raises(LexibitError, match="is no study's folder"):
        table(tmp_path / "none")
    empty = Store(tmp_path / "empty")
    empty.begin({"cells": []})
    with pytest.raises(LexibitError, match="has no results yet"):
        table(tmp_path / "empty")
