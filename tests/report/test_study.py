"""Points of a study's charts, and what a page of it holds."""

import json
import math

import pytest

from lexibit import search
from lexibit.report import plan
from lexibit.report.study import AVERAGE, mark_front, render_study, summary

ABOUT = {"name": "GLUE in few bits", "about": "What is left.", "published": None}
COLUMNS = ["task", "model", "series", "bits", "state", "score", "low", "high", "kept", "seeds"]


def points(results):
    found = [
        dict(zip([*COLUMNS, "megabytes", "stored_bits", "front"], row, strict=True))
        for row in summary(results)
    ]
    return {(one["task"], one["series"], one["bits"], one["state"]): one for one in found}


def test_seeds_are_one_point_between_the_least_and_the_most(study_results):
    found = points(study_results())
    one = found["mrpc", "kmeans", 2, "as quantized"]
    assert (one["score"], one["low"], one["high"]) == pytest.approx((72.05, 72.0, 72.1))
    assert one["seeds"] == 2
    assert one["kept"] == pytest.approx(100 * (72 / 80 + 72.1 / 80.1) / 2)


def test_one_seed_has_its_own_interval(study_results):
    one = points(study_results(seeds=[3]))["mrpc", "kmeans", 2, "tuned"]
    assert (one["low"], one["high"]) == pytest.approx((one["score"] - 2, one["score"] + 2))


def test_the_average_is_of_the_per_cent_kept_and_needs_all_tasks(study_results):
    results = study_results()
    found = points(results)
    average = found[AVERAGE, "kmeans", 2, "as quantized"]
    kept = [found[task, "kmeans", 2, "as quantized"]["kept"] for task in ("mrpc", "cola")]
    assert average["score"] == pytest.approx(sum(kept) / 2)
    assert found[AVERAGE, "float", 32, "float"]["score"] == pytest.approx(100)
    lacking = results[~((results["task"] == "cola") & (results["scheme"] == "linear"))]
    found = points(lacking)
    assert not any(task == AVERAGE and series == "linear" for task, series, *_ in found)
    assert (AVERAGE, "kmeans", 2, "tuned") in found


def test_of_one_task_there_is_no_average(study_results):
    assert {task for task, *_ in points(study_results(tasks=["mrpc"]))} == {"mrpc"}


def test_where_less_is_better_kept_is_the_other_way_round(study_results):
    results = study_results(tasks=["lm"], seeds=[0])
    results["higher"] = False
    results["score"] = 100 - results["score"]  # 20 for the float model
    found = points(results)
    assert found["lm", "kmeans", 2, "as quantized"]["kept"] == pytest.approx(100 * 20 / 28)
    assert found["lm", "float", 32, "float"]["front"]
    assert found["lm", "kmeans", 4, "tuned"]["front"]
    assert not found["lm", "linear", 4, "tuned"]["front"]


def test_the_first_metric_counts(study_results):
    results = study_results()
    second = results.assign(metric="accuracy", score=1.0)
    both = type(results)(
        [
            line
            for pair in zip(results.to_dict("records"), second.to_dict("records"), strict=True)
            for line in pair
        ]
    )
    assert points(both) == points(results)


def test_schemes_with_several_groups_are_told_apart(study_results):
    results = study_results(seeds=[0])
    other = results[results["scheme"] == "kmeans"].assign(groups="matrix", importance="E=1")
    both = type(results)([*results.to_dict("records"), *other.to_dict("records")])
    assert {series for _, series, *_ in points(both)} == {
        "float", "linear", "kmeans, row", "kmeans, matrix, E=1",
    }  # fmt: skip


def test_the_front_has_what_no_smaller_model_beats():
    rows = [
        {"megabytes": size, "score": score}
        for size, score in [
            (3, 70.0),
            (1, 50.0),
            (2, 50.0),
            (2, 60.0),
            (4, math.nan),
            (None, 99.0),
            (5, 65.0),
        ]
    ]
    mark_front(rows, higher=True)
    assert [row["front"] for row in rows] == [True, True, False, True, False, False, False]
    mark_front(rows, higher=False)
    assert [row["front"] for row in rows] == [False, True, False, False, False, False, False]


def test_the_stage_that_is_no_step_is_called_as_searches_call_it():
    assert plan._ALONE == search.ALONE


def test_scores_that_are_no_numbers_break_nothing(study_results, described):
    results = study_results(seeds=[0])
    results.loc[3, ["score", "low", "high"]] = math.nan
    results.loc[0, "score"] = math.nan  # of the float model
    found = points(results)
    assert math.isnan(found["mrpc", "kmeans", 4, "tuned"]["kept"])
    page = render_study(ABOUT, results, lambda key: described())
    json.loads(page.partition('id="data">')[2].partition("</script>")[0], parse_constant=pytest.fail)


def test_a_page_stays_small_and_says_what_it_leaves_out(study_results, described):
    weights = [
        one | {"name": f"encoder.layer.{place}.query.weight"} for place in range(200) for one in described()
    ]
    results = study_results(seeds=range(3), tasks=[f"task{place}" for place in range(30)])
    many = type(results)([*results.to_dict("records")] * 3).reset_index(drop=True)
    many["cell"] = many["model_key"] = [f"{place:016x}" for place in range(len(many))]
    many["commands"] = "lexibit quantize " + "x" * 1000
    page = render_study(ABOUT, many, lambda key: weights)
    assert len(page.encode()) < 5_000_000
    assert "models are left out here" in page
    assert "lines are left out here" in page


def test_steps_that_cells_share_are_counted_once(study_results):
    page = render_study(ABOUT, study_results(), lambda key: None)
    # for two tasks and two seeds: a fine-tuned model, six quantized, six tuned, and 13 scores
    assert f"{4 * (100 + 6 * 10 + 6 * 30 + 13 * 5) / 3600:.2f} hours" in page


def test_a_study_without_weights_or_results_says_so(study_results):
    page = render_study(ABOUT, study_results(), lambda key: None)
    assert "The study kept no details of weights" in page
    assert "No cell failed." in page
    results = study_results(seeds=[0])
    results["metric"], results["error"], results["score"] = None, "out of memory", math.nan
    page = render_study(ABOUT, results, lambda key: None)
    assert "No cell is done yet" in page
    assert "There is no score yet" in page
